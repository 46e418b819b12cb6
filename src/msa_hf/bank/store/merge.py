"""Merging: small segments and small files of deletions are put together as they come, as log-structured stores do.

Rows keep their numbers and their order: only neighbors are merged, and deleted rows stay until the bank is compacted.
Files of about one size become one of the next size once there are `FAN_IN` of them, so that every row is written again
once per size, and there are few files of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...model.arrow_msa import concat_tables
from ...model.bank_format_msa import DeletionsRecord, Manifest, SegmentRecord
from ...model.bank_reader_msa import BankReader
from ...model.bank_writer_msa import BankWriter
from .commit import renewed_records
from .compact import write_merged
from .deleted_keys import newest
from .segments import Segment
from .state import State

LOG_COMMITS = 64  # that a log has before they are put together
FAN_IN = 8
LARGEST = 2**28  # bytes of a segment that was put together: what a commit may have to write again
SMALLEST = 2**16  # bytes; what is smaller counts as one size


def merge_start(sizes: Sequence[int], fresh: int, most: int) -> int:
    """The first of those files that are put together.

    Args:
        sizes: bytes of each, in order.
        fresh: how many of the last ones were not looked at before.
        most: bytes that one is to have; larger ones stay as they are.

    Returns:
        the start of a run up to the end, of two files or more; the number of files if nothing is to be done.
    """
    start, total = len(sizes), 0
    while start > len(sizes) - fresh and sizes[start - 1] < most // FAN_IN and total + sizes[start - 1] <= most:
        start, total = start - 1, total + sizes[start - 1]
    while start and start < len(sizes):
        level, first, more = _level(total), start, 0
        while first and _level(sizes[first - 1]) <= level and total + more + sizes[first - 1] <= most:
            first, more = first - 1, more + sizes[first - 1]
        # Of the largest size there may be fewer: what they make is as large as files become.
        if start - first < FAN_IN - 1 and total + more < most // 2:
            break
        if first == start:
            break
        start, total = first, total + more
    return start if start < len(sizes) - 1 else len(sizes)


def _level(size: int) -> int:
    level = 0
    while size > SMALLEST:
        size, level = size // FAN_IN, level + 1
    return level


def segment_bytes(record: SegmentRecord) -> int:
    """Bytes of a segment's tensors and table."""
    return sum(shard["bytes"] for shard in record["tensors"]) + record["table"]["bytes"]


def segments_to_merge(state: State, before: Manifest, most: int) -> list[int]:
    """Numbers of the segments that are put together now, a run up to the last one; empty if none are.

    Args:
        before: the manifest that lies in the directory, without the commits since.
        most: bytes of tensors per file.
    """
    sizes = [segment_bytes(segment.record) for segment in state.segments]
    fresh = len(sizes) - (len(before["segments"]) if "lineage" in before else 0)  # earlier formats put none together
    return list(range(merge_start(sizes, fresh, min(most, LARGEST)), len(sizes)))


def write_checkpoint(
    writer: BankWriter,
    manifest: Manifest,
    state: State,
    reader: BankReader,
    before: Manifest,
    numbers: list[int],
    most: int,
) -> None:
    """Write a run of segments as one, and deletions of about one size as one; put the records into the manifest.

    Args:
        before: the manifest that lies in the directory, without the commits since.
        numbers: of the segments, up to the last one; all of them are intact.
        most: bytes of tensors per file.
    """
    kept = state.segments[: numbers[0]] if numbers else state.segments
    records = renewed_records(writer, kept)
    if numbers:
        run = [state.segments[number] for number in numbers]
        table = concat_tables(segment.whole_table() for segment in run)
        first, base = int(state.starts[numbers[0]]), int(state.offsets[state.starts[numbers[0]]])
        records.append(write_merged(writer, run, None, table, first, base, state.layout, most))
    manifest["segments"] = records
    manifest["deletions"] = _merged_deletions(writer, manifest, reader, before)


def _merged_deletions(
    writer: BankWriter, manifest: Manifest, reader: BankReader, before: Manifest
) -> list[DeletionsRecord]:
    records, watermark = manifest["deletions"], manifest.get("watermark")
    forgets = watermark is not None and watermark != before.get("watermark")
    fresh = len(records) - (len(before["deletions"]) if "lineage" in before else 0)
    start = 0 if forgets else merge_start([record["bytes"] for record in records], fresh, 2**62)
    if start >= len(records):
        return records
    rows, keys = zip(*(reader.deletions_file(record) for record in records[start:]), strict=True)
    kept = newest(np.concatenate(keys))
    if watermark is not None:
        kept = kept[kept[:, 2] > np.uint64(watermark)]
    joined = np.sort(np.concatenate(rows))
    if not len(joined) and not len(kept):
        return records[:start]
    return [*records[:start], writer.deletions(manifest["generation"], joined, kept)]


def merged_in_memory(state: State) -> State:
    """The same for a bank that lies in memory alone, whose tensors are in one place anyway."""
    sizes = [segment.table.nbytes for segment in state.segments]
    start = merge_start(sizes, min(LOG_COMMITS, len(sizes)), 2**62)
    if start >= len(sizes):
        return state
    table = concat_tables(segment.table for segment in state.segments[start:]).combine_chunks()
    segments = (*state.segments[:start], Segment.of_table(table, int(state.starts[start])))
    return state.merged(state.manifest, segments)
