"""Compaction: living documents are written anew without the deleted ones, small segments as one."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...model.arrow_msa import ArrowTable, concat_tables, kept_rows
from ...model.bank_format_msa import Manifest, SegmentRecord, TensorLayout, TensorPair, counts_of
from ...model.bank_writer_msa import BankWriter
from .buffers import Buffers
from .segments import Segment
from .state import State

Group = tuple[bool, list[int]]  # whether the segment is kept as it is, and the numbers of the segments


def groups_of(state: State, max_bytes: int) -> list[Group]:
    """Segments to keep, and runs of segments to write anew as one: those with deleted rows, and small ones."""
    groups: list[Group] = []
    for number, segment in enumerate(state.segments):
        large = sum(shard["bytes"] for shard in segment.record["tensors"]) >= max_bytes
        keep = large and not len(state.deleted_in(number)) and not segment.stale
        if groups and not keep and not groups[-1][0]:
            groups[-1][1].append(number)
        else:
            groups.append((keep, [number]))
    if len(state.segments) == 1 and not len(state.deleted) and not state.segments[0].stale:
        return [(True, [0])]
    return groups


def write_compacted(writer: BankWriter, manifest: Manifest, state: State, groups: list[Group], max_bytes: int) -> None:
    """Write what is not kept, and put segments and counts into the manifest."""
    records: list[SegmentRecord] = []
    tables: list[ArrowTable] = []
    rows = chunks = 0
    for keep, numbers in groups:
        if keep:
            segment = state.segments[numbers[0]]
            table, record = segment.table, segment.record
            record = {**record, "documents": [rows, rows + len(table)]}
        else:
            table = concat_tables(_living(state, number) for number in numbers)
            if not len(table):
                continue
            run = [state.segments[number] for number in numbers]
            living = [_is_living(state, number) for number in numbers]
            record = write_merged(writer, run, living, table, rows, chunks, state.layout, max_bytes)
        records.append(record)
        tables.append(table)
        rows, chunks = record["documents"][1], chunks + record["chunks"]
    manifest["segments"], manifest["counts"] = records, counts_of(tables)


def _is_living(state: State, number: int) -> NDArray[np.bool_]:
    """[rows] of segment `number`: those that are not deleted."""
    visible = np.ones(len(state.segments[number]), bool)
    visible[state.deleted_in(number)] = False
    return visible


def _living(state: State, number: int) -> ArrowTable:
    return kept_rows(state.segments[number].whole_table(), _is_living(state, number))


def write_merged(
    writer: BankWriter,
    segments: Sequence[Segment],
    living: Sequence[NDArray[np.bool_]] | None,
    table: ArrowTable,
    row: int,
    base: int,
    layout: TensorLayout,
    max_bytes: int,
) -> SegmentRecord:
    """Write a run of segments as one.

    Args:
        living: rows [rows] of each that are kept; None: all.
        table: what is kept of them.
        row, base: the first row and chunk in the bank.
    """
    chunks = [
        np.arange(segment.offsets[-1])
        if living is None
        else np.flatnonzero(np.repeat(living[number], np.diff(segment.offsets)))
        for number, segment in enumerate(segments)
    ]
    edges = np.concatenate([[0], np.cumsum([len(item) for item in chunks])])

    def part(layer: int, first: int, end: int) -> TensorPair:
        found = []
        for segment, mine, edge in zip(segments, chunks, edges, strict=False):
            inside = mine[max(first - edge, 0) : max(end - edge, 0)]
            if len(inside):
                found.append(segment.gather(layer, inside))
        keys, content = zip(*found, strict=True)
        return torch.cat(keys), torch.cat(content)

    return writer.segment(table, row, part, layout, max_bytes, lambda start: f"chunks-{base + start:010d}")


def compacted_in_memory(state: State, buffers: Buffers, device: torch.device) -> tuple[State, Buffers]:
    """The same for a bank that lies in memory alone."""
    visible = np.ones(state.rows, bool)
    visible[state.deleted] = False
    chunks = torch.from_numpy(np.flatnonzero(np.repeat(visible, np.diff(state.offsets)))).to(device)
    layers = {
        layer: (keys[chunks], content[chunks]) for layer, (keys, content) in buffers.view(state.all_chunks).items()
    }
    table = kept_rows(state.table, visible).combine_chunks()
    segments = (Segment.of_table(table, 0),) if len(table) else ()
    manifest: Manifest = {
        **state.manifest,
        "counts": counts_of([table]),
        "generation": state.manifest["generation"] + 1,
    }
    if "lineage" in manifest:
        manifest["lineage"] = uuid.uuid4().hex
    return State.of(manifest, segments, np.empty(0, np.int64)), Buffers(layers, len(chunks))
