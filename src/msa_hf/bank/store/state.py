"""A bank as one commit left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ...model.arrow_msa import ArrowTable, concat_tables, numbers_of, pyarrow, table_schema
from ...model.bank_format_msa import Manifest, TensorLayout
from .buffers import GrowableArray
from .segments import Segment

Rows = NDArray[np.int64]


class BankStat(TypedDict):
    """Numbers about a bank that changes.

    Attributes:
        documents, chunks, tokens: of what is there.
        deleted, damaged: rows that are hidden.
        segments: runs of rows, each of one commit.
        generation: commits so far.
        next_id: of the next new document.
        remembered_deletions: deleted keys whose versions are known.
        bytes: of all data files.
        indexes: what is kept for searching, by name, as JSON values.
    """

    documents: int
    deleted: int
    damaged: int
    chunks: int
    tokens: int
    segments: int
    generation: int
    next_id: int
    remembered_deletions: int
    bytes: int
    indexes: dict[str, Mapping[str, object]]


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

    manifest: Manifest
    segments: tuple[Segment, ...]
    table: ArrowTable
    offsets: Rows
    deleted: Rows
    hidden: Rows
    chunks: int
    tokens: int
    starts: Rows = field(repr=False)
    _growing: GrowableArray[Rows] = field(repr=False)  # whose view `offsets` is; the next state's too

    @classmethod
    def of(cls, manifest: Manifest, segments: tuple[Segment, ...], deleted: Rows) -> State:
        """The state of a bank that was opened or written anew."""
        table = concat_tables([table_schema(2).empty_table(), *(item.table for item in segments)])
        growing = GrowableArray(np.zeros(1, np.int64))
        offsets = _grown(growing, segments)
        starts = _starts(segments)
        hidden = _hidden(segments, deleted)
        visible = np.ones(len(offsets) - 1, bool)
        visible[hidden] = False
        chunks = int(np.diff(offsets)[visible].sum())
        tokens = int(numbers_of(table, "tokens")[visible].sum())
        return cls(manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, growing)

    def followed_by(self, manifest: Manifest, segments: tuple[Segment, ...], deleted: Rows) -> State:
        """The state after a commit that deleted rows and added one segment or none, at the cost of these alone."""
        fresh = segments[len(self.segments) :]
        table = concat_tables([self.table, *(item.table for item in fresh)]) if fresh else self.table
        offsets = _grown(self._growing, fresh)
        starts = _starts(segments)
        hidden = _hidden(segments, deleted)
        gone = np.setdiff1d(hidden, self.hidden, assume_unique=True)
        chunks, tokens = self.chunks, self.tokens
        for item in fresh:
            chunks += int(item.offsets[-1])
            tokens += int(numbers_of(item.table, "tokens").sum())
        chunks -= int((offsets[gone + 1] - offsets[gone]).sum())
        tokens -= int(table["tokens"].take(pyarrow().array(gone)).to_numpy().sum(dtype=np.int64)) if len(gone) else 0
        return State(manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, self._growing)

    @property
    def layout(self) -> TensorLayout:
        return TensorLayout.of_manifest(self.manifest)

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def all_chunks(self) -> int:
        """Chunks of all rows, those of hidden ones too."""
        return int(self.offsets[-1])

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

    def deleted_in(self, number: int) -> Rows:
        """Rows of segment `number` that are deleted, counted within it."""
        start = int(self.starts[number])
        first, end = np.searchsorted(self.deleted, [start, start + len(self.segments[number])])
        return self.deleted[first:end] - start


def _starts(segments: tuple[Segment, ...]) -> Rows:
    return np.array([item.record["documents"][0] for item in segments], np.int64)


def _grown(offsets: GrowableArray[Rows], segments: tuple[Segment, ...]) -> Rows:
    """The offsets after those of further segments were appended."""
    for item in segments:
        offsets.append(item.offsets[1:] + offsets.view(offsets.length)[-1])
    return offsets.view(offsets.length)


def _hidden(segments: tuple[Segment, ...], deleted: Rows) -> Rows:
    """Rows that are deleted or lost."""
    if not any(item.lost.any() for item in segments):
        return deleted
    hidden = np.concatenate([item.lost for item in segments])
    hidden[deleted] = True
    return np.flatnonzero(hidden)
