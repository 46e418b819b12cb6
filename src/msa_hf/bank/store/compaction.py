"""Compaction: living documents are written anew without the deleted ones, small segments as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...model.memory_msa import LayerMemory
from ...model.storage_msa import pyarrow
from .buffers import Buffers
from .segments import Segment
from .state import State
from .writing import write_segment

Group = tuple[bool, list[int]]  # whether the segment is kept as it is, and the numbers of the segments


def groups_of(state: State, max_bytes: int) -> list[Group]:
    """Segments to keep, and runs of segments to write anew as one: those with deleted rows, and small ones."""
    groups: list[Group] = []
    for number, segment in enumerate(state.segments):
        start = int(state.starts[number])
        first, end = np.searchsorted(state.deleted, [start, start + len(segment)])
        large = sum(shard["bytes"] for shard in segment.record["tensors"]) >= max_bytes
        keep = bool(first == end and large and not segment.stale)
        if groups and not keep and not groups[-1][0]:
            groups[-1][1].append(number)
        else:
            groups.append((keep, [number]))
    if len(state.segments) == 1 and not len(state.deleted) and not state.segments[0].stale:
        return [(True, [0])]
    return groups


def write_compacted(
    directory: Path,
    manifest: dict[str, Any],
    state: State,
    groups: list[Group],
    max_bytes: int,
    created: list[Path],
) -> None:
    """Write what is not kept, and put segments and counts into the manifest."""
    manifest["segments"], rows, chunks, tokens = [], 0, 0, 0
    for keep, numbers in groups:
        parts = [state.segments[number] for number in numbers]
        if keep:
            table = parts[0].table
            record = {**parts[0].record, "documents": [rows, rows + len(table)]}
        else:
            merged = _merged(directory, manifest, state, numbers, rows, chunks, max_bytes, created)
            if merged is None:
                continue
            table, record = merged.table, merged.record
        manifest["segments"].append(record)
        rows, chunks = record["documents"][1], chunks + record["chunks"]
        tokens += int(table["tokens"].to_numpy().sum(dtype=np.int64))
    manifest["counts"] = {"documents": rows, "chunks": chunks, "tokens": tokens}


def _merged(
    directory: Path,
    manifest: dict[str, Any],
    state: State,
    numbers: list[int],
    row: int,
    base: int,
    max_bytes: int,
    created: list[Path],
) -> Segment | None:
    """A run of segments written as one, from row `row` and chunk `base`; None where no document of it lives."""
    parts = [state.segments[number] for number in numbers]
    tables, chunks = [], []
    for number, segment in zip(numbers, parts, strict=True):
        visible = np.ones(len(segment), bool)
        start = int(state.starts[number])
        first, end = np.searchsorted(state.deleted, [start, start + len(segment)])
        visible[state.deleted[first:end] - start] = False
        tables.append(segment.whole_table().filter(pyarrow().array(visible)))
        chunks.append(np.flatnonzero(np.repeat(visible, np.diff(segment.offsets))))
    table = pyarrow().concat_tables(tables)
    if not len(table):
        return None
    merged = Segment.of_table(table, row)
    edges = np.concatenate([[0], np.cumsum([len(item) for item in chunks])])

    def part(layer: int, first: int, end: int) -> LayerMemory:
        found = []
        for segment, mine, edge in zip(parts, chunks, edges, strict=False):
            inside = mine[max(first - edge, 0) : max(end - edge, 0)]
            if len(inside):
                found.append(segment.gather(layer, inside))
        return LayerMemory(
            torch.cat([memory.routing_keys for memory in found]), torch.cat([memory.content for memory in found])
        )

    write_segment(directory, manifest, merged, base, part, max_bytes, created)
    return merged


def compacted_in_memory(state: State, buffers: Buffers, device: torch.device) -> tuple[State, Buffers]:
    """The same for a bank that lies in memory alone."""
    visible = np.ones(state.rows, bool)
    visible[state.deleted] = False
    chunks = torch.from_numpy(np.flatnonzero(np.repeat(visible, np.diff(state.offsets)))).to(device)
    layers = {
        layer: LayerMemory(memory.routing_keys[chunks], memory.content[chunks])
        for layer, memory in buffers.view(int(state.offsets[-1])).items()
    }
    table = state.table.filter(pyarrow().array(visible)).combine_chunks()
    segments = (Segment.of_table(table, 0),) if len(table) else ()
    tokens = int(table["tokens"].to_numpy().sum(dtype=np.int64))
    counts = {"documents": len(table), "chunks": len(chunks), "tokens": tokens}
    manifest = {**state.manifest, "counts": counts, "generation": state.manifest["generation"] + 1}
    return State.of(manifest, segments, np.empty(0, np.int64)), Buffers(layers, len(chunks))
