"""Banks of a haystack: encoded once for all sizes, and each with other sentences in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.dense_layer_msa import DenseLayer
from ..model.memory_msa import Document, DocumentTable, MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from .haystack import Haystack


class HaystackBanks:
    """The banks of a haystack's first documents, with some of them changed.

    The haystack is encoded once, its documents each by itself, so that the first of them are the bank of a smaller
    haystack. A changed document stands where the unchanged one stood, under its id, and no other document's rows change
    with it: what is planted for one question disturbs no other bank.

    Args:
        model: encodes; evaluation mode.
        protocol: wraps documents; None: they are encoded as they are.
        documents: so many of the first documents are encoded.
        batch_tokens: tokens of a batch, padding included.
        show_progress: a progress bar.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        haystack: Haystack,
        documents: int | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        self._options = {"batch_tokens": batch_tokens, "show_progress": show_progress}
        texts = haystack.texts[: len(haystack) if documents is None else documents]
        self.whole = self._encode(dict(enumerate(texts)))

    def _encode(self, texts: Mapping[int, str]) -> MemoryBank:
        return self.model.encode_documents(list(self._rows(texts)), self.tokenizer, **self._options)

    def _rows(self, texts: Mapping[int, str]) -> Iterator[Mapping[str, object]]:
        for number, text in texts.items():
            if self.protocol is None:
                yield {"key": str(number), "text": text}
            else:
                yield self.protocol.document_row(number, text, self.tokenizer)

    def bank(self, documents: int, changed: Mapping[int, str]) -> MemoryBank:
        """A bank of the first documents.

        Args:
            documents: how many.
            changed: position -> text of the documents that are others than in the haystack.

        Raises:
            ValueError: for a document that the haystack does not have.
        """
        places = sorted(changed)
        if not 0 < documents <= len(self.whole) or (places and not 0 <= places[0] <= places[-1] < documents):
            raise ValueError(f"The haystack has {len(self.whole)} documents; {documents} and {places[-1:]} do not fit.")
        if not places:
            return _spliced(self.whole, documents, {}, None)
        other = self._encode({place: changed[place] for place in places})
        return _spliced(self.whole, documents, {place: number for number, place in enumerate(places)}, other)


def _spliced(whole: MemoryBank, documents: int, places: Mapping[int, int], other: MemoryBank | None) -> MemoryBank:
    """The first documents of a bank, those at `places` taken from another one; views where none is."""
    parts: list[tuple[MemoryBank, int, int]] = []  # whose documents, from, up to
    start = 0
    for place, number in places.items():
        assert other is not None
        parts += [(whole, start, place), (other, number, number + 1)]
        start = place + 1
    parts.append((whole, start, documents))
    parts = [part for part in parts if part[1] < part[2]]
    slices = [(bank, slice(int(bank.offsets[first]), int(bank.offsets[end]))) for bank, first, end in parts]
    counts = torch.cat([bank.offsets[first : end + 1].diff() for bank, first, end in parts])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    layers = {
        layer: DenseLayer(
            joined([bank.layers[layer].routing_keys[rows] for bank, rows in slices]),
            joined([bank.layers[layer].pooled_kv[rows] for bank, rows in slices]),
        )
        for layer in whole.layers
    }
    table: list[Document] = [document for bank, first, end in parts for document in bank.documents[first:end]]
    return MemoryBank(layers, offsets, whole.prefix, DocumentTable(table), whole.origin)
