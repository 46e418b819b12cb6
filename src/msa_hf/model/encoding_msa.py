"""Encoding: documents in, a `MemoryBank` out (paper, 3.1: stage 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .dense_layer_msa import chunks_of
from .encoded_batches_msa import Counted, EncodedWindow, EncodingLayers
from .given_documents_msa import are_paths, each_document, key_of, read_paths
from .memory_msa import DenseLayer, Document, DocumentTable, MemoryBank
from .metadata_msa import checked_metadata
from .modes_msa import evaluating
from .origin_msa import BankOrigin
from .positions_msa import position_limit
from .splitting_msa import LimitTooSmall, split_text
from .streams_msa import beside_the_queue
from .tokenizing_msa import tokenize_texts
from .types_msa import RawDocument
from .unicode_msa import check_unicode
from .wrapping_msa import input_device

# Documents read ahead and sorted by length, in batches' worth of tokens: little padding, bounded memory.
WINDOW_BATCHES = 16
FIRST_WINDOW = 7 / 8  # the first where tokens are made on the way, likewise: one batch, with room for padding
BLOCK, BLOCK_CHARACTERS = 64, 65536  # documents whose texts are tokenized together: as many, or so much text


@dataclass
class _Item:
    """A document on its way in."""

    key: str
    text: str | None
    metadata: dict[str, object] | None
    ids: Tensor  # [tokens] int64
    ends: bool = False  # it is the last part of its document
    is_there: bool = False  # it was there with its token ids before anything was encoded


def encode_documents(
    model: PreTrainedModel,
    documents: Iterable[RawDocument] | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_tokens: int = 16384,
    max_length: int | None = None,
    too_long: str = "error",
    add_special_tokens: bool = False,
    text_column: str = "text",
    key_column: str = "key",
    bank_device: torch.device | str | None = None,
    show_progress: bool = True,
    compile_layers: bool = False,
    fp8_projections: bool = False,
    non_blocking: bool = False,
    counted: Callable[[int, int], object] | None = None,
) -> MemoryBank:
    """Encode documents into a bank; see `MSAForCausalLM.encode_documents`.

    Args:
        counted: called with the numbers of documents and tokens, as they are given to the model.
    """
    if too_long not in ("error", "split"):
        raise ValueError(f"`too_long` must be 'error' or 'split', got {too_long!r}.")
    for name, value in (("batch_tokens", batch_tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    config = model.config
    positions = position_limit(config)
    limit = min(item for item in (max_length, positions, torch.iinfo(torch.int64).max) if item is not None)
    device = torch.device(bank_device) if bank_device is not None else input_device(model)

    given: Iterable[object]
    if are_paths(documents):
        given = read_paths(documents, text_column=text_column, key_column=None if key_column == "key" else key_column)
        text_column, key_column = "text", "key"
    else:
        given = documents  # type: ignore[assignment]  # no path, which is not iterable
    reader = _Reader(
        tokenizer, limit, too_long, config.chunk_size, add_special_tokens, text_column, key_column, config.vocab_size
    )
    reader.check(given)
    total = len(given) if isinstance(given, Sized) else None
    progress = tqdm(total=total, desc="Encoding documents", unit="doc", disable=not show_progress)
    table: list[Document] = []
    arriving = _Arriving(config.memory_layers)
    look_before = beside_the_queue(input_device(model))
    with torch.inference_mode(False), evaluating(model), progress, look_before as looking:
        prefix = {layer: (key.to(device), value.to(device)) for layer, (key, value) in model.encode_prefix().items()}
        layers = EncodingLayers(model, compile_layers, fp8_projections)
        items = reader.read(given)
        for window in _windows(items, batch_tokens):

            def count(places: list[int], window: list[_Item] = window) -> None:
                documents = sum(window[place].ends for place in places)
                progress.update(documents)
                if counted is not None:
                    counted(documents, sum(len(window[place].ids) for place in places))

            keys, ids = [item.key for item in window], [item.ids for item in window]
            arriving.add(EncodedWindow(model, keys, ids, batch_tokens, device, count, layers))
            for item in window:
                chunks = -(-len(item.ids) // config.chunk_size)
                table.append(Document(item.key, item.text, item.metadata, len(item.ids), chunks))
        if not table:
            raise ValueError("`documents` is empty: a bank needs at least one document.")
        with looking():
            origin = model.memory_origin(tokenizer)
        offsets = chunks_of(torch.tensor([document.tokens for document in table]), config.chunk_size)
        rows = DocumentTable(table)
        bank: MemoryBank
        if non_blocking:
            bank = _ArrivingBank(arriving, offsets, prefix, rows, origin)
        else:
            bank = MemoryBank(arriving.layers(), offsets, prefix, rows, origin)
        with looking():
            model.accept_bank(bank)
    return bank


def encode_rows(
    model: PreTrainedModel,
    keys: Sequence[str],
    ids: Sequence[Tensor],
    *,
    bank_device: torch.device | str,
    counted: Counted,
    layers: EncodingLayers | None = None,
    batch_tokens: int = 16384,
) -> EncodedWindow:
    """Give documents to the model; see `MSAForCausalLM.encode_rows`."""
    device = torch.device(bank_device)
    with torch.inference_mode(False), evaluating(model):
        layers = EncodingLayers(model) if layers is None else layers
        return EncodedWindow(model, keys, ids, batch_tokens, device, counted, layers)


class _Arriving:
    """The memory of windows, of which all but the last were waited for."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._pieces: dict[int, list[DenseLayer]] = {layer: [] for layer in layers}
        self._last: EncodedWindow | None = None

    def add(self, window: EncodedWindow) -> None:
        """Take the next window."""
        self._take()
        self._last = window

    def _take(self) -> None:
        if self._last is not None:
            for layer, memory in self._last.layers().items():
                self._pieces[layer].append(memory)
            self._last = None

    def layers(self) -> dict[int, DenseLayer]:
        """The memory of all documents; waits for it, and lets go of it."""
        self._take()
        made = {}
        for layer in list(self._pieces):  # one at a time, so that joining them needs little besides the bank
            parts = self._pieces.pop(layer)
            made[layer] = DenseLayer(
                routing_keys=torch.cat([part.routing_keys for part in parts]),
                pooled_kv=torch.cat([part.pooled_kv for part in parts]),
            )
            del parts
        return made


