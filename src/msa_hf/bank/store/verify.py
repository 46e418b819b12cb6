"""Verification: every file of a bank is read and compared with its SHA-256."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ...model.bank_files_msa import damage_of_file
from ...model.bank_format_msa import BACKUP, MANIFEST, BankFormatError, BankUnreadable, Manifest, data_files
from ...model.bank_log_msa import copies_differ, entry_names
from ...model.bank_manifest_msa import backup_of, read_checkpoint
from .segments import NO_ROWS, Damage, Loss, Rows, Segment, damage_of
from .state import State


def find_damage(directory: Path, state: State, known: Mapping[str, Damage]) -> list[Damage]:
    """Find what is damaged; rows that are lost for it are marked in their segments.

    Args:
        known: damage that was found before, by file: its rows are marked already.
    """
    found: list[Damage] = []

    def note(segment: Segment, file: str, rows: Rows) -> None:
        cause = causes.pop(file)
        found.append(known.get(file) or damage_of(segment, Loss(file, cause, rows), state.deleted))

    causes: dict[str, str] = {}
    unreadable: list[Damage] = []
    for entry in data_files(state.manifest):
        try:
            if (cause := damage_of_file(directory, entry)) is not None:
                causes[entry["file"]] = cause
        except BankUnreadable as error:
            unreadable.append(Damage(entry["file"], str(error.strerror), unreadable=True))
    for segment in state.segments:
        record = segment.record
        if (file := record["table"]["file"]) in causes:
            note(segment, file, segment.lose_rows(0, len(segment)))
        for shard, entry in zip(segment.shards, record["tensors"], strict=True):
            if (file := entry["file"]) in causes:
                shard.file = None
                note(segment, file, segment.lose_chunks(*entry["chunks"]))
        if "index" in record and (file := record["index"]["file"]) in causes:
            if not segment.lost.all():
                segment.rebuild_index()
            note(segment, file, NO_ROWS)
    # What can be done without.
    found += [Damage(file, cause) for file, cause in causes.items()]
    return [*found, *_damaged_copies(directory, state.manifest), *unreadable]


def _damaged_copies(directory: Path, manifest: Manifest) -> list[Damage]:
    """Find copies that are not what they are copies of."""
    found: list[Damage] = []
    for name in sorted(entry_names(manifest)):
        try:
            damaged = copies_differ((directory / name).read_bytes())
        except FileNotFoundError:
            continue  # it was put into the manifest meanwhile
        if damaged:
            found.append(Damage(name, f"{directory / name}: one of its two copies is damaged"))
    with suppress(BankFormatError):  # of the manifest, which is told elsewhere
        if "lineage" in manifest and backup_of(directory) != read_checkpoint(directory)[0]:
            found.append(Damage(BACKUP, f"{directory / BACKUP}: is no copy of {MANIFEST}"))
    return found


def are_intact(directory: Path, segments: Iterable[Segment]) -> bool:
    """Tell whether tables and tensors are what was written: to copy damage would give it a checksum of its own."""
    return all(
        damage_of_file(directory, entry) is None
        for segment in segments
        for entry in (*segment.record["tensors"], segment.record["table"])
    )
