"""The parts of a corpus on their way into a bank: their files and records, and how they become the bank.

A part lies in a folder of the bank's directory until all are there: the files of a segment, and a record, named after
the part, which is written last. `commit_parts` moves the files beside the manifest and writes that one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..model.arrow_msa import ArrowTable, numbers_of
from ..model.bank_files_msa import checked_file
from ..model.bank_format_msa import (
    OWN_FILE,
    PARTS,
    BankFormatError,
    FileRecord,
    Manifest,
    PartNote,
    SegmentRecord,
    ShardRecord,
    TensorLayout,
    TensorPair,
)
from ..model.bank_lock_msa import WriterLock
from ..model.bank_manifest_msa import data_left, is_bank, missing_manifest, read_manifest, referenced_files
from ..model.bank_writer_msa import BankWriter, remove_unnamed, write_text
from ..model.bounds_msa import read_json
from .store.erase import described, leftovers, remove_for_good

logger = logging.getLogger(__name__)
FOLDER = PARTS
MAX_SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Part:
    """Documents `first` up to `end` (excluded) of a corpus, and the name of what they are encoded to."""

    first: int
    end: int
    name: str


class Record(PartNote):
    """The record of a part: its name and numbers, and its files as the manifest will name them."""

    documents: int
    chunks: int
    tensors: list[ShardRecord]
    table: FileRecord
    index: FileRecord


def write_part(folder: Path, part: Part, table: ArrowTable, layers: Mapping[int, TensorPair]) -> Record:
    """Write the files of a part, named after its first document, which no other part has; then its record.

    Args:
        table: its documents and pieces of documents, of format version 2.
        layers: per layer, their routing keys and content.
    """

    def chunks(layer: int, first: int, end: int) -> TensorPair:
        keys, content = layers[layer]
        return keys[first:end], content[first:end]

    layout, stem = TensorLayout.of_tensors(layers), f"chunks-{part.first:010d}"
    with BankWriter(folder) as writer:
        segment = writer.segment(
            table, part.first, chunks, layout, MAX_SHARD_BYTES, lambda start: f"{stem}-{start:010d}"
        )
    record: Record = {
        "part": part.name,
        "documents": len(table),
        "chunks": segment["chunks"],
        "tokens": int(numbers_of(table, "tokens").sum()),
        "next_id": int(numbers_of(table, "id").max()) + 1,
        "tensors": segment["tensors"],
        "table": segment["table"],
        "index": segment["index"],
    }
    # From here on the part is there, whatever happens.
    write_text(folder / f"{part.name}.json", json.dumps(record), "record")
    return record


def find_parts(directory: Path, parts: list[Part]) -> dict[str, Record]:
    """The records of those parts that are there, every file of them as it was written."""
    segments = read_manifest(directory)["segments"] if is_bank(directory) else []
    named = {record["part"]: record for record in map(_record_of, segments) if record is not None}
    found: dict[str, Record] = {}
    for part in parts:
        for record in (_read_record(directory / FOLDER / f"{part.name}.json"), named.get(part.name)):
            if record is not None and _is_whole(directory, part, record):
                found[part.name] = record
                break
    return found


def _record_of(segment: SegmentRecord) -> Record | None:
    """The record of the part that a segment was, None of one that another writer made."""
    try:
        note, (first, end) = segment["part"], segment["documents"]
        if not isinstance(note["part"], str):
            return None
        return {
            "part": note["part"],
            "documents": end - first,
            "chunks": segment["chunks"],
            "tokens": note["tokens"],
            "next_id": note["next_id"],
            "tensors": segment["tensors"],
            "table": segment["table"],
            "index": segment["index"],
        }
    except (KeyError, TypeError):  # no reader has checked these fields
        return None


def _read_record(path: Path) -> Record | None:
    try:
        decoded = read_json(path)
        _entries(decoded)
        _numbers(decoded)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    record: Record = decoded
    return record


def _is_whole(directory: Path, part: Part, record: Record) -> bool:
    """Tell whether a record is of this part, and its files are what was written."""
    try:
        if record["part"] != part.name or any(type(number) is not int for number in _numbers(record)):
            return False
        for entry in _entries(record):
            if not OWN_FILE.fullmatch(entry["file"]):
                return False
            place = directory / FOLDER if (directory / FOLDER / entry["file"]).exists() else directory
            checked_file(place, entry, verify=True)
    except (BankFormatError, KeyError, TypeError):
        return False
    return True


def _numbers(record: Record) -> list[int]:
    return [record["documents"], record["chunks"], record["tokens"], record["next_id"]]


def _entries(record: Record) -> list[FileRecord]:
    return [*record["tensors"], record["table"], record["index"]]


def check_place(directory: Path) -> None:
    """Make sure, before any work, that a bank may be written to a directory in the end.

    Raises:
        BankFormatError: for a manifest that cannot be read; or that is missing while files of a bank are there that no
            interrupted run has put there.
    """
    if is_bank(directory):
        referenced_files(directory)
    elif set(data_left(directory)) - _named(directory / FOLDER):
        raise missing_manifest(directory)


def _named(folder: Path) -> set[str]:
    """Names of the files of the parts whose records lie in a folder."""
    named: set[str] = set()
    for path in folder.glob("*.json"):
        if (record := _read_record(path)) is not None:
            with contextlib.suppress(KeyError, TypeError):
                named.update(entry["file"] for entry in _entries(record))
    return named


def remove_unfinished(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote a part."""
    named = _named(folder)
    if count := remove_unnamed(folder, named):
        logger.warning("%s: removed %d files of parts that an interrupted run did not complete.", folder, count)


def commit_parts(
    directory: Path,
    manifest: Manifest,
    prefix: Mapping[int, TensorPair],
    records: Iterable[Record],
    lock: WriterLock,
) -> None:
    """Make parts the bank that lies in `directory`, and remove what is no part of it.

    Args:
        manifest: of the bank without documents.
        prefix: keys and values [G, p, D] of the template prefix, per layer.
        lock: of the directory.
    """
    counts = manifest["counts"]
    with BankWriter(directory) as writer:
        for record in records:
            for entry in _entries(record):
                if (path := directory / FOLDER / entry["file"]).exists():
                    writer.adopt(path)
            rows = counts["documents"], counts["documents"] + record["documents"]
            manifest["segments"].append(
                {
                    "documents": list(rows),
                    "chunks": record["chunks"],
                    "tensors": record["tensors"],
                    "table": record["table"],
                    "index": record["index"],
                    "part": {"part": record["part"], "tokens": record["tokens"], "next_id": record["next_id"]},
                }
            )
            counts["documents"] = rows[1]
            counts["chunks"] += record["chunks"]
            counts["tokens"] += record["tokens"]
            manifest["next_id"] = max(manifest["next_id"], record["next_id"])
        manifest["prefix"] = writer.prefix(prefix)
        lock.check()
        writer.commit(manifest)
    # The old bank's files, and what a commit left that did not come to its end.
    if left := remove_for_good(directory, [*leftovers(directory), directory / FOLDER]):
        logger.warning("%s: the bank is complete, but what is no part of it stays: %s.", directory, described(left))
