"""Encoding: documents in, a `MemoryBank` out (paper, 3.1: stage 1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .attention_msa import chunks_of
from .memory_msa import Document, DocumentTable, LayerMemory, MemoryBank

# Documents read ahead and sorted by length, in batches' worth of tokens: little padding, bounded memory.
WINDOW_BATCHES = 16
# Where a text may be cut, best first; looked for in the last quarter of what fits.
BOUNDARIES = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?][\"')\]]*\s"), re.compile(r"\s"))


@dataclass
class _Item:
    """A document on its way in."""

    key: str
    text: str | None
    metadata: dict[str, Any] | None
    ids: list[int]


def encode_documents(
    model: Any,
    documents: Iterable[Any],
    tokenizer: Any = None,
    *,
    batch_tokens: int = 16384,
    max_length: int | None = None,
    too_long: str = "error",
    add_special_tokens: bool = False,
    text_column: str = "text",
    key_column: str = "key",
    bank_device: Any = None,
    show_progress: bool = True,
) -> MemoryBank:
    """Encode documents into a bank; see `MSAForCausalLM.encode_documents`."""
    if too_long not in ("error", "split"):
        raise ValueError(f"`too_long` must be 'error' or 'split', got {too_long!r}.")
    if isinstance(documents, str | bytes | Mapping):
        raise TypeError(
            f"`documents` must be an iterable of documents, got one {type(documents).__name__}; put it in a list."
        )
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    limit = min(item for item in (max_length, positions, torch.iinfo(torch.int64).max) if item is not None)
    device = torch.device(bank_device) if bank_device is not None else model.device

    reader = _Reader(tokenizer, limit, too_long, config.chunk_size, add_special_tokens, text_column, key_column)
    total = len(documents) if isinstance(documents, Sized) else None
    progress = tqdm(total=total, desc="Encoding documents", unit="doc", disable=not show_progress)
    pieces: dict[int, list[LayerMemory]] = {layer: [] for layer in config.memory_layers}
    table: list[Document] = []
    lengths: list[int] = []
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), progress:
            prefix = model.encode_prefix()
            items = reader.read(documents, progress)
            while window := _window(items, batch_tokens * WINDOW_BATCHES):
                for layer, memory in _encode_window(model, window, batch_tokens, device).items():
                    pieces[layer].append(memory)
                for item in window:
                    chunks = -(-len(item.ids) // config.chunk_size)
                    table.append(Document(item.key, item.text, item.metadata, len(item.ids), chunks))
                    lengths.append(len(item.ids))
    finally:
        model.train(was_training)
    if not table:
        raise ValueError("`documents` is empty: a bank needs at least one document.")
    layers = {}
    for layer in config.memory_layers:  # one layer at a time, so that joining the pieces needs little besides the bank
        parts = pieces.pop(layer)
        layers[layer] = LayerMemory(
            routing_keys=torch.cat([part.routing_keys for part in parts]),
            content=torch.cat([part.content for part in parts]),
        )
        del parts
    bank = MemoryBank(
        layers=layers,
        offsets=chunks_of(torch.tensor(lengths), config.chunk_size),
        prefix={layer: (key.to(device), value.to(device)) for layer, (key, value) in prefix.items()},
        documents=DocumentTable(table),
        origin=model.memory_origin(tokenizer),
    )
    model.accept_bank(bank)
    return bank


def _window(items: Iterator[_Item], tokens: int) -> list[_Item]:
    """The next documents of together about `tokens` tokens; empty at the end."""
    window: list[_Item] = []
    held = 0
    for item in items:
        window.append(item)
        held += len(item.ids)
        if held >= tokens:
            break
    return window


def _encode_window(model: Any, window: list[_Item], batch_tokens: int, device: torch.device) -> dict[int, LayerMemory]:
    """Encode a window in batches of similar length; the result is in the window's order."""
    order = sorted(range(len(window)), key=lambda place: len(window[place].ids))
    encoded: dict[int, list[LayerMemory]] = {}
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(window[order[stop]].ids) <= batch_tokens:
            stop += 1
        batch = [window[place] for place in order[start:stop]]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(item.ids) for item in batch], batch_first=True)
        lengths = torch.tensor([len(item.ids) for item in batch])
        layers = model.encode_batch(ids.to(model.device), lengths.to(model.device))
        _refuse_nan(layers, batch, lengths, model.config.chunk_size)
        for layer, memory in layers.items():
            encoded.setdefault(layer, []).append(memory.to(device))
        start = stop
    offsets = chunks_of(torch.tensor([len(window[place].ids) for place in order]), model.config.chunk_size)
    slot = torch.tensor(order).argsort()  # where each document of the window lies among the encoded ones
    rows = torch.cat([torch.arange(int(offsets[place]), int(offsets[place + 1])) for place in slot.tolist()]).to(device)
    return {
        layer: LayerMemory(
            routing_keys=torch.cat([part.routing_keys for part in parts])[rows],
            content=torch.cat([part.content for part in parts])[rows],
        )
        for layer, parts in encoded.items()
    }


