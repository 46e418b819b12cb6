"""A bank as one commit left it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...model.storage_msa import pyarrow, table_schema
from .growable_array import GrowableArray
from .segments import Segment


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
        starts: [segments] int64, the first row of each.
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
    _growing: GrowableArray = field(repr=False)  # whose view `offsets` is; the next state's too

    @classmethod
    def of(cls, manifest: dict[str, Any], segments: tuple[Segment, ...], deleted: np.ndarray) -> State:
        """The state of a bank that was opened or written anew."""
        table = pyarrow().concat_tables([table_schema(2).empty_table(), *(item.table for item in segments)])
        growing = GrowableArray(np.zeros(1, np.int64))
        offsets = _grown(growing, segments)
        starts = _starts(segments)
        hidden = _hidden(segments, starts, deleted)
        visible = np.ones(len(offsets) - 1, bool)
        visible[hidden] = False
        chunks = int(np.diff(offsets)[visible].sum())
        tokens = int(table["tokens"].to_numpy()[visible].sum(dtype=np.int64))
        return cls(manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, growing)

    def followed_by(self, manifest: dict[str, Any], segments: tuple[Segment, ...], deleted: np.ndarray) -> State:
        """The state after a commit that deleted rows and added one segment or none, at the cost of these alone."""
        fresh = segments[len(self.segments) :]
        table = pyarrow().concat_tables([self.table, *(item.table for item in fresh)]) if fresh else self.table
        offsets = _grown(self._growing, fresh)
        starts = _starts(segments)
        hidden = _hidden(segments, starts, deleted)
        gone = np.setdiff1d(hidden, self.hidden, assume_unique=True)
        chunks, tokens = self.chunks, self.tokens
        for item in fresh:
            chunks += int(item.offsets[-1])
            tokens += int(item.table["tokens"].to_numpy().sum(dtype=np.int64))
        chunks -= int((offsets[gone + 1] - offsets[gone]).sum())
        tokens -= int(table["tokens"].take(pyarrow().array(gone)).to_numpy().sum(dtype=np.int64)) if len(gone) else 0
        return State(manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, self._growing)

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


def _starts(segments: tuple[Segment, ...]) -> np.ndarray:
    return np.array([item.record["documents"][0] for item in segments], np.int64)


def _grown(offsets: GrowableArray, segments: tuple[Segment, ...]) -> np.ndarray:
    """The offsets after those of further segments were appended."""
    for item in segments:
        offsets.append(item.offsets[1:] + offsets.view(offsets.length)[-1])
    return offsets.view(offsets.length)


def _hidden(segments: tuple[Segment, ...], starts: np.ndarray, deleted: np.ndarray) -> np.ndarray:
    """Rows that are deleted or lost."""
    lost = [np.flatnonzero(item.lost) + start for item, start in zip(segments, starts, strict=True) if item.lost.any()]
    return np.union1d(deleted, np.concatenate(lost)) if lost else deleted
