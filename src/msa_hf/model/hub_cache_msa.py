"""The Hub's cache as banks see it: which links of a snapshot are followed, and that nobody writes to one.

    datasets--user--bank/snapshots/<commit>/manifest.json -> ../../blobs/<hash>
    datasets--user--bank/blobs/<hash>                        a file, or -> ../../blobs/<xx>/<hash of 64 digits>
    blobs/<xx>/<hash of 64 digits>                           a file that repositories of this cache share

Every other link is refused, wherever it leads: whoever made it may name any file of this machine.
"""

import os
import re
import stat
from pathlib import Path

REPOSITORY = re.compile(r"(models|datasets|spaces|kernels)--[^/\\]+")
BLOB = re.compile(r"\.\./\.\./blobs/([A-Za-z0-9][\w.-]*)", re.ASCII)
SHARED_BLOB = re.compile(r"\.\./\.\./blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})")
SHARED_MARKER = ".huggingface-shared-blobs"  # a file that the Hub's client puts beside blobs that repositories share


def is_snapshot(directory: Path) -> bool:
    """Tell whether a directory is a snapshot of a repository in the Hub's cache."""
    snapshots = Path(os.path.realpath(directory)).parent
    return (
        snapshots.name == "snapshots"
        and REPOSITORY.fullmatch(snapshots.parent.name) is not None
        and _is_folder(snapshots.parent / "blobs")
    )


def blob_of(directory: Path, name: str) -> Path | None:
    """The blob that a file of a snapshot is a link to: a regular file, of the same repository or of the whole cache.

    Args:
        directory: of the bank.
        name: of the file.

    Returns:
        Its real path; None where the file is anything else than a link that the Hub's client makes.
    """
    if not is_snapshot(directory):
        return None
    repository = Path(os.path.realpath(directory)).parent.parent
    link = _target(directory / name)
    if link is None or (named := BLOB.fullmatch(link)) is None:
        return None
    blob = repository / "blobs" / named[1]
    if (link := _target(blob)) is not None:
        store = repository.parent / "blobs"
        if (shared := SHARED_BLOB.fullmatch(link)) is None or not _is_file(store / SHARED_MARKER):
            return None
        if not (_is_folder(store) and _is_folder(store / shared[1])):
            return None
        blob = store / shared[1] / shared[2]
    return blob if _is_file(blob) else None


def _target(path: Path) -> str | None:
    """The text of a link, None where the path is none."""
    try:
        return os.readlink(path).replace(os.sep, "/")
    except OSError:
        return None


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path))


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """The mode of a path itself, whatever it links to; 0 where there is none."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0
