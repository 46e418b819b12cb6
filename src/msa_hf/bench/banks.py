"""Banks of a haystack: encoded once for all sizes, and each with other sentences in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import DocumentIds, PromptProtocol
from ..hybrid.conversation.partition import select_partition
from ..model.dense_layer_msa import DenseLayer
from ..model.memory_msa import Document, DocumentTable, MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from .haystack import Haystack, HaystackTooSmall


class HaystackBanks:
    """The banks of a haystack's first documents, with some of them changed.

    The haystack is encoded once, its documents each by itself, so that the first of them are the bank of a smaller
    haystack. A changed document stands where the unchanged one stood, under its id, and no other document's rows change
    with it: what is planted for one question disturbs no other bank.

    Args:
        model: encodes; evaluation mode.
        protocol: wraps documents; None: they are encoded as they are.
        haystack: the texts of the documents of `whole`.
        whole: its bank; `encode` makes one.
        batch_tokens: tokens of a batch, padding included.

    Attributes:
        facts: what encoding took, for results.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        haystack: Haystack,
        whole: MemoryBank,
        batch_tokens: int = 16384,
    ) -> None:
        self.model, self.tokenizer, self.protocol = model, tokenizer, protocol
        if len(whole.documents.deleted):  # rows are cut below, which then are documents
            whole = select_partition(whole, [document.key for document in whole.documents])
        self.haystack, self.whole, self._batch_tokens = haystack, whole, batch_tokens
        self.facts: dict[str, float] = {"documents": len(whole), "tokens_with_wrapping": whole.num_tokens}

    @classmethod
    def encode(
        cls,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        haystack: Haystack,
        documents: int | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = False,
    ) -> HaystackBanks:
        """Encode a haystack.

        Args:
            documents: so many of the first documents (default: all).
        """
        started = time.monotonic()
        texts = haystack.texts[: len(haystack) if documents is None else documents]
        with ThreadPoolExecutor() as threads:  # tokenizers leave Python's lock to others
            made_rows = threads.map(
                lambda item: _row(item[0], str(item[0]), item[1], tokenizer, protocol), enumerate(texts)
            )
            rows = list(tqdm(made_rows, "Tokenizing", len(texts), unit="doc", delay=1.0, disable=not show_progress))
        whole = model.encode_documents(rows, tokenizer, batch_tokens=batch_tokens, show_progress=show_progress)
        made = cls(model, tokenizer, protocol, haystack, whole, batch_tokens)
        made.facts["seconds"] = round(time.monotonic() - started, 1)
        return made

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
        old = [self.whole.documents[place] for place in places]
        rows = [
            _row(DocumentIds.of(place, document), document.key, changed[place], self.tokenizer, self.protocol)
            for place, document in zip(places, old, strict=True)
        ]
        other = self.model.encode_documents(rows, self.tokenizer, batch_tokens=self._batch_tokens, show_progress=False)
        other.documents = DocumentTable(
            [
                replace(new, metadata=document.metadata, id=document.id)
                for new, document in zip(other.documents, old, strict=True)
            ]
        )
        return _spliced(self.whole, documents, {place: number for number, place in enumerate(places)}, other)


def haystack_of(bank: MemoryBank, tokens: int | None = None) -> Haystack:
    """The haystack of the documents that a bank holds.

    Args:
        tokens: of as many of the first documents as have at least so many; None: of all.

    Raises:
        HaystackTooSmall: where they have fewer.
        ValueError: for a document without its text.
    """
    texts, counts, total = list[str](), list[int](), 0
    for document in bank.documents:
        if document.text is None:
            raise ValueError(
                f"Document {document.key!r} was stored without its text, into which a sentence is to go. Encode the "
                "documents again with their texts, or name the documents themselves."
            )
        texts.append(document.text)
        counts.append(document.tokens)
        total += document.tokens
        if tokens is not None and total >= tokens:
            break
    if tokens is not None and total < tokens:
        raise HaystackTooSmall(
            f"The bank has {total:,} tokens, but {tokens:,} were asked for. Name a larger one or ask for smaller sizes."
        )
    return Haystack.of_documents(texts, counts)


def _row(
    id: int, key: str, text: str, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol | None
) -> Mapping[str, object]:
    return {"key": key, "text": text} if protocol is None else protocol.document_row(id, text, tokenizer, key)


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
