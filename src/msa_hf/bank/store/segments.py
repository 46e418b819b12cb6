"""The rows that one commit added, in files that never change, and what is lost where such a file is damaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...model.arrow_msa import DIGEST_BYTES, ArrowField, ArrowTable, TableRow, numbers_of, pyarrow, table_schema
from ...model.bank_format_msa import (
    INDEX_ENTRY,
    BankFormatError,
    KeyHash,
    SegmentRecord,
    TensorPair,
    format_error,
    index_of,
    key_hash,
)
from ...model.bank_reader_msa import BankReader
from ...model.open_files_msa import TensorFile
from ...model.shard_msa import Shard, shard_layers

Rows = NDArray[np.int64]
NO_ROWS = np.empty(0, np.int64)
NO_INDEX = np.empty((3, 0), np.uint64)


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written.

    Attributes:
        file: its name.
        cause: what was found.
        keys: of the documents that are left out for it; None for those whose names went with the file.
        documents: how many these are; 0 where the file could be done without.
        unreadable: it could not be read now, for want of descriptors, permission or a working disk: nothing is left
            out for that.
    """

    file: str
    cause: str
    keys: tuple[str | None, ...] = ()
    unreadable: bool = False

    @property
    def documents(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Loss:
    """A file of a segment, what is wrong with it, and the rows of the segment that are lost for it."""

    file: str
    cause: str
    rows: Rows


class Segment:
    """The rows that one commit added.

    Attributes:
        record: what the manifest says of it.
        table: the rows, with the columns of format version 2.
        path: of the table's file, for messages.
        index: see `index_of`.
        offsets: [rows + 1] int64, chunks counted within the segment.
        shards: where the tensors lie, likewise counted; none in a bank without a directory.
        lost: [rows] bool, rows whose table or tensors are damaged.
        stale: a part was made anew that the directory does not have: a table of format version 1, an index.
        nameless: the table is lost, and with it all keys.
    """

    def __init__(self, record: SegmentRecord, table: ArrowTable, path: Path, stale: bool = False) -> None:
        self.record = record
        self.table = table
        self.path = path
        self.index: NDArray[np.uint64] = NO_INDEX
        self.stale = stale
        self.nameless = False
        self.shards: list[Shard] = []
        self.offsets: NDArray[np.int64] = np.concatenate([[0], numbers_of(table, "chunks").cumsum()])
        self.lost = np.zeros(len(table), bool)

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def of_table(cls, table: ArrowTable, first: int) -> Segment:
        """A segment from row `first` of a bank that lies in memory alone."""
        record: SegmentRecord = {
            "documents": [first, first + len(table)],
            "chunks": 0,
            "tensors": [],
            "table": {"file": "memory", "bytes": 0, "sha256": ""},
        }
        segment = cls(record, table, Path("memory"))
        segment.index = index_of(table["key"].to_pylist())
        record["chunks"] = int(segment.offsets[-1])
        return segment

    @classmethod
    def of_commit(cls, table: ArrowTable, record: SegmentRecord, reader: BankReader) -> Segment:
        """The segment that this process has just written to a directory, of the table that it wrote."""
        segment = cls(record, table, reader.directory / record["table"]["file"])
        segment.index = index_of(table["key"].to_pylist())
        for item in record["tensors"]:
            first, end = item["chunks"]
            file = TensorFile(reader.directory / item["file"])
            segment.shards.append(Shard(first, end, shard_layers(item, reader.layout), file))
        return segment

    @classmethod
    def open(cls, reader: BankReader, record: SegmentRecord, mapped: bool = True) -> tuple[Segment, list[Loss]]:
        """Open the files of a segment, its table memory mapped or read; what is damaged is left out and told.

        The documents of format version 1, which have no ids, get the numbers of their rows.
        """
        losses: list[Loss] = []
        first, end = record["documents"]
        path = reader.directory / record["table"]["file"]
        tensors = replace(reader, verify=False)  # which decide about no key, version or id
        stale = reader.manifest["format_version"] == 1
        try:
            if stale:
                table = with_ids(replace(reader, verify=True).segment_table(record, mapped), np.arange(first, end))
            else:
                table = reader.segment_table(record, mapped)
            segment = cls(record, table, path, stale)
        except BankFormatError as error:
            segment = cls.unreadable(record, path)
            with suppress(BankFormatError):  # which says at least what is lost
                segment.index = reader.segment_index(record)
            losses.append(Loss(path.name, str(error), segment.lose_rows(0, end - first)))
        else:
            if stale:
                segment.rebuild_index()
            else:
                try:
                    segment.index = reader.segment_index(record)
                except BankFormatError as error:
                    segment.rebuild_index()
                    losses.append(Loss(record["index"]["file"], str(error), NO_ROWS))
        for item in record["tensors"]:
            try:
                shard = tensors.shard(item)
            except BankFormatError as error:
                start, stop = item["chunks"]
                shard = Shard(start, stop, shard_layers(item, reader.layout), None)
                losses.append(Loss(item["file"], str(error), segment.lose_chunks(start, stop)))
            segment.shards.append(shard)
        return segment, losses

    @classmethod
    def unreadable(cls, record: SegmentRecord, path: Path) -> Segment:
        """A segment whose table is lost: as many rows, none of which is ever looked at.

        What they have in common, zeros, lies in memory once, and in pages that nobody touches.
        """
        first, end = record["documents"]
        if "index" not in record or (rows := end - first) * INDEX_ENTRY != record["index"]["bytes"]:
            raise format_error(path, "cannot be read, and with it is lost what a bank of format version 1 has of ids")
        pa, schema = pyarrow(), table_schema(2)
        try:
            chunks = np.ones(rows, np.int32)
            chunks[-1] += record["chunks"] - rows
        except OverflowError as error:
            raise format_error(path, f"cannot be read, and {record['chunks']} chunks are too many for it") from error
        zeros = pa.py_buffer(np.zeros(DIGEST_BYTES * rows + 8, np.uint8))

        def nothing(field: ArrowField) -> object:
            validity = zeros if field.nullable else None
            wide = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            return pa.Array.from_buffers(field.type, rows, [validity, zeros, *([zeros] if wide else [])])

        columns = [nothing(field) for field in schema]
        names = [field.name for field in schema]
        columns[names.index("chunks")] = pa.array(chunks)
        columns[names.index("id")] = pa.array(np.full(rows, -1))
        segment = cls(record, pa.table(columns, schema=schema), path)
        segment.nameless = True
        return segment

    def _damaged(self, error: ValueError, row: int | None = None) -> BankFormatError:
        where = "" if row is None else f"in row {row} "
        return format_error(self.path, f"is damaged {where}({error})")

    def whole_table(self) -> ArrowTable:
        """The table, every row of it safe to follow."""
        try:
            self.table.validate(full=True)
        except ValueError as error:
            raise self._damaged(error) from error
        return self.table

    def rebuild_index(self) -> None:
        """Make the index from the table."""
        self.index, self.stale = index_of(self.whole_table()["key"].to_pylist()), True

    def lose_chunks(self, first: int, end: int) -> Rows:
        """Mark the documents that have chunks in [first, end) as lost; returns the rows that were not."""
        # Shards hold whole documents; where one does not, the documents at its edges are lost as well.
        start = int(np.searchsorted(self.offsets, first, side="right")) - 1
        stop = int(np.searchsorted(self.offsets, end, side="left"))
        return self.lose_rows(start, stop)

    def lose_rows(self, start: int, stop: int) -> Rows:
        """Mark rows as lost; returns those that were not."""
        fresh = np.flatnonzero(~self.lost[start:stop]) + start
        self.lost[start:stop] = True
        return fresh

    def key(self, row: int) -> str | None:
        """The key of a row, None if it cannot be read, or is not the one that the index has for the row."""
        try:
            key = self.fields(row, ["key"])["key"]
        except BankFormatError:
            return None
        return key if row in self._indexed(key_hash(key)) else None

    def fields(self, row: int, columns: Sequence[str]) -> TableRow:
        """Some columns of a row.

        Raises:
            BankFormatError: if what the table says there cannot be followed.
        """
        part = self.table.select(columns).slice(row, 1)
        try:
            part.validate(full=True)
            return part.to_pylist()[0]
        except ValueError as error:
            raise self._damaged(error, row) from error

    def rows_of(self, key: str, hashed: KeyHash) -> Iterator[int]:
        """Rows that have this key, of which this is the hash; lost ones left out."""
        for row in self._indexed(hashed):
            if row < len(self) and not self.lost[row] and self.fields(row, ["key"])["key"] == key:
                yield row

    def lost_rows_of(self, hashed: KeyHash) -> Rows:
        """Rows that are lost and have a key of this hash."""
        return np.array([row for row in self._indexed(hashed) if row < len(self) and self.lost[row]], np.int64)

    def _indexed(self, hashed: KeyHash) -> list[int]:
        """Rows that the index has for the hash of a key."""
        found: list[int] = []
        halves = self.index[0]
        place = int(np.searchsorted(halves, np.uint64(hashed[0])))
        while place < len(halves) and int(halves[place]) == hashed[0]:
            if int(self.index[1, place]) == hashed[1]:
                found.append(int(self.index[2, place]))
            place += 1
        return found

    def gather(self, layer: int, chunks: NDArray[np.int64]) -> TensorPair:
        """Copies of some chunks of a layer, ascending: routing keys and content."""
        keys: list[Tensor] = []
        content: list[Tensor] = []
        for shard in self.shards:
            mine = chunks[(chunks >= shard.first) & (chunks < shard.end)] - shard.first
            if layer in shard.layers and len(mine):
                index = torch.from_numpy(mine)
                for column, tensor in zip((keys, content), shard.tensors(layer), strict=True):
                    column.append(tensor[index])
        return torch.cat(keys), torch.cat(content)


def with_ids(table: ArrowTable, ids: NDArray[np.int64]) -> ArrowTable:
    """A table of format version 1 with the columns of version 2."""
    pa, schema = pyarrow(), table_schema(2)
    for name in ("id", "version", "digest"):
        kind = schema.field(name).type
        column = pa.array(ids, kind) if name == "id" else pa.nulls(len(table), kind)
        table = table.append_column(schema.field(name), column)
    return table.cast(schema)


def damage_of(segment: Segment, loss: Loss, deleted: NDArray[np.int64]) -> Damage:
    """A loss in terms of documents: of what was deleted nothing is lost."""
    lost = loss.rows[~np.isin(loss.rows + segment.record["documents"][0], deleted)]
    keys = (None,) * len(lost) if segment.nameless else tuple(segment.key(row) for row in lost.tolist())
    return Damage(loss.file, loss.cause, keys)
