"""Data files of a bank: checked before anything is read of them, and told from what cannot be read now."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from .bank_format_msa import DOWNLOAD, RESTORE, BankError, BankFormatError, BankUnreadable, FileRecord, format_error
from .hub_cache_msa import blob_of, is_snapshot


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_file(directory: Path, record: FileRecord, verify: bool) -> Path:
    """Check place, size and, with `verify`, SHA-256 of a data file; returns its path.

    Raises:
        BankFormatError: naming the file, the cause and the remedy.
    """
    path = directory / record["file"]
    size = regular_file(directory, record["file"]).st_size
    if size != record["bytes"]:
        raise format_error(path, f"has {size} bytes, the manifest says {record['bytes']}: truncated or overwritten")
    try:
        digest = file_digest(path) if verify else record["sha256"]
    except OSError as error:
        raise unreadable(path, error) from error
    if digest != record["sha256"]:
        raise corrupted(path, digest, record)
    return path


def corrupted(path: Path, digest: str, record: FileRecord) -> BankFormatError:
    """The error about a file of another SHA-256."""
    return format_error(path, f"is corrupted: its SHA-256 is {digest}, the manifest says {record['sha256']}")


def damage_of_file(directory: Path, record: FileRecord) -> str | None:
    """The message about a file that is not what was written, None if it is."""
    try:
        checked_file(directory, record, verify=True)
    except BankFormatError as error:
        return str(error)
    return None


def regular_file(directory: Path, name: str) -> os.stat_result:
    """The status of a file that is none but a regular one in this directory, or a link to one there.

    In the Hub's cache also a link to a blob, as its client makes them.
    """
    path = directory / name
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
    except (OSError, RuntimeError) as error:
        raise unreadable(path, error) from error
    if resolved.parent != directory.resolve() and resolved != blob_of(directory, name):
        cause = "a link that leaves the directory of the bank"
        if is_snapshot(directory):
            cause += ", and none that the Hub's client makes"
        remedy = "Copy the bank with its files, not links to them (`snapshot_download(..., local_dir=...)`)"
        raise format_error(path, cause, remedy)
    if not stat.S_ISREG(status.st_mode):
        raise format_error(path, "not a regular file")
    return status


def unreadable(path: Path, error: Exception) -> BankError:
    """The error about a file that cannot be read: it is missing, or nothing is known about it."""
    if isinstance(error, OSError) and error.errno is None:  # pyarrow's, about what the file holds
        return format_error(path, f"cannot be read ({error})")
    if isinstance(error, OSError) and error.errno not in _MISSING:
        return BankUnreadable(error.errno or errno.EIO, _UNREADABLE.format(path, error.strerror or error))
    try:
        there = path.name in os.listdir(path.parent)
    except OSError as listing:
        return BankUnreadable(listing.errno or errno.EIO, _UNREADABLE.format(path, listing.strerror))
    if there and isinstance(error, FileNotFoundError) and not path.is_symlink():
        return BankUnreadable(errno.ENOENT, _UNREADABLE.format(path, error.strerror))
    remedy = f"{RESTORE}; where another process saved the bank meanwhile, load it again"
    if is_snapshot(path.parent):
        remedy = DOWNLOAD
    return format_error(path, f"cannot be read ({error})", remedy)


_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_UNREADABLE = "{}: cannot be read now ({}). That is no damage: try again, or see what the system lacks"