def _refuse_nan(layers: dict[int, LayerMemory], batch: list[_Item], lengths: Tensor, chunk_size: int) -> None:
    for layer, memory in layers.items():
        finite = memory.content.flatten(1).isfinite().all(1) & memory.routing_keys.isfinite().all(1)
        if not bool(finite.all()):
            chunk = int((~finite).nonzero()[0])
            place = int(torch.searchsorted(chunks_of(lengths, chunk_size), chunk, right=True)) - 1
            raise ValueError(
                f"Document {batch[place].key!r} has NaN or infinite states in layer {layer}: the model's weights hold "
                "NaN, or its dtype overflows. Nothing was written."
            )


@dataclass(frozen=True)
class _Reader:
    """Turns what a user calls documents into items with token ids."""

    tokenizer: Any
    limit: int
    too_long: str
    chunk_size: int
    add_special_tokens: bool
    text_column: str
    key_column: str

    def read(self, documents: Iterable[Any], progress: Any) -> Iterator[_Item]:
        keys: set[str] = set()
        for number, document in enumerate(documents):
            for item in self._items(number, document):
                if item.key in keys:
                    raise ValueError(f"Document {number} has the key {item.key!r}, which an earlier document has.")
                keys.add(item.key)
                yield item
            progress.update()

    def _items(self, number: int, document: Any) -> Iterator[_Item]:
        key, text, metadata, ids = self._fields(number, document)
        if ids is None:
            if self.tokenizer is None:
                raise ValueError(f"Document {number} is text; pass the `tokenizer` of the model to encode it.")
            ids = self.tokenizer(text, add_special_tokens=self.add_special_tokens, truncation=False, verbose=False)[
                "input_ids"
            ]
        if not ids:
            raise ValueError(f"Document {number} (key {key!r}) is empty; leave it out.")
        if len(ids) <= self.limit:
            yield _Item(key, text, metadata, ids)
        elif self.too_long == "error":
            raise ValueError(
                f"Document {number} (key {key!r}) has {len(ids)} tokens, above the limit of {self.limit}. "
                "Pass too_long='split' to store it in parts."
            )
        else:
            for part, (piece, piece_ids) in enumerate(self._split(text, ids)):
                yield _Item(f"{key}#{part}", piece, {**(metadata or {}), "part": part}, piece_ids)

    def _fields(self, number: int, document: Any) -> tuple[str, str | None, dict[str, Any] | None, list[int] | None]:
        if isinstance(document, str):
            return str(number), document, None, None
        if isinstance(document, Mapping):
            fields = dict(document)
            key = fields.pop(self.key_column, None)
            text, ids = fields.pop(self.text_column, None), fields.pop("input_ids", None)
            fields.pop("attention_mask", None)
            if text is None and ids is None:
                raise ValueError(
                    f"Document {number} has neither {self.text_column!r} nor 'input_ids', only {sorted(document)}; "
                    "name its column with `text_column`."
                )
            metadata = fields.pop("metadata", None) if set(fields) == {"metadata"} else fields
            return str(number if key is None else key), text, metadata or None, None if ids is None else _ids(ids)
        if isinstance(document, Sequence | Tensor) or hasattr(document, "tolist"):
            return str(number), None, None, _ids(document)
        raise TypeError(
            f"Document {number} is a {type(document).__name__}; a document is text, token ids or a mapping."
        )

    def _split(self, text: str | None, ids: list[int]) -> Iterator[tuple[str | None, list[int]]]:
        """Cut at a paragraph, line, sentence or word of the text, else between chunks."""
        if text is None or not getattr(self.tokenizer, "is_fast", False):
            size = max(self.limit // self.chunk_size * self.chunk_size, min(self.limit, self.chunk_size))
            pieces = iter(ids)
            while piece := list(islice(pieces, size)):
                yield None if self.tokenizer is None else self.tokenizer.decode(piece), piece
            return
        rest = text
        while rest:
            coded = self.tokenizer(
                rest, add_special_tokens=self.add_special_tokens, return_offsets_mapping=True, verbose=False
            )
            if len(coded["input_ids"]) <= self.limit:
                if coded["input_ids"]:
                    yield rest, coded["input_ids"]
                return
            end = self._fitting_end(rest, coded["offset_mapping"])
            piece_ids = self.tokenizer(rest[:end], add_special_tokens=self.add_special_tokens, verbose=False)[
                "input_ids"
            ]
            yield rest[:end], piece_ids
            rest = rest[end:]

    def _fitting_end(self, text: str, spans: list[tuple[int, int]]) -> int:
        """Characters of `text` to keep: the last boundary in the last quarter of what fits within the limit."""
        fits = max(spans[self.limit - 1][1], 1)
        cuts: list[int] = [fits]
        for boundary in BOUNDARIES:
            ends = [match.end() for match in boundary.finditer(text, fits * 3 // 4, fits)]
            if ends:
                cuts.insert(0, ends[-1])
                break
        # A text cut elsewhere may tokenize to more tokens than the same characters did inside the whole.
        end = cuts[0]
        while (
            len(self.tokenizer(text[:end], add_special_tokens=self.add_special_tokens, verbose=False)["input_ids"])
            > self.limit
        ):
            end -= max((fits // 16), 1)
            if end <= 0:
                raise ValueError(f"A limit of {self.limit} tokens is too small to split the text.")
        return end


def _ids(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
