"""One commit: what it does to the rows of a bank, made ready before anything is written, and its files.

`Commit` says what happens; the writer decides how it lies on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ...model.arrow_msa import ArrowTable, numbers_of
from ...model.bank_format_msa import DeletionsRecord, KeyHash, Manifest, SegmentRecord, TensorPair
from ...model.bank_log_msa import LogEntry, new_entry
from ...model.bank_writer_msa import BankWriter
from ...model.origin_msa import BankOrigin
from .buffers import Buffers
from .changes import Changes, written_table
from .encoder import DocumentEncoder
from .segments import Segment
from .state import State

Memories = dict[int, TensorPair]


@dataclass(frozen=True)
class Commit:
    """The work of a commit.

    Attributes:
        table: rows that it adds, of format version 2.
        memories: per layer, their routing keys and content; empty without rows.
        gone: [n] int64 rows of the bank that it deletes, ascending.
        versions: of deleted keys, by the hash of the key.
        next_id: of the bank after it.
    """

    table: ArrowTable
    memories: Memories
    gone: NDArray[np.int64]
    versions: Mapping[KeyHash, int]
    next_id: int


def commit_of(
    changes: Changes, state: State, origin: BankOrigin, encoder: DocumentEncoder | None, buffers: Buffers | None
) -> Commit:
    """Encode the documents of changes, and take over the tensors of those that have them.

    Args:
        encoder: None for changes that only delete.
        buffers: the tensors in memory, if they are there.
    """
    written = changes.written()
    parts: list[Memories] = []
    tokens: list[int] = []
    if written:
        assert encoder is not None
        if encoded := {key: change for key, change in written.items() if not change.copy}:
            bank, kind = encoder.encode_changes(encoded, origin), state.layout.dtype
            found = {layer: (item.routing_keys, item.pooled_kv) for layer, item in bank.layers.items()}
            parts.append({layer: (keys.to(kind), content.to(kind)) for layer, (keys, content) in found.items()})
            tokens += bank.documents.counts("tokens").tolist()
        for change in written.values():
            if change.copy:
                assert change.row is not None
                parts.append(_tensors_of(change.row, state, buffers, encoder.device))
                segment, place = state.place(change.row)
                tokens.append(segment.fields(place, ["tokens"])["tokens"])
    table = written_table(written, tokens, origin.chunk_size)
    return Commit(table, _joined(parts), changes.gone(), changes.deleted_versions(), changes.next_id)


def _joined(parts: Sequence[Memories]) -> Memories:
    joined = {}
    for layer in parts[0] if parts else ():
        keys, content = zip(*(part[layer] for part in parts), strict=True)
        joined[layer] = torch.cat(keys), torch.cat(content)
    return joined


def _tensors_of(row: int, state: State, buffers: Buffers | None, device: torch.device) -> Memories:
    """The tensors of a row."""
    if buffers is not None:
        chunks = slice(*state.offsets[row : row + 2].tolist())
        return {
            layer: (keys[chunks], content[chunks]) for layer, (keys, content) in buffers.view(state.all_chunks).items()
        }
    segment, place = state.place(row)
    inside = np.arange(*segment.offsets[place : place + 2].tolist())
    copies = {layer: segment.gather(layer, inside) for layer in state.layout.shapes}
    return {layer: (keys.to(device), content.to(device)) for layer, (keys, content) in copies.items()}


def write_commit(writer: BankWriter, state: State, commit: Commit, max_bytes: int) -> LogEntry:
    """Write the files of a commit; returns what the log will say of it.

    Args:
        max_bytes: of tensors per file.
    """
    segment: SegmentRecord | None = None
    deletions: DeletionsRecord | None = None
    if len(commit.table):
        base = state.all_chunks

        def part(layer: int, first: int, end: int) -> TensorPair:
            keys, content = commit.memories[layer]
            return keys[first:end], content[first:end]

        segment = writer.segment(
            commit.table, state.rows, part, state.layout, max_bytes, lambda start: f"chunks-{base + start:010d}"
        )
    if len(commit.gone) or commit.versions:
        keys = np.array([(*key, version) for key, version in commit.versions.items()], np.uint64).reshape(-1, 3)
        deletions = writer.deletions(state.manifest["generation"] + 1, commit.gone, keys)
    tokens = int(numbers_of(commit.table, "tokens").sum())
    return new_entry(state.manifest, commit.next_id, tokens, segment, deletions)


def entry_in_memory(state: State, commit: Commit) -> Manifest:
    """The manifest after a commit of a bank that lies in memory alone, without the records of files."""
    manifest, table = state.manifest, commit.table
    counts = manifest["counts"]
    return {
        **manifest,
        "generation": manifest["generation"] + 1,
        "next_id": commit.next_id,
        "counts": {
            "documents": counts["documents"] + len(table),
            "chunks": counts["chunks"] + int(numbers_of(table, "chunks").sum()),
            "tokens": counts["tokens"] + int(numbers_of(table, "tokens").sum()),
        },
    }


def renewed_records(writer: BankWriter, segments: Iterable[Segment]) -> list[SegmentRecord]:
    """The records of segments that are there; parts that are not in the directory yet are written."""
    records: list[SegmentRecord] = []
    for segment in segments:
        record = segment.record
        if segment.stale:
            start, table = record["documents"][0], segment.whole_table()
            written = writer.table(f"documents-{start:010d}", table)
            record = {**record, "table": written, "index": writer.index(table, start)}
        records.append(record)
    return records
