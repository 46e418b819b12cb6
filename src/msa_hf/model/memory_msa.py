"""The memory bank: what stage 1 leaves of a corpus and stage 2 routes over and attends to.

Per memory layer and chunk of `chunk_size` tokens it holds one routing key and one pooled key and value; per document,
its key, text and metadata; and with what model all of it was made, because no other model can read it.
"""

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .arrow_msa import pyarrow, table_schema
from .bank_format_msa import RESTORE, BankFormatError
from .bank_reader_msa import KnowsOrigin, open_bank
from .bank_writer_msa import write_bank
from .bounds_msa import check_json
from .chunks_msa import ContextRows
from .dense_layer_msa import DenseLayer as DenseLayer
from .document_rows_msa import ChunkLayout
from .fingerprint_msa import model_fingerprint as model_fingerprint
from .fingerprint_msa import tokenizer_fingerprint as tokenizer_fingerprint
from .origin_msa import BankOrigin as BankOrigin
from .origin_msa import check_origin
from .routing_msa import RoutingRequest, Scoring, Selection


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a bank.

    Attributes:
        key: name, unique within the bank.
        text: original text, None where it was not kept.
        metadata: JSON values by name (saving turns tuples into lists), or None.
        tokens: tokens that were encoded, at least 1.
        chunks: `ceil(tokens / chunk_size)`.
        id: number that stays the document's for ever, in banks that can be changed; else None.
        version: of the event that brought this text, None where it had none.
    """

    key: str
    text: str | None
    metadata: dict[str, object] | None
    tokens: int
    chunks: int
    id: int | None = None
    version: int | None = None


class DocumentTable(Sequence[Document]):
    """The documents of a bank in order, as a sequence.

    Below it lie rows, in which the bank's chunks are counted: those of the documents, and of deleted ones that still
    take up room. A document's position counts the documents before it, not the rows.

    Args:
        rows: documents, or a `pyarrow.Table` with the columns of the bank format. The rows of a table are decoded when
            they are asked for, so that one that is memory mapped stays on disk.
        deleted: [n] int64 rows without a document, ascending; default none.
        find: the row of a key, or None, for a table whose keys are known to be unique; default: they are compared, and
            looked up in a dictionary.

    Raises:
        ValueError: where two documents have the same key, naming it.
    """

    def __init__(
        self, rows: Any, deleted: np.ndarray | None = None, find: Callable[[str], int | None] | None = None
    ) -> None:
        self._table = None if isinstance(rows, Sequence) else rows
        self._documents: list[Document] = list(rows) if isinstance(rows, Sequence) else []
        self.deleted = np.empty(0, np.int64) if deleted is None else deleted
        self.num_rows = len(self._documents if self._table is None else self._table)
        self._find = find
        self._positions: dict[str, int] | None = None
        if find is None:
            distinct = len(set(self._keys())) if self._table is None else len(self._living("key").unique())
            if distinct < len(self):
                key, times = Counter(self._keys()).most_common(1)[0]
                raise ValueError(f"{times} documents have the key {key!r}; keys must be unique.")

    def _living(self, column: str) -> Any:
        """A column of the table, of documents alone."""
        assert self._table is not None
        values = self._table[column]
        return values.filter(pyarrow().array(self.visible_rows())) if len(self.deleted) else values

    def visible_rows(self) -> np.ndarray:
        """[R] bool, the rows that are documents."""
        visible = np.ones(self.num_rows, bool)
        visible[self.deleted] = False
        return visible

    def _keys(self) -> list[str]:
        return [row.key for row in self] if self._table is None else self._living("key").to_pylist()

    def __len__(self) -> int:
        return self.num_rows - len(self.deleted)

    def rows_of(self, positions: Tensor) -> Tensor:
        """Rows of the documents at `positions`, any shape; what is negative stays."""
        if not len(self.deleted):
            return positions
        # The i-th deleted row has `deleted[i] - i` documents before it.
        before = torch.from_numpy(self.deleted - np.arange(len(self.deleted))).to(positions.device)
        rows = positions + torch.searchsorted(before, positions.contiguous(), right=True)
        return torch.where(positions < 0, positions, rows)

    def positions_of(self, rows: Tensor) -> Tensor:
        """Positions of the documents in `rows`, the inverse of `rows_of`."""
        if not len(self.deleted):
            return rows
        positions = rows - torch.searchsorted(torch.from_numpy(self.deleted).to(rows.device), rows.contiguous())
        return torch.where(rows < 0, rows, positions)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        return self.row(int(self.rows_of(torch.tensor(range(len(self))[index]))))

    def row(self, row: int) -> Document:
        """What lies in a row, deleted or not."""
        return self._documents[row] if self._table is None else next(self._decode(self._table.slice(row, 1)))

    def __iter__(self) -> Iterator[Document]:
        if self._table is None:
            gone = set(self.deleted.tolist())
            yield from (document for row, document in enumerate(self._documents) if row not in gone)
            return
        visible, row = self.visible_rows(), 0
        for batch in self._table.to_batches(max_chunksize=1024):
            alive = visible[row : row + len(batch)]
            row += len(batch)
            yield from self._decode(batch if alive.all() else _validated(batch).filter(pyarrow().array(alive)))

    def texts(self, first: int = 0) -> Iterator[tuple[int, str | None]]:
        """Rows from `first` on that are documents, and their texts; nothing else of them is decoded."""
        visible, row = self.visible_rows(), first
        if self._table is None:
            yield from ((row, self._documents[row].text) for row in range(first, self.num_rows) if visible[row])
            return
        for batch in self._table.select(["text"]).slice(first).to_batches(max_chunksize=1024):
            alive = np.flatnonzero(visible[row : row + len(batch)])
            found = _validated(batch).take(pyarrow().array(alive))["text"].to_pylist() if len(alive) else ()
            yield from zip((row + alive).tolist(), found, strict=True)
            row += len(batch)

    @staticmethod
    def _decode(rows: Any) -> Iterator[Document]:
        for row in _validated(rows).to_pylist():
            try:
                check_json(row["metadata"] or "")
                metadata = None if row["metadata"] is None else json.loads(row.pop("metadata"))
                if not isinstance(metadata, dict | None):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                raise BankFormatError(
                    f"Document {row['key']!r}: its metadata is not JSON ({error}). {RESTORE}."
                ) from error
            row.pop("digest", None)
            yield Document(**{**row, "metadata": metadata})

    def position(self, key: str) -> int:
        """Index of the document named `key`.

        Raises:
            KeyError: naming a key that no document has.
        """
        if self._find is not None:
            if (row := self._find(key)) is None:
                raise KeyError(key)
            return int(self.positions_of(torch.tensor(row)))
        if self._positions is None:
            self._positions = {name: row for row, name in enumerate(self._keys())}
        return self._positions[key]

    def ids(self) -> np.ndarray | None:
        """`id` of every document, [N] int64; None in banks without."""
        if self._table is None:
            ids = [document.id for document in self]
            return None if None in ids or not ids else np.array(ids, np.int64)
        if "id" not in self._table.column_names:
            return None
        return self._living("id").to_numpy().astype(np.int64)

    def counts(self, column: str) -> np.ndarray:
        """`"tokens"` or `"chunks"` of every row: [R] int64; R is the number of documents where none was deleted."""
        if self._table is not None:
            return self._table[column].to_numpy().astype(np.int64)
        return np.fromiter((getattr(row, column) for row in self._documents), np.int64, len(self._documents))

    def to_arrow(self) -> Any:
        """The documents as a `pyarrow.Table` with the columns of the bank format.

        Raises:
            ValueError: for metadata that JSON cannot express, naming the document.
            ImportError: where pyarrow is missing.
        """
        if self._table is not None:
            visible = self.visible_rows()
            table = _validated(self._table)
            return table.filter(pyarrow().array(visible)) if len(self.deleted) else table
        numbered = self.ids() is not None
        rows = []
        for document in self:
            metadata = document.metadata
            try:
                encoded = None if metadata is None else json.dumps(metadata, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"Document {document.key!r}: its metadata cannot be written as JSON: {error}."
                ) from error
            row = (document.key, document.text, encoded, document.tokens, document.chunks)
            rows.append((*row, document.id, document.version, None) if numbered else row)
        schema = table_schema(2 if numbered else 1)
        columns = zip(*rows, strict=True) if rows else [()] * len(schema)
        arrays = [pyarrow().array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        return pyarrow().Table.from_arrays(arrays, schema=schema)


def _validated(rows: Any) -> Any:
    """Rows of a table whose offsets and UTF-8 are safe to follow: it may have been opened without reading it."""
    try:
        rows.validate(full=True)
    except ValueError as error:
        raise BankFormatError(f"The table of documents is damaged ({error}). {RESTORE}.") from error
    return rows


@dataclass(frozen=True)
class BankHome:
    """The place that a bank was loaded from.

    Attributes:
        directory: of the bank.
        commit: its manifest's checksum then.
    """

    directory: Path
    commit: str


class LayerMemory(Protocol):
    """What one memory layer keeps of the documents, wherever it lies: the layer is asked, and hands out no tensors.

    Queries and masks may lie on any device; results lie on the layer's, and asking never waits for it where the layer
    can help it. Structural: a checkpoint's copy of a class may live beside the package's.
    """

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample; equal scores go to the lower number.

        Args:
            queries: [B, T, H, D] router queries. Where these have a gradient, so have the scores.
            mask: [B, T] bool, tokens that route; a sample without one chooses nothing.
            k: how many.
            scoring: similarity and reductions.
        """

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores [B, R] float32 of all documents, or [B, n] of `documents` [B, n] int64, -1 for none.

        `NO_SCORE` for those that a sample may not choose, and for samples without a routing token. Differentiable where
        the queries are.
        """

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of the documents of a selection, keys and values in `dtype`."""