class _ArrivingBank(MemoryBank):
    """A bank whose layers may be on their way until they are asked for, which waits for them."""

    def __init__(
        self,
        arriving: _Arriving,
        offsets: Tensor,
        prefix: dict[int, tuple[Tensor, Tensor]],
        documents: DocumentTable,
        origin: BankOrigin,
    ) -> None:
        self._arriving: _Arriving | None = arriving
        self._layers: dict[int, DenseLayer] = {}
        counts = int(documents.counts("chunks").sum()), int(documents.counts("tokens").sum())
        super().__init__({}, offsets, prefix, documents, origin, counts)

    @property
    def layers(self) -> dict[int, DenseLayer]:
        """Layer -> its memory."""
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            self._layers = arriving.layers()
        return self._layers

    @layers.setter
    def layers(self, layers: dict[int, DenseLayer]) -> None:
        self._layers = layers


def _windows(items: Iterable[_Item], batch_tokens: int) -> Iterator[list[_Item]]:
    """Documents in windows of about `WINDOW_BATCHES` batches.

    Where they have to be read or tokenized first, a device would have nothing to do meanwhile: the first windows are of
    one batch, two, four and eight.
    """
    whole, size = batch_tokens * WINDOW_BATCHES, batch_tokens * FIRST_WINDOW
    window: list[_Item] = []
    held, is_there = 0, True
    for item in items:
        window.append(item)
        held, is_there = held + len(item.ids), is_there and item.is_there
        if held >= (whole if is_there else min(size, whole)):
            yield window
            window, held, is_there, size = [], 0, True, 2 * size
    if window:
        yield window


