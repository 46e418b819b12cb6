"""Erasure: what no living document needs is removed from a bank's directory for good, and what stays is named."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...model.bank_format_msa import LEFTOVER, OWN_FILE, PARTS
from ...model.bank_log_msa import ENTRY_FILE
from ...model.bank_manifest_msa import referenced_files
from ...model.bank_writer_msa import sync
from .errors import ErasureIncomplete

logger = logging.getLogger(__name__)
HELD_OPEN = re.compile(r"\.nfs[0-9a-f]+")  # what NFS makes of a removed file that another process has open
SHOWN = 5  # files that an error names


def erase(directory: Path, outdated: Iterable[Path] = ()) -> None:
    """Remove the files that no manifest names, those of writes that did not come to their end, and the parts of an
    interrupted `msa-hf encode`, any of which may hold deleted documents.

    Args:
        directory: of a bank, locked by the caller.
        outdated: further files and folders.

    Raises:
        ErasureIncomplete: naming what could not be removed, and why.
    """
    paths = leftovers(directory)
    parts = directory / PARTS
    if os.path.lexists(parts):
        paths.append(parts)
        logger.warning(
            "%s: removed what an interrupted `msa-hf encode` had encoded, which may hold deleted documents; run again, "
            "it encodes them anew.",
            directory,
        )
    if left := remove_for_good(directory, [*paths, *outdated]):
        raise ErasureIncomplete(
            f"{directory}: the bank is compacted, but what may hold deleted documents could not be removed for good: "
            f"{described(left)}. Close whatever has these files open and let this process remove them; then call "
            "compact() again.",
            tuple(sorted(left)),
        )


def leftovers(directory: Path) -> list[Path]:
    """Data files that no manifest names, and what is left of writes that did not come to their end."""
    named = referenced_files(directory)
    return [
        path
        for path in directory.iterdir()
        if path.name not in named and any(kind.fullmatch(path.name) for kind in (OWN_FILE, ENTRY_FILE, LEFTOVER))
    ]


def remove_for_good(directory: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Remove files and folders of a directory, and flush that.

    Returns:
        what is there still, by its path in the directory, and why; empty where all is gone.
    """
    left: dict[str, str] = {}
    for path in paths:
        left |= _remove(directory, path)
    left |= {
        path.name: "removed, but another process on its file system has it open"
        for path in directory.iterdir()
        if HELD_OPEN.fullmatch(path.name)
    }
    try:
        sync(directory)
    except OSError as error:
        left["."] = f"the removal could not be flushed to the disk: {error.strerror}"
    return left


def _remove(directory: Path, path: Path) -> dict[str, str]:
    """Remove a file, or as much of a folder as can be; returns what is there still, and why."""
    name = str(path.relative_to(directory))
    try:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return {}
        shutil.rmtree(path, ignore_errors=True)  # as much as can be
        if not path.exists():
            return {}
        shutil.rmtree(path)
        return {}
    except OSError as error:
        cause = error.strerror or str(error)
        inside = [str(item.relative_to(directory)) for item in path.rglob("*") if not item.is_dir()]
        return dict.fromkeys(inside or [name], cause)


def described(left: Mapping[str, str]) -> str:
    """Say what is there still, and why."""
    shown = ", ".join(f"{name} ({cause})" for name, cause in sorted(left.items())[:SHOWN])
    return shown + (f" and {len(left) - SHOWN} more" if len(left) > SHOWN else "")