class OpenSession:
    """A session in which there is nothing to do but to hand out the layers.

    A class of its own, because torch.compile follows no `nullcontext` that hands out something.
    """

    def __init__(self, layers: Mapping[int, LayerMemory]) -> None:
        self.layers = layers

    def __enter__(self) -> Mapping[int, LayerMemory]:
        return self.layers

    def __exit__(self, *error: object) -> None:
        pass


@runtime_checkable
class Snapshots(Protocol):
    """What a forward can take as its memory: whatever has a state that stays as it is."""

    def snapshot(self) -> "Memory":
        """The state of now, which does not change any more."""


class Memory(Protocol):
    """Documents that one model has encoded, wherever they lie.

    Attributes:
        documents: in order; with the rows in which their chunks are counted.
        origin: what the memory was made with.
        prefix: per layer of the model, keys (after RoPE) and values [G, p, D] of the template prefix.
    """

    @property
    def documents(self) -> DocumentTable: ...

    @property
    def origin(self) -> BankOrigin: ...

    @property
    def prefix(self) -> Mapping[int, tuple[Tensor, Tensor]]: ...

    def snapshot(self) -> "Memory":
        """The state of now, which does not change any more; itself where nothing ever does."""

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers, for one forward that routes, within it.

        Processes that share a memory meet where the session begins, and hear at its end whether all came through.
        """


class MemoryBank:
    """Documents, encoded once by one model, ready to be routed over and attended to.

    Args:
        layers: memory of each memory layer; C chunks in all of them, one dtype, one device.
        offsets: [R + 1] int64 on the CPU; chunks `offsets[i]` up to `offsets[i + 1]` belong to row i of `documents`,
            which is document i where none was deleted.
        prefix: per layer of the model, keys (after RoPE) and values [G, p, D] of the template prefix; may be empty
            where p is 0.
        documents: N documents in R rows.
        origin: what the bank was made with.
        counts: chunks and tokens of the documents, from who has made sure that all parts agree; they are then not
            compared.
        next_id: the first id above all that were ever given; default: above those of the documents, if these have ids.

    Attributes:
        home: where it was loaded from, None where it was not.
        indexes: what `search` uses beside the tensors, by name (`msa_hf.retrieval`).
        is_whole: its layers are tensors of all chunks.

    Raises:
        ValueError: where these contradict each other, naming what does.
    """

    is_whole = True

    def __init__(
        self,
        layers: Mapping[int, DenseLayer],
        offsets: Tensor,
        prefix: Mapping[int, tuple[Tensor, Tensor]],
        documents: DocumentTable,
        origin: BankOrigin,
        counts: tuple[int, int] | None = None,
        next_id: int | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.offsets = offsets
        self.prefix = dict(sorted(prefix.items()))
        self.documents = documents
        self.origin = origin
        self.next_id = next_id
        self.home: BankHome | None = None
        self.indexes: dict[str, Any] = {}
        self._visible: Tensor | None = None
        self._layout: ChunkLayout | None = None
        if counts is None:
            self._validate()
            visible = documents.visible_rows()
            counts = int(documents.counts("chunks")[visible].sum()), int(documents.counts("tokens")[visible].sum())
        self.num_chunks, self.num_tokens = counts

    def _validate(self) -> None:
        def require(valid: object, problem: str) -> None:
            if not valid:
                raise ValueError(problem)

        offsets, count = self.offsets, self.documents.num_rows
        on_cpu = offsets.dtype == torch.int64 and offsets.device.type == "cpu"
        require(on_cpu and offsets.shape == (count + 1,), f"`offsets` must be {count + 1} int64 numbers on the CPU.")
        chunks = self.documents.counts("chunks")
        require(offsets[0] == 0 and (offsets.diff() >= 1).all(), "`offsets` must ascend from 0, by 1 or more.")
        require((offsets.diff().numpy() == chunks).all(), "`offsets` and the documents' `chunks` differ.")
        size = self.origin.chunk_size
        for row in np.flatnonzero(chunks != -(-self.documents.counts("tokens") // size))[:1]:
            document = self.documents.row(int(row))
            raise ValueError(
                f"Document {document.key!r} has {document.tokens} tokens and {document.chunks} chunks, which does not "
                f"fit chunks of {size} tokens."
            )

        wanted = list(self.origin.memory_layers)
        require(list(self.layers) == wanted, f"`layers` are {list(self.layers)}, the origin's are {wanted}.")
        total = int(offsets[-1])
        for layer, memory in self.layers.items():
            keys, pooled_kv = memory.routing_keys, memory.pooled_kv
            fits = pooled_kv.ndim == 4 and pooled_kv.shape[:2] == (total, 2)
            fits = fits and keys.shape == (total, pooled_kv.shape[2:].numel())
            require(
                fits,
                f"Layer {layer}: for {total} chunks `pooled_kv` must be [{total}, 2, G, D] and `routing_keys` "
                f"[{total}, G * D], got {list(pooled_kv.shape)} and {list(keys.shape)}.",
            )
        length = len(self.origin.prefix_token_ids)
        missing = sorted(self.layers.keys() - self.prefix.keys())
        require(not length or not missing, f"`prefix` lacks the memory layers {missing}.")
        for layer, (keys, values) in self.prefix.items():
            fits = keys.ndim == 3 and keys.shape == values.shape and keys.shape[1] == length
            require(
                fits,
                f"`prefix` of layer {layer}: keys and values must be [G, {length}, D], "
                f"got {list(keys.shape)} and {list(values.shape)}.",
            )
        kinds = {(tensor.dtype, tensor.device) for tensor in self._tensors()}
        require(len(kinds) == 1, f"All tensors must share one dtype and one device, got {sorted(map(str, kinds))}.")
        require(self.dtype.is_floating_point, f"A bank holds floating-point numbers, got {self.dtype}.")

    def _tensors(self) -> Iterator[Tensor]:
        for memory in self.layers.values():
            yield from (memory.routing_keys, memory.pooled_kv)
        for pair in self.prefix.values():
            yield from pair

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def visible(self) -> Tensor | None:
        """[1, R] bool on the bank's device, the rows that are documents; None where all are."""
        if self._visible is None and len(self.documents.deleted):
            self._visible = torch.from_numpy(self.documents.visible_rows())[None].to(self.device)
        return self._visible

    @property
    def layout(self) -> ChunkLayout:
        """Whose the chunks are, and which documents may be chosen."""
        if self._layout is None:
            self._layout = ChunkLayout(self.offsets, self.visible)
        return self._layout

    def snapshot(self) -> "MemoryBank":
        """Itself, which does not change."""
        return self

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers, for one forward; see `Memory`."""
        layout = self.layout.renewed()
        return OpenSession({layer: memory.over(layout) for layer, memory in self.layers.items()})

    def layer(self, index: int) -> DenseLayer:
        """The memory of layer `index`.

        Raises:
            KeyError: where that is no memory layer.
        """
        if index not in self.layers:
            raise KeyError(f"layer {index} is not a memory layer; those are {list(self.layers)}")
        return self.layers[index]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of all tensors."""
        return next(self._tensors()).dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors but the offsets."""
        return next(self._tensors()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MemoryBank":
        """The bank on another device or in another dtype; itself where nothing changes."""
        layers = {layer: memory.to(device, dtype) for layer, memory in self.layers.items()}
        prefix = {
            layer: (keys.to(device, dtype), values.to(device, dtype)) for layer, (keys, values) in self.prefix.items()
        }
        if all(layers[layer] is memory for layer, memory in self.layers.items()):
            return self
        counts = self.num_chunks, self.num_tokens
        moved = MemoryBank(layers, self.offsets, prefix, self.documents, self.origin, counts, self.next_id)
        moved.home, moved.indexes = self.home, self.indexes
        return moved

    def check(self, model_origin: BankOrigin) -> None:
        """Make sure that a model can read this bank.

        Raises:
            ValueError: listing every difference, and the remedy.
        """
        check_origin(self.origin, model_origin)

    def search(self, query: str | Sequence[str], k: int = 10, mode: str = "hybrid", **options: Any) -> Any:
        """The documents that fit a query, best first, without generating; see `msa_hf.retrieval.search`.

        Args:
            query: a text, or several.
            k: hits at most.
            mode: `"router"`, `"lexical"`, `"dense"`, or `"hybrid"`.
            options: `model` and `tokenizer` for routers, `embedder`, `fusion`, ...

        Returns:
            `msa_hf.retrieval.Hit`s; a list of them for several queries.

        Raises:
            ImportError: where the package is not installed: a checkpoint's own code does not search.
        """
        try:
            module = importlib.import_module("msa_hf.retrieval")
        except ImportError as error:
            raise ImportError("Searching a bank needs the package: `pip install msa-hf`.") from error
        return module.search(self, query, k, mode, **options)

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str = "4GB", sole_writer: bool = False
    ) -> None:
        """Save to a directory, all or nothing. A bank that lies there is replaced; whoever has it loaded keeps it.

        Args:
            directory: made where missing.
            max_shard_size: most bytes of tensors per file; a document is never split.
            sole_writer: for a file system without locks: you vouch that nothing else writes to the directory, and no
                lock is asked for.

        Raises:
            BankLocked: where a writer has the directory open, as a `BankStore` does, naming it.
            BankNotWritable: where the file system of the directory has no locks, naming it.
            ValueError: for a dtype or metadata that the format cannot hold, or a directory whose manifest is not
                readable.
            ImportError: where pyarrow is missing.
        """
        layers = {layer: (memory.routing_keys, memory.pooled_kv) for layer, memory in self.layers.items()}
        if len(self.documents.deleted):  # a copy, without them
            visible = torch.from_numpy(self.documents.visible_rows())
            chunks = visible.repeat_interleave(self.offsets.diff()).nonzero()[:, 0].to(self.device)
            layers = {layer: (keys[chunks], pooled_kv[chunks]) for layer, (keys, pooled_kv) in layers.items()}
        table, origin, ids = self.documents.to_arrow(), self.origin.to_manifest(), self.documents.ids()
        next_id = max(self.next_id or 0, 0 if ids is None or not len(ids) else int(ids.max()) + 1)
        write_bank(Path(directory), origin, layers, self.prefix, table, max_shard_size, next_id, sole_writer)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        model: KnowsOrigin | None = None,
        tokenizer: object = None,
        device: torch.device | str | None = None,
        verify: bool = True,
    ) -> "MemoryBank":
        """Load a bank; texts, and on the CPU most tensors, stay memory mapped.

        Args:
            directory: where `save_pretrained` put it.
            model: the model that is to read the bank; its `memory_origin(tokenizer)` is compared with the bank's origin
                before anything is loaded. None: not compared.
            tokenizer: compared as well where given.
            device: where the tensors go. Default: the CPU.
            verify: compare the SHA-256 of every file, which reads all of them. Sizes, shapes and counts are always
                checked; turn this off only for files that you wrote yourself.

        Raises:
            BankFormatError: where the directory is no bank or a damaged one, naming file, cause and remedy.
            ValueError: where another model made it, listing every difference.
            ImportError: where pyarrow is missing.
        """
        reader = open_bank(directory, model, tokenizer, verify)
        rows = reader.rows()
        reader.check_side_files()
        # With its index: safetensors takes a bare "cuda" for the first device, torch for the current one.
        target = torch.empty(0, device=device or "cpu").device
        layers = {layer: DenseLayer(*pair) for layer, pair in reader.tensors(target).items()}
        prefix = reader.prefix(target)
        with reader.contradictions():
            documents = DocumentTable(rows.table, rows.deleted)
            bank = cls(layers, rows.offsets, prefix, documents, reader.origin, next_id=rows.next_id)
        bank.home = BankHome(reader.directory, reader.manifest["checksum"])
        return bank

    def __repr__(self) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())
        return (
            f"MemoryBank(documents={len(self)}, tokens={self.num_tokens}, chunks={self.num_chunks}, "
            f"layers={list(self.layers)}, dtype={str(self.dtype).removeprefix('torch.')}, device={self.device}, "
            f"bytes={size})"
        )