class _Fields(NamedTuple):
    """Document `number` as a user gave it; at least one of text and token ids."""

    number: int
    key: str
    text: str | None
    metadata: dict[str, object] | None
    ids: Tensor | None


@dataclass(frozen=True)
class _Reader:
    """Turns what a user calls documents into items with token ids."""

    tokenizer: PreTrainedTokenizerBase | None
    limit: int
    too_long: str
    chunk_size: int
    add_special_tokens: bool
    text_column: str
    key_column: str
    vocabulary: int | None = None

    def read(self, documents: Iterable[object]) -> Iterator[_Item]:
        keys: set[str] = set()
        are_there = isinstance(documents, Sized)  # what cannot be counted may be made on the way
        for number, items in self.items(documents):
            before: _Item | None = None
            for item in items:
                item.is_there = item.is_there and are_there
                if item.key in keys:
                    raise ValueError(f"Document {number} has the key {item.key!r}, which an earlier document has.")
                keys.add(item.key)
                if before is not None:
                    yield before
                before = item
            if before is not None:
                before.ends = True
                yield before

    def check(self, documents: Iterable[object]) -> None:
        """Look at documents that can be read again, before any is encoded.

        Raises:
            ValueError, TypeError: for what is not documents, a field that cannot be kept and a key used twice.
        """
        rows = each_document(documents)
        if not isinstance(documents, Sized):
            return
        keys: set[str] = set()
        for number, document in enumerate(rows):
            fields = self._fields(number, document)
            if fields.key in keys:
                raise ValueError(f"Document {number} has the key {fields.key!r}, which an earlier document has.")
            keys.add(fields.key)
            if self.too_long == "error" and self._may_be_long(fields):
                for _ in next(self._tokenized([fields]))[1]:
                    pass

    def _may_be_long(self, fields: _Fields) -> bool:
        """Tell whether a document may be too long: a text has hardly ever more tokens than bytes."""
        if fields.ids is not None:
            return len(fields.ids) > self.limit
        return fields.text is not None and len(fields.text.encode()) > self.limit

    def items(self, documents: Iterable[object], first: int = 0) -> Iterator[tuple[int, Iterator[_Item]]]:
        """Documents, numbered from `first`, each with its item or its parts; to be looked at in this order."""
        for block in self._blocks(documents, first):
            yield from self._tokenized(block)

    def _blocks(self, documents: Iterable[object], first: int = 0) -> Iterator[list[_Fields]]:
        """Documents whose texts are tokenized together; no more are read ahead than that is of use for."""
        block: list[_Fields] = []
        held = 0
        for number, document in enumerate(each_document(documents), start=first):
            fields = self._fields(number, document)
            block.append(fields)
            held += BLOCK_CHARACTERS if fields.ids is not None or fields.text is None else len(fields.text)
            if held >= BLOCK_CHARACTERS or len(block) >= BLOCK:
                yield block
                block, held = [], 0
        if block:
            yield block

    def _tokenized(self, block: Sequence[_Fields]) -> Iterator[tuple[int, Iterator[_Item]]]:
        """The numbers and the items of documents."""
        texts = [item.text for item in block if item.ids is None and item.text is not None]
        if texts and self.tokenizer is None:
            number = next(item.number for item in block if item.ids is None)
            raise ValueError(f"Document {number} is text; pass the `tokenizer` of the model to encode it.")
        coded = iter(tokenize_texts(self.tokenizer, texts, self.add_special_tokens) if texts else ())
        for item in block:
            # By way of numpy, which takes a list apart in a third of the time.
            ids = torch.from_numpy(np.array(next(coded), np.int64)) if item.ids is None else item.ids
            yield item.number, self._items(item, ids)

    def taken(self, fields: _Fields) -> Iterator[_Item]:
        """A document whose token ids are there, or its parts."""
        assert fields.ids is not None
        return self._items(fields, fields.ids)

    def _items(self, fields: _Fields, ids: Tensor) -> Iterator[_Item]:
        number, key, text, metadata, given = fields
        if not len(ids):
            raise ValueError(f"Document {number} (key {key!r}) is empty; leave it out.")
        numbers = ids.numpy()
        if self.vocabulary is not None and not 0 <= numbers.min() <= numbers.max() < self.vocabulary:
            raise ValueError(
                f"Document {number} (key {key!r}) has token ids from {int(ids.min())} to {int(ids.max())}, but the "
                f"model knows 0 to {self.vocabulary - 1}. Was it tokenized for another model?"
            )
        if len(ids) <= self.limit:
            yield _Item(key, text, metadata, ids, is_there=given is not None)
        elif self.too_long == "error":
            raise ValueError(
                f"Document {number} (key {key!r}) has {len(ids)} tokens, above the limit of {self.limit}. "
                "Pass too_long='split' to store it in parts."
            )
        else:
            try:
                for part, (piece, piece_ids) in enumerate(self._split(text if given is None else None, ids.tolist())):
                    yield _Item(f"{key}#{part}", piece, metadata, torch.tensor(piece_ids), is_there=given is not None)
            except LimitTooSmall as error:
                raise ValueError(f"Document {number} (key {key!r}) cannot be split: {error}.") from None

    def _fields(self, number: int, document: object) -> _Fields:
        what = f"Document {number}"
        if isinstance(document, str):
            check_unicode(document, f"{what}: its text")
            return _Fields(number, str(number), str(document), None, None)
        if not isinstance(document, Mapping):
            return _Fields(number, str(number), None, None, token_ids(document, what))
        fields = dict(document)
        key = fields.pop(self.key_column, None)
        text, ids = fields.pop(self.text_column, None), fields.pop("input_ids", None)
        fields.pop("attention_mask", None)
        if text is None and ids is None:
            raise ValueError(
                f"{what} has neither {self.text_column!r} nor 'input_ids', only {sorted(map(str, document))}; "
                "name its column with `text_column`."
            )
        if not isinstance(text, str | None):
            raise TypeError(f"{what}: {self.text_column!r} is a {type(text).__name__}, not text.")
        if text is not None:
            check_unicode(text, f"{what}: {self.text_column!r}")
            text = str(text)
        if set(fields) == {"metadata"} and isinstance(fields["metadata"], Mapping | None):
            fields = dict(fields["metadata"] or {})
        metadata = checked_metadata(fields, what) or None
        given = None if ids is None else token_ids(ids, what)
        name = str(number) if key is None else key_of(key, f"{what}: its key")
        return _Fields(number, name, text, metadata, given)

    def _split(self, text: str | None, ids: list[int]) -> Iterator[tuple[str | None, list[int]]]:
        """Cut at a paragraph, line, sentence or word of the text; between chunks where only ids are there."""
        if text is not None and getattr(self.tokenizer, "is_fast", False):
            yield from split_text(self.tokenizer, text, self.limit, self.add_special_tokens)
            return
        size = max(self.limit // self.chunk_size * self.chunk_size, min(self.limit, self.chunk_size))
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            yield None if self.tokenizer is None else self.tokenizer.decode(piece), piece


def token_ids(values: object, what: str) -> Tensor:
    """Token ids as a user gave them, as [tokens] int64 on the CPU.

    Args:
        what: the document, which a message begins with.

    Raises:
        TypeError: for what is no flat list of integers.
    """
    if isinstance(values, bytes | bytearray) or not (
        isinstance(values, Sequence | Tensor) or hasattr(values, "tolist")
    ):
        raise TypeError(f"{what} is a {type(values).__name__}; a document is text, token ids or a mapping.")
    try:
        given = values if isinstance(values, Tensor | Sequence) else values.tolist()
        if type(given) is list and given and type(given[0]) is int and (array := np.array(given)).dtype == np.int64:
            given = torch.from_numpy(array)  # in a third of the time
        ids = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = None
    if ids is None or ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise TypeError(f"{what}: token ids must be a flat list of integers.")
    return ids.to(torch.int64)
