"""The log of a bank: commits since its manifest was written, a small file for each, which one reads after the manifest.

A commit names its generation and the state that it follows, so that a missing, foreign or repeated one is seen. A file
gets its place by a link that fails where one lies there: two writers never commit the same generation.
"""

import json
import re
from pathlib import Path
from typing import TypedDict

from .bank_format_msa import (
    FORMAT_VERSION,
    UPGRADE,
    BankFormatError,
    DeletionsRecord,
    Manifest,
    SegmentRecord,
    brief,
    checked_deletions,
    checked_segment,
    count_of,
    format_error,
    library_version,
    manifest_checksum,
)

ENTRY_FORMAT = "msa_hf-commit"
ENTRY_FILE = re.compile(r"commit-(\d{10,19})\.json")
MAX_ENTRY_BYTES = 2**24


class LogEntry(TypedDict):
    """One commit: everything that it adds to a manifest.

    Attributes:
        generation: of the bank after it.
        parent: checksum of the manifest or of the commit before it.
        next_id: of the bank after it.
        tokens: of the rows that it adds.
        segment: these rows, None where there are none.
        deletions: None where it deletes nothing.
    """

    format: str
    format_version: int
    library_version: str
    generation: int
    parent: str
    next_id: int
    tokens: int
    segment: SegmentRecord | None
    deletions: DeletionsRecord | None
    checksum: str


def entry_name(generation: int) -> str:
    """The name of the file of a commit."""
    return f"commit-{generation:010d}.json"


def entry_names(manifest: Manifest) -> set[str]:
    """Names of the files of the commits that a manifest was read with."""
    first = manifest.get("checkpoint", manifest.get("generation", 0)) + 1
    return {entry_name(number) for number in range(first, manifest.get("generation", 0) + 1)}


def new_entry(
    manifest: Manifest, next_id: int, tokens: int, segment: SegmentRecord | None, deletions: DeletionsRecord | None
) -> LogEntry:
    """The commit that follows a state, signed."""
    entry: LogEntry = {
        "format": ENTRY_FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": library_version(),
        "generation": manifest["generation"] + 1,
        "parent": manifest["checksum"],
        "next_id": next_id,
        "tokens": tokens,
        "segment": segment,
        "deletions": deletions,
        "checksum": "",
    }
    entry["checksum"] = manifest_checksum(entry)
    return entry


def encode_entry(entry: LogEntry) -> str:
    """The content of the file of a commit: two equal lines, so that one damaged place does not cost the bank."""
    return 2 * (json.dumps(entry) + "\n")


def copies_differ(data: bytes) -> bool:
    """Tell whether one of the two copies of a commit is damaged."""
    return data[: len(data) // 2] != data[len(data) // 2 :]


def decode_entry(data: bytes, path: Path, manifest: Manifest) -> LogEntry:
    """Decode and check the commit that was read from `path` and must follow `manifest`.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    errors: list[BankFormatError] = []
    for copy in (data[: len(data) // 2], data[len(data) // 2 :]):
        try:
            decoded = json.loads(copy.decode("utf-8"))
            _check_entry(decoded, path, manifest)
        except BankFormatError as error:
            errors.append(error)
        except (ValueError, KeyError, RecursionError) as error:
            errors.append(format_error(path, str(error)))
        else:
            entry: LogEntry = decoded
            return entry
    raise errors[0]


def _check_entry(entry: object, path: Path, manifest: Manifest) -> None:
    if not isinstance(entry, dict) or entry.get("format") != ENTRY_FORMAT:
        raise ValueError(f'not a commit of a bank: `format` must be "{ENTRY_FORMAT}"')
    version = count_of(entry, "format_version", least=3)
    if version > FORMAT_VERSION:
        cause = f"`format_version` is {version}, this library reads up to {FORMAT_VERSION}"
        raise format_error(path, cause, UPGRADE)
    if entry.get("checksum") != manifest_checksum(entry):
        raise ValueError("the content does not match its `checksum`: corrupted, or edited by hand")
    wanted = manifest["generation"] + 1
    if (generation := count_of(entry, "generation")) != wanted:
        raise ValueError(f"`generation` is {generation} instead of {wanted}")
    if entry.get("parent") != manifest["checksum"]:
        raise ValueError(f"it follows another state of the bank: `parent` is {brief(entry.get('parent'))}")
    count_of(entry, "next_id", least=manifest["next_id"])
    count_of(entry, "tokens")
    if entry["segment"] is not None:
        layers = [item["layer"] for item in manifest["layers"]]
        checked_segment(entry["segment"], manifest["counts"]["documents"], layers)
    if entry["deletions"] is not None:
        checked_deletions(entry["deletions"])


def manifest_after(manifest: Manifest, entry: LogEntry) -> Manifest:
    """The manifest of the state after a commit."""
    counts, segment = manifest["counts"], entry["segment"]
    if segment is not None:
        counts = {
            "documents": segment["documents"][1],
            "chunks": counts["chunks"] + segment["chunks"],
            "tokens": counts["tokens"] + entry["tokens"],
        }
    return {
        **manifest,
        "generation": entry["generation"],
        "next_id": entry["next_id"],
        "counts": counts,
        "segments": manifest["segments"] if segment is None else [*manifest["segments"], segment],
        "deletions": manifest["deletions"]
        if entry["deletions"] is None
        else [*manifest["deletions"], entry["deletions"]],
        "checksum": entry["checksum"],
    }
