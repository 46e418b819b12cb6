"""A small JSON file beside a bank's manifest that says what is kept with the bank, and of which commit it is."""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ..json_object import JsonObject
from ..model.bank_files_msa import file_digest
from ..model.bank_writer_msa import write_text
from ..model.bounds_msa import read_json


def read_sidecar(path: Path, kind: str) -> JsonObject | None:
    """What a file says; None where there is none, or one that is damaged or of another `kind`: it is then made anew."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("kind") == kind else None


def write_sidecar(path: Path, record: Mapping[str, object]) -> None:
    """Put a record in the place of the file that lies there, as a whole."""
    write_text(path, json.dumps(record, indent=2) + "\n", path.stem)


def digest_of(path: Path) -> str:
    """SHA-256 of a file that never changes under its name: read once in a process.

    Raises:
        ValueError: for what is no regular file, such as a link or a device.
        OSError: for what cannot be read.
    """
    return _digest(path, *_mark(path))


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *mark: int) -> str:
    return file_digest(path)


def _mark(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file.")
    return status.st_ino, status.st_mtime_ns, status.st_size


def damage_of(path: Path, digest: object) -> str | None:
    """The fault of a file that was recorded with this SHA-256, None if it has none; it is read anew."""
    try:
        _mark(path)
        found = file_digest(path)
    except (FileNotFoundError, ValueError) as error:
        return f"{path}: cannot be read ({error})"
    return None if found == digest else f"{path}: is corrupted: its SHA-256 is {found}, not {digest}"
