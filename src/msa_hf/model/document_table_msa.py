"""The documents of a bank as a sequence: names, texts and metadata, and the rows in which its chunks are counted."""

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .arrow_msa import ROWS_PER_BATCH, pyarrow, table_schema, write_batches
from .bank_format_msa import RESTORE, BankFormatError
from .bounds_msa import check_json
from .given_documents_msa import key_of


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
        self._most_chunks: dict[int, int] = {}
        self._moved: dict[torch.device, Tensor] = {}
        if find is None:
            if self._table is not None:
                _validated(self._table.select(["key"]))
            distinct = len(set(self._keys())) if self._table is None else len(self._living("key").unique())
            if distinct < len(self):
                key, times = Counter(self._keys()).most_common(1)[0]
                raise ValueError(f"{times} documents have the key {key!r}; keys must be unique.")

    def __getstate__(self) -> dict[str, Any]:
        """The documents by value; keys are looked up in a dictionary again where they were looked up in files.

        Raises:
            BankFormatError: where the table is damaged.
        """
        table = None if self._table is None else _encoded(self._table, self.visible_rows())
        return {**vars(self), "_table": table, "_find": None, "_positions": None, "_moved": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._table is not None:
            self._table = pyarrow().ipc.open_stream(pyarrow().py_buffer(self._table)).read_all()

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
        if rows.device not in self._moved:
            self._moved[rows.device] = torch.from_numpy(self.deleted).to(rows.device)
        positions = rows - torch.searchsorted(self._moved[rows.device], rows.contiguous())
        return torch.where(rows < 0, rows, positions)

    def most_chunks(self, documents: int) -> int:
        """The most chunks that so many documents have together; rows of deleted ones count as well."""
        if documents not in self._most_chunks:
            chunks, documents_there = self.counts("chunks"), min(documents, self.num_rows)
            most = np.partition(chunks, len(chunks) - documents_there)[len(chunks) - documents_there :]
            self._most_chunks[documents] = int(most.sum())
        return self._most_chunks[documents]

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        found = range(len(self))[index]
        return self.at(found) if isinstance(found, range) else self.at([found])[0]

    def at(self, positions: Sequence[int]) -> list[Document]:
        """The documents at some positions, in that order; of a table, decoded together.

        Raises:
            IndexError: for a position that is not there.
            BankFormatError: where the rows are damaged.
        """
        if not len(positions):
            return []
        if min(positions) < 0 or max(positions) >= len(self):
            raise IndexError(f"The {len(self)} documents have no positions {min(positions)} to {max(positions)}.")
        rows = self.rows_of(torch.tensor(positions)).tolist() if len(self.deleted) else positions
        if self._table is None:
            return [self._documents[row] for row in rows]
        # Slices, whose offsets are looked at before anything follows them, as `take` would.
        pieces = [self._table.slice(row, 1) for row in rows]
        return list(self._decode(pieces[0] if len(pieces) == 1 else pyarrow().concat_tables(pieces)))

    def row(self, row: int) -> Document:
        """The document of a row, deleted or not."""
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
            if not alive.any():  # perhaps damaged
                continue
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

    def metadata(self, holding: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Rows that are documents, and their metadata; nothing else of them is decoded.

        Args:
            holding: pieces that the metadata have as JSON; rows that lack one may be passed over.
        """
        visible, row = self.visible_rows(), 0
        if self._table is None:
            yield from ((row, self._documents[row].metadata) for row in np.flatnonzero(visible).tolist())
            return
        compute = importlib.import_module("pyarrow.compute")
        for batch in self._table.select(["key", "metadata"]).to_batches(max_chunksize=ROWS_PER_BATCH):
            places = np.flatnonzero(visible[row : row + len(batch)])
            found = _validated(batch).take(pyarrow().array(places)) if len(places) else batch[:0]
            for piece in holding:
                has = compute.match_substring(found["metadata"], piece).fill_null(False)
                found, places = found.filter(has), places[has.to_numpy(zero_copy_only=False)]
            for place, item in zip(places.tolist(), found.to_pylist(), strict=True):
                yield row + place, _metadata_of(item["key"], item["metadata"])
            row += len(batch)

    @staticmethod
    def _decode(rows: Any) -> Iterator[Document]:
        for row in _whole(_validated(rows)).to_pylist():
            metadata = _metadata_of(row["key"], row.pop("metadata"))
            row.pop("digest", None)
            yield Document(**{**row, "metadata": metadata})

    def position(self, key: str) -> int:
        """Index of the document named `key`.

        Raises:
            KeyError: naming a key that no document has.
            TypeError: for what is no key.
        """
        key = key if isinstance(key, str) else key_of(key)
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


def _metadata_of(key: str, text: str | None) -> dict[str, Any] | None:
    """The metadata of a document, which are kept as JSON."""
    try:
        check_json(text or "")
        metadata = None if text is None else json.loads(text)
        if not isinstance(metadata, dict | None):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise BankFormatError(f"Document {key!r}: its metadata is not JSON ({error}). {RESTORE}.") from error
    return metadata


def _validated(rows: Any) -> Any:
    """Rows of a table whose offsets and UTF-8 are safe to follow: it may have been opened without reading it."""
    try:
        rows.validate(full=True)
    except ValueError as error:
        raise BankFormatError(f"The table of documents is damaged ({error}). {RESTORE}.") from error
    return rows


def _whole(rows: Any) -> Any:
    """Rows in one piece, which are decoded in a third of the time."""
    return rows.combine_chunks() if isinstance(rows, pyarrow().Table) and len(rows) > 1 else rows


def _encoded(table: Any, visible: np.ndarray) -> bytes:
    """The rows of a table as an Arrow stream, nothing of hidden ones but their numbers: these may be damaged."""
    pa, batches, first = pyarrow(), [], 0
    for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH):
        here = visible[first : first + len(batch)]
        first += len(batch)
        if here.any():
            _validated(batch)
        if not here.all():
            places = pa.array(np.arange(len(batch)), mask=~here)
            columns = []
            for field, column in zip(batch.schema, batch.columns, strict=True):
                kept = column if pa.types.is_integer(field.type) else column.take(places)
                columns.append(kept if field.nullable or not kept.null_count else kept.fill_null(""))
            batch = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
        batches.append(batch)
    sink = pa.BufferOutputStream()
    write_batches(pa.Table.from_batches(batches, table.schema), sink)
    return bytes(sink.getvalue())
