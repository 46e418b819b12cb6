"""The rows that one commit added, in files that never change, and what is lost where such a file is damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...model.memory_msa import LayerMemory
from ...model.storage_msa import (
    INDEX_ENTRY,
    BankFormatError,
    check_shard,
    checked_file,
    index_payload,
    key_hash,
    layer_shapes,
    open_table,
    pyarrow,
    shard_layers,
    table_schema,
)


@dataclass(frozen=True)
class Damage:
    """A file that is not what was written.

    Attributes:
        file: its name.
        cause: what was found.
        keys: of the documents that are left out for it; None for those whose names went with the file.
        documents: how many these are; 0 where the file could be done without.
    """

    file: str
    cause: str
    keys: tuple[str | None, ...] = ()

    @property
    def documents(self) -> int:
        return len(self.keys)


@dataclass
class Shard:
    """Tensors of a run of chunks, in one file that is opened once: others may remove it meanwhile."""

    first: int
    end: int
    layers: list[int]
    file: Any  # None: damaged


Loss = tuple[str, str, list[int]]  # a file, what is wrong with it, the rows of its segment that are lost for it


class Segment:
    """The rows that one commit added.

    Attributes:
        record: what the manifest says of it.
        table: their `pyarrow.Table`, with the columns of format version 2.
        offsets: [rows + 1] int64, chunks counted within the segment.
        shards: where the tensors lie; none in a bank without a directory.
        lost: [rows] bool, rows whose table or tensors are damaged.
        stale: whether a part was made anew that the directory does not have: a table of format version 1, an index.
    """

    def __init__(self, record: dict[str, Any], table: Any, index: np.ndarray, stale: bool = False) -> None:
        self.record = record
        self.table = table
        self.index = index
        self.stale = stale
        self.shards: list[Shard] = []
        counts = table["chunks"].to_numpy().astype(np.int64)
        if len(counts) and counts.min() < 1:
            raise BankFormatError(f"{record['table']['file']}: a document without chunks.")
        self.offsets = np.concatenate([[0], counts.cumsum()])
        self.lost = np.zeros(len(table), bool)

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def of_table(cls, table: Any, first: int) -> Segment:
        """A segment from row `first` of the bank, of which no file is written yet."""
        record = {"documents": [first, first + len(table)], "chunks": 0, "tensors": [], "table": {"file": "memory"}}
        index = np.frombuffer(index_payload(table["key"].to_pylist()), "<u8").reshape(3, -1)
        segment = cls(record, table, index)
        record["chunks"] = int(segment.offsets[-1])
        return segment

    @classmethod
    def open(cls, directory: Path, record: dict[str, Any], manifest: Mapping[str, Any]) -> tuple[Segment, list[Loss]]:
        """Map the files of a segment; what cannot be read is left out and told.

        The documents of format version 1, which have no ids, get the numbers of their rows.
        """
        losses: list[Loss] = []
        version = manifest["format_version"]
        first, end = record["documents"]
        stale = version == 1
        try:
            table = open_table(directory, record, version, verify=stale)
            if stale:
                table = with_ids(table, np.arange(first, end))
            segment = cls(record, table, np.empty((3, 0), np.uint64), stale)
        except BankFormatError as error:
            segment = cls.unreadable(record)
            losses.append((record["table"]["file"], str(error), segment.lose_rows(0, end - first)))
        else:
            try:
                if stale:
                    raise BankFormatError("format version 1 has no index")
                path = checked_file(directory, record["index"], verify=False)
                index = np.memmap(path, "<u8", "r").view(np.ndarray)
                segment.index = index.reshape(INDEX_ENTRY // 8, -1)
            except (BankFormatError, OSError, ValueError) as error:
                segment.rebuild_index()
                if not stale:
                    losses.append((record["index"]["file"], str(error), []))
        for shard in record["tensors"]:
            file = None
            try:
                path = check_shard(directory, shard, manifest, verify=False)
                file = safe_open(path, framework="pt")
            except (BankFormatError, OSError) as error:
                losses.append((shard["file"], str(error), segment.lose_chunks(*shard["chunks"])))
            (start, stop), layers = shard["chunks"], shard_layers(shard, layer_shapes(manifest))
            segment.shards.append(Shard(start, stop, layers, file))
        return segment, losses

    @classmethod
    def unreadable(cls, record: dict[str, Any]) -> Segment:
        """A segment whose table is lost: as many rows, none of which is ever looked at."""
        first, end = record["documents"]
        if (rows := end - first) * INDEX_ENTRY != record.get("index", {}).get("bytes"):
            raise BankFormatError(f"{record['table']['file']} is lost, and with it a bank of format version 1.")
        pa, schema = pyarrow(), table_schema(2)
        chunks = np.ones(rows, np.int64)
        chunks[-1] += record["chunks"] - rows
        columns = {field.name: pa.nulls(rows, field.type) for field in schema}
        columns |= {"chunks": pa.array(chunks), "tokens": pa.array(np.zeros(rows, np.int64))}
        columns |= {"key": pa.repeat("", rows), "id": pa.array(np.full(rows, -1))}
        table = pa.table(columns).cast(schema)
        return cls(record, table, np.empty((3, 0), np.uint64))

    def whole_table(self) -> Any:
        """The table, every row of it safe to follow."""
        try:
            self.table.validate(full=True)
        except ValueError as error:
            raise BankFormatError(f"{self.record['table']['file']} is damaged ({error}).") from error
        return self.table

    def rebuild_index(self) -> None:
        """Make the index from the table."""
        payload = index_payload(self.whole_table()["key"].to_pylist())
        self.index, self.stale = np.frombuffer(payload, "<u8").reshape(3, -1), True

    def lose_chunks(self, first: int, end: int) -> list[int]:
        """Mark the documents that have chunks in [first, end) as lost; returns the rows that were not."""
        # Shards hold whole documents; where one does not, the documents at its edges are lost as well.
        start = int(np.searchsorted(self.offsets, first, side="right")) - 1
        stop = int(np.searchsorted(self.offsets, end, side="left"))
        return self.lose_rows(start, stop)

    def lose_rows(self, start: int, stop: int) -> list[int]:
        """Mark rows as lost; returns those that were not."""
        fresh = [row for row in range(start, stop) if not self.lost[row]]
        self.lost[start:stop] = True
        return fresh

    def key(self, row: int) -> str | None:
        """The key of a row, None where it cannot be read."""
        try:
            return self.fields(row, ["key"])["key"] or None
        except ValueError:
            return None

    def fields(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Some columns of a row.

        Raises:
            ValueError: where what the table says there cannot be followed.
        """
        part = self.table.select(columns).slice(row, 1)
        part.validate(full=True)
        return part.to_pylist()[0]

    def rows_of(self, key: str) -> Iterator[int]:
        """Rows that have this key, lost ones left out."""
        first, second = key_hash(key)
        halves = self.index[0]
        place = int(np.searchsorted(halves, np.uint64(first)))
        while place < len(halves) and int(halves[place]) == first:
            row = int(self.index[2, place])
            if int(self.index[1, place]) == second and row < len(self) and not self.lost[row]:
                try:
                    if self.fields(row, ["key"])["key"] == key:
                        yield row
                except ValueError as error:
                    raise BankFormatError(f"{self.record['table']['file']}: row {row}: {error}.") from error
            place += 1

    def tensors(self, shard: Shard, layer: int) -> tuple[Tensor, Tensor]:
        """Routing keys and content of a layer in a shard, memory mapped."""
        return (
            shard.file.get_tensor(f"layers.{layer}.routing_keys"),
            shard.file.get_tensor(f"layers.{layer}.content"),
        )

    def gather(self, layer: int, chunks: np.ndarray) -> LayerMemory:
        """Copies of some chunks of a layer, ascending."""
        parts = []
        for shard in self.shards:
            mine = chunks[(chunks >= shard.first) & (chunks < shard.end)] - shard.first
            if layer in shard.layers and len(mine):
                index = torch.from_numpy(mine)
                parts.append([tensor[index] for tensor in self.tensors(shard, layer)])
        keys, content = (torch.cat(column) for column in zip(*parts, strict=True))
        return LayerMemory(keys, content)


def with_ids(table: Any, ids: np.ndarray) -> Any:
    """A table of format version 1 with the columns of version 2."""
    pa, schema = pyarrow(), table_schema(2)
    for name in ("id", "version", "digest"):
        kind = schema.field(name).type
        column = pa.array(ids, kind) if name == "id" else pa.nulls(len(table), kind)
        table = table.append_column(schema.field(name), column)
    return table.cast(schema)


def damage_of(segment: Segment, loss: Loss, deleted: np.ndarray) -> Damage:
    """A loss in terms of documents: of what was deleted nothing is lost."""
    file, cause, rows = loss
    gone = set(deleted.tolist())
    start = segment.record["documents"][0]
    return Damage(file, cause, tuple(segment.key(row) for row in rows if start + row not in gone))
