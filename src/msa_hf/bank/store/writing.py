"""The files of a commit: segments and deletions. Each is written once; the manifest makes it a part of the bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...model.memory_msa import LayerMemory
from ...model.storage_msa import DTYPES, chunk_ranges, deletions_payload, index_payload, publish_file
from .segments import Segment


def write_segment(
    directory: Path,
    manifest: Mapping[str, Any],
    segment: Segment,
    base: int,
    part: Callable[[int, int, int], LayerMemory],
    max_bytes: int,
    created: list[Path],
) -> None:
    """Write the files of a segment whose chunks begin at `base`, and put them into its record.

    Args:
        part: the tensors of chunks, of `part(layer, first, end)`.
        max_bytes: of tensors per file.
        created: takes the files.
    """
    record = segment.record
    first = record["documents"][0]
    shapes = [(item["layer"], item["groups"] * item["head_dim"]) for item in manifest["layers"]]
    row_bytes = sum(3 * width for _, width in shapes) * DTYPES[manifest["dtype"]][0].itemsize
    for start, end in chunk_ranges(segment.offsets, max(max_bytes // row_bytes, 1)):
        tensors: dict[str, Tensor] = {}
        for layer, _ in shapes:
            memory = part(layer, start, end)
            tensors[f"layers.{layer}.routing_keys"] = memory.routing_keys
            tensors[f"layers.{layer}.content"] = memory.content
        entry = publish_file(directory, f"chunks-{base + start:010d}", tensors, created)
        record["tensors"].append({**entry, "chunks": [start, end]})
    record["table"] = publish_file(directory, f"documents-{first:010d}", segment.table, created)
    index = np.ascontiguousarray(segment.index).astype("<u8").tobytes()
    record["index"] = publish_file(directory, f"index-{first:010d}", index, created)


def renewed_records(directory: Path, segments: Iterable[Segment], created: list[Path]) -> list[dict[str, Any]]:
    """The records of segments that are there; parts that are not in the directory yet are written."""
    records = []
    for segment in segments:
        if segment.stale:
            start = segment.record["documents"][0]
            index = index_payload(segment.whole_table()["key"].to_pylist())
            table = publish_file(directory, f"documents-{start:010d}", segment.table, created)
            entry = publish_file(directory, f"index-{start:010d}", index, created)
            records.append({**segment.record, "table": table, "index": entry})
        else:
            records.append(segment.record)
    return records


def write_deletions(
    directory: Path,
    manifest: Mapping[str, Any],
    rows: np.ndarray,
    versions: Mapping[tuple[int, int], int],
    created: list[Path],
) -> dict[str, Any]:
    """Write deleted rows, and versions of deleted keys; returns the entry of the file."""
    keys = np.array([(*key, version) for key, version in versions.items()], np.uint64).reshape(-1, 3)
    stem = f"deletions-{manifest['generation']:010d}"
    entry = publish_file(directory, stem, deletions_payload(rows, keys), created)
    return {**entry, "rows": len(rows), "keys": len(keys)}
