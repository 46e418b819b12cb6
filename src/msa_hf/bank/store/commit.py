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
from ...model.bank_format_msa import FORMAT_VERSION, KeyHash, Manifest, SegmentRecord, TensorPair, library_version
from ...model.bank_writer_msa import BankWriter
from ...model.origin_msa import BankOrigin
from .buffers import Buffers
from .changes import Changes, written_table
from .encoder import DocumentEncoder
from .segments import Segment
from .state import State

MERGE_DELETIONS = 32  # files of deletions that are put into one at the next deletion

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

    def deleted(self, state: State) -> NDArray[np.int64]:
        """All deleted rows after it."""
        return np.union1d(state.deleted, self.gone)

    def manifest(self, state: State) -> Manifest:
        """The manifest after it, without the records of files."""
        counts = state.manifest["counts"]
        return {
            **state.manifest,
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "generation": state.manifest["generation"] + 1,
            "next_id": self.next_id,
            "counts": {
                "documents": counts["documents"] + len(self.table),
                "chunks": counts["chunks"] + int(numbers_of(self.table, "chunks").sum()),
                "tokens": counts["tokens"] + int(numbers_of(self.table, "tokens").sum()),
            },
        }


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


def write_commit(
    writer: BankWriter,
    manifest: Manifest,
    state: State,
    commit: Commit,
    versions: Mapping[KeyHash, int],
    max_bytes: int,
) -> None:
    """Write the files of a commit, and put their records into its manifest.

    Args:
        versions: of all deleted keys before it.
        max_bytes: of tensors per file.
    """
    manifest["segments"] = renewed_records(writer, state.segments)
    if len(commit.table):
        base = state.all_chunks

        def part(layer: int, first: int, end: int) -> TensorPair:
            keys, content = commit.memories[layer]
            return keys[first:end], content[first:end]

        record = writer.segment(
            commit.table, state.rows, part, state.layout, max_bytes, lambda start: f"chunks-{base + start:010d}"
        )
        manifest["segments"].append(record)
    if len(commit.gone) or commit.versions:
        if len(manifest["deletions"]) >= MERGE_DELETIONS:
            everything = commit.deleted(state), {**versions, **commit.versions}
            manifest["deletions"] = [writer.deletions(manifest["generation"], *everything)]
        else:
            entry = writer.deletions(manifest["generation"], commit.gone, commit.versions)
            manifest["deletions"] = [*manifest["deletions"], entry]


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
