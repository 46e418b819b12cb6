"""A bank as one commit left it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ...model.arrow_msa import ArrowTable, concat_tables, numbers_of, pyarrow, table_schema
from ...model.bank_format_msa import KeyHash, Manifest, TensorLayout, key_hash
from .buffers import GrowableArray
from .segments import Segment

Rows = NDArray[np.int64]
FEW_ROWS = 256  # a segment of at most so many is searched through a dictionary


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
        indexed: how many of the first segments are searched by their indices; later ones are few rows, whose keys are
            in `_recent`.
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
    indexed: int
    _growing: GrowableArray[Rows] = field(repr=False)  # whose view `offsets` is; the next state's too
    _recent: dict[KeyHash, list[int]] = field(repr=False)  # rows that a later state added are in it as well

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
        indexed = len(segments)
        while indexed and len(segments[indexed - 1]) <= FEW_ROWS:
            indexed -= 1
        recent: dict[KeyHash, list[int]] = {}
        _remember(recent, segments[indexed:], starts[indexed:])
        return cls(
            manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, indexed, growing, recent
        )

    def followed_by(self, manifest: Manifest, segments: tuple[Segment, ...], gone: Rows) -> State:
        """The state after a commit that deleted rows `gone`, ascending, and added one segment or none.

        It costs what the commit changes; of the rest, an array of deleted rows is copied if it deletes any.
        """
        fresh = segments[len(self.segments) :]
        table = concat_tables([self.table, *(item.table for item in fresh)]) if fresh else self.table
        offsets = _grown(self._growing, fresh)
        starts = _starts(segments)
        deleted = hidden = self.deleted
        if len(gone):
            deleted = np.insert(self.deleted, np.searchsorted(self.deleted, gone), gone)
        hidden = deleted
        if len(self.hidden) > len(self.deleted) or any(item.lost.any() for item in fresh):
            hidden = _hidden(segments, deleted)
        chunks, tokens = self.chunks, self.tokens
        for item in fresh:
            chunks += int(item.offsets[-1])
            tokens += int(numbers_of(item.table, "tokens").sum())
        there = gone[[not self.is_hidden(row) for row in gone.tolist()]] if len(gone) else gone
        chunks -= int((offsets[there + 1] - offsets[there]).sum())
        tokens -= self._tokens_of(there)
        indexed, recent = self.indexed, self._recent
        for number, item in enumerate(fresh, start=len(self.segments)):
            if len(item) > FEW_ROWS:
                indexed, recent = number + 1, {}  # earlier states keep the old one
        first = max(indexed, len(self.segments))
        _remember(recent, segments[first:], starts[first:])
        return State(
            manifest, segments, table, offsets, deleted, hidden, chunks, tokens, starts, indexed, self._growing, recent
        )

    def merged(self, manifest: Manifest, segments: tuple[Segment, ...]) -> State:
        """The same rows in other segments."""
        return replace(
            self,
            manifest=manifest,
            segments=segments,
            table=concat_tables([table_schema(2).empty_table(), *(item.table for item in segments)]),
            starts=_starts(segments),
            indexed=len(segments),
            _recent={},
        )

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
        hashed = key_hash(key)
        for row in reversed(self._recent.get(hashed, ())):
            if row < self.rows and not self.is_hidden(row):
                segment, place = self.place(row)
                if segment.fields(place, ["key"])["key"] == key:
                    return row
        for number in range(self.indexed - 1, -1, -1):
            for row in self.segments[number].rows_of(key, hashed):
                if not self.is_hidden(int(self.starts[number]) + row):
                    return int(self.starts[number]) + row
        return None

    def may_have_lost(self, key: str) -> bool:
        """Tell whether a document named `key` may be among those that are lost to damage."""
        if len(self.hidden) == len(self.deleted):
            return False
        hashed = key_hash(key)
        for segment, start in zip(self.segments, self.starts.tolist(), strict=True):
            known = segment.index.shape[1] > 0
            lost = segment.lost_rows_of(hashed) if known else np.flatnonzero(segment.lost)
            if len(np.setdiff1d(start + lost, self.deleted)):
                return True
        return False

    def _tokens_of(self, rows: Rows) -> int:
        """Tokens of the documents in some rows, ascending."""
        total = 0
        edges = np.searchsorted(rows, [*self.starts, self.rows])
        for number in np.flatnonzero(np.diff(edges)).tolist():
            inside = rows[edges[number] : edges[number + 1]] - self.starts[number]
            column = self.segments[number].table["tokens"]
            total += int(column.take(pyarrow().array(inside)).to_numpy().sum(dtype=np.int64))
        return total

    def place(self, row: int) -> tuple[Segment, int]:
        """The segment of a row, and the row in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.segments[number], row - int(self.starts[number])

    def deleted_in(self, number: int) -> Rows:
        """Rows of segment `number` that are deleted, counted within it."""
        start = int(self.starts[number])
        first, end = np.searchsorted(self.deleted, [start, start + len(self.segments[number])])
        return self.deleted[first:end] - start


def _remember(recent: dict[KeyHash, list[int]], segments: tuple[Segment, ...], starts: Rows) -> None:
    """Add the keys of segments, by hash, with their rows."""
    for segment, start in zip(segments, starts.tolist(), strict=True):
        for first, second, row in segment.index.T.tolist():
            recent.setdefault((first, second), []).append(start + row)


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
