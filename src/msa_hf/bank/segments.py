"""What lies in a bank: immutable segments, the state that one commit leaves, and the tensors in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..memory_msa import LayerMemory
from ..storage_msa import (
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

logger = logging.getLogger(__name__)
SPARE = 16  # one part in so many is left free when tensors are read
GROWTH = 5 / 4  # of a buffer that is full: appending costs a few copies of each row, spare room at most a quarter


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


@dataclass(frozen=True)
class State:
    """A bank as one commit left it. Later ones add segments and rows and leave these alone.

    Attributes:
        manifest: of the format, without segments and deletions where there is no directory.
        segments: in order.
        table: all rows.
        offsets: [R + 1] int64, chunks of the rows.
        deleted: [n] int64 rows of deleted documents, ascending.
        hidden: `deleted`, and the rows that are lost to damage.
        chunks, tokens: of the documents.
    """

    manifest: dict[str, Any]
    segments: tuple[Segment, ...]
    table: Any
    offsets: np.ndarray
    deleted: np.ndarray
    hidden: np.ndarray
    chunks: int
    tokens: int
    starts: np.ndarray = field(repr=False)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return self.rows - len(self.hidden)

    def is_hidden(self, row: int) -> bool:
        place = int(np.searchsorted(self.hidden, row))
        return place < len(self.hidden) and int(self.hidden[place]) == row

    def find(self, key: str) -> int | None:
        """The row of the document named `key`."""
        for number in range(len(self.segments) - 1, -1, -1):
            for row in self.segments[number].rows_of(key):
                if not self.is_hidden(int(self.starts[number]) + row):
                    return int(self.starts[number]) + row
        return None

    def place(self, row: int) -> tuple[Segment, int]:
        """The segment of a row, and the row in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number], row - int(self.starts[number])


class Growing:
    """An array to whose end rows are added; what was handed out before stays as it is."""

    def __init__(self, rows: Any, length: int | None = None) -> None:
        self._all = rows
        self.length = len(rows) if length is None else length

    def view(self, length: int) -> Any:
        return self._all[:length]

    def append(self, rows: Any) -> None:
        needed = self.length + len(rows)
        if needed > len(self._all):
            room = max(needed, int(len(self._all) * GROWTH))
            old = self._all
            if isinstance(old, Tensor):
                self._all = old.new_empty(room, *old.shape[1:])
            else:
                self._all = np.empty((room, *old.shape[1:]), old.dtype)
            self._all[: self.length] = old[: self.length]
        self._all[self.length : needed] = rows
        self.length = needed


class Buffers:
    """Routing keys and content of all rows, in memory: what snapshots are views of."""

    def __init__(self, layers: Mapping[int, LayerMemory], length: int) -> None:
        self._layers = {
            layer: (Growing(item.routing_keys, length), Growing(item.content, length)) for layer, item in layers.items()
        }

    @classmethod
    def load(cls, state: State, device: torch.device, dtype: torch.dtype) -> Buffers:
        """Read the tensors of a state; memory mapped on the CPU where they lie in one shard. What is lost is zero."""
        total = int(state.offsets[-1])
        room = total + total // SPARE
        layers = {}
        for layer, (groups, dim) in layer_shapes(state.manifest).items():
            shards = [(item, shard) for item in state.segments for shard in item.shards if layer in shard.layers]
            if len(shards) == 1 and shards[0][1].file is not None and device.type == "cpu":
                layers[layer] = LayerMemory(*shards[0][0].tensors(shards[0][1], layer))
                continue
            keys = torch.empty(room, groups * dim, dtype=dtype, device=device)
            content = torch.empty(room, 2, groups, dim, dtype=dtype, device=device)
            for segment, start in zip(state.segments, state.offsets[state.starts].tolist(), strict=True):
                for shard in segment.shards:
                    if layer not in shard.layers:
                        continue
                    rows = slice(start + shard.first, start + shard.end)
                    if shard.file is None:
                        keys[rows], content[rows] = 0, 0
                    else:
                        keys[rows], content[rows] = segment.tensors(shard, layer)
            layers[layer] = LayerMemory(keys, content)
        return cls(layers, total)

    def append(self, layers: Mapping[int, LayerMemory]) -> None:
        for layer, memory in layers.items():
            keys, content = self._layers[layer]
            keys.append(memory.routing_keys)
            content.append(memory.content)

    @property
    def length(self) -> int:
        return next(iter(self._layers.values()))[0].length

    def view(self, chunks: int) -> dict[int, LayerMemory]:
        """The first chunks."""
        return {
            layer: LayerMemory(keys.view(chunks), content.view(chunks))
            for layer, (keys, content) in self._layers.items()
        }
