"""One writer at a time: a lock file that the operating system frees when its holder dies.

Its first bytes name the holder. Behind them stands the last commit that was made: if its file is gone, that is told.
"""

import errno
import importlib
import json
import logging
import os
import re
import socket
import stat
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from .bank_format_msa import LOCK, BankError
from .hub_cache_msa import is_snapshot

logger = logging.getLogger(__name__)
MOUNTS = Path("/proc/self/mountinfo")
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}  # what `flock` is refused with
NAMED = 1000  # bytes, of the holder
NOTED_AT, NOTED = 1024, re.compile(rb"([0-9a-f]{32})-(\d{1,20})\n *")  # a lineage, and a generation of it
_held: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()


class BankLocked(BankError, RuntimeError):
    """Another writer has the bank open. The message names it."""


class BankNotWritable(BankError, RuntimeError):
    """A bank may not be written to from here.

    It is closed, read only or forked; it was replaced or its lock was lost; its directory cannot be locked, or belongs
    to the Hub's cache.
    """


class WriterLock:
    """The right to write to a directory, from construction to `release`.

    The file stays when the lock is free, because removing it would let two writers lock two files of that name. A
    process that was forked does not inherit the right.

    Args:
        directory: that exists.
        sole_writer: the user vouches that nothing else writes to the directory: no lock is asked for.

    Raises:
        BankLocked: naming the process, the host and since when.
        BankNotWritable: where the file system has no locks, naming it; where the lock file is none of ours: a link, a
            file with several names, or no file at all; or in a snapshot of the Hub's cache. Nothing is written then.
    """

    def __init__(self, directory: Path, sole_writer: bool = False) -> None:
        self._path = directory / LOCK
        self._process = os.getpid()
        self._descriptor: int | None = None
        self._released = False
        if is_snapshot(directory):
            raise BankNotWritable(
                f"{directory} is a snapshot in the Hub's cache: its files are shared, and stay what was downloaded. "
                'Change a copy, `MemoryBank.from_pretrained("user/bank").save_pretrained("my-bank")`; or open the bank '
                "here with read_only=True."
            )
        if not sole_writer:
            self._descriptor = _open(self._path)
            try:
                self._take(directory)
            except BaseException:
                os.close(self._descriptor)
                self._descriptor, self._released = None, True
                raise
        _held.add(self)

    def _take(self, directory: Path) -> None:
        assert self._descriptor is not None
        if not _lock(self._descriptor, directory):
            raise BankLocked(
                f"{directory} is open for writing in {_holder(self._content())}. Close it there, or open it here "
                "with read_only=True."
            )
        if cause := self._not_ours():
            raise BankNotWritable(f"{self._path} {cause}; open the bank again once nothing else changes its directory.")
        if left := self._content():
            logger.warning("%s: taken over from %s, which did not close it.", directory, _holder(left))
        since = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"pid": self._process, "host": socket.gethostname(), "since": since}
        os.pwrite(self._descriptor, json.dumps(record).encode().ljust(NAMED), 0)

    def _content(self) -> str:
        assert self._descriptor is not None
        return os.pread(self._descriptor, NAMED, 0).decode(errors="replace").strip(" \n\0")

    def _not_ours(self) -> str | None:
        """Say why the file that is locked is not the one that others would lock, None if it is."""
        assert self._descriptor is not None
        mine = os.fstat(self._descriptor)
        try:
            there = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return "was removed"
        if not os.path.samestat(mine, there):
            return "was replaced"
        return None if mine.st_nlink == 1 else f"has {mine.st_nlink} names (hard links)"

    @property
    def held(self) -> bool:
        """Tell whether this process has the lock."""
        return not self._released and self._process == os.getpid()

    def check(self) -> None:
        """Make sure, directly before a commit, that this process still has the lock that others would ask for.

        Raises:
            BankNotWritable: where it was released or lost, or its file was removed or replaced.
        """
        if self._process != os.getpid():
            raise BankNotWritable(
                "This process was forked from the one that has the bank open; only that one may write."
            )
        if self._released:
            raise BankNotWritable(f"The right to write to {self._path.parent} was given back; open the bank again.")
        if self._descriptor is None:
            return
        cause = self._not_ours()
        # On Windows a lock cannot be asked for twice, nor be lost.
        if cause is None and os.name != "nt" and not _lock(self._descriptor, self._path.parent):
            cause = "is no longer locked by this process"
        if cause is not None:
            raise BankNotWritable(
                f"{self._path} {cause} since the bank was opened for writing, so that another writer may have come in. "
                "Nothing was committed; open the bank again."
            )

    def note_commit(self, lineage: str, generation: int) -> None:
        """Note the last commit, which is on the disk. Without a lock, or on a disk that fails, it is not noted."""
        with suppress(OSError):
            if self.held and self._descriptor is not None and os.fstat(self._descriptor).st_nlink < 2:
                os.pwrite(self._descriptor, f"{lineage}-{generation}\n".encode().ljust(64), NOTED_AT)

    def release(self) -> None:
        """Let go of the lock, whatever the disk says: an error here would hide the one that it is released for."""
        with suppress(OSError):  # who had the lock is no more than a note
            if self.held and self._descriptor is not None and os.fstat(self._descriptor).st_nlink < 2:
                os.pwrite(self._descriptor, b" " * NAMED, 0)
        self.drop()

    def drop(self) -> None:
        """Close the file alone, as a forked process does: its parent keeps the lock."""
        descriptor, self._descriptor, self._released = self._descriptor, None, True
        if descriptor is not None:
            with suppress(OSError):  # the descriptor is free all the same, and with it the lock
                os.close(descriptor)

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def noted_commit(directory: Path) -> tuple[str, int] | None:
    """The lineage and generation of the last commit that a writer noted, None where nobody did.

    Commits are noted once they are made: whoever asks before looking for them finds all up to this one.
    """
    try:
        if not stat.S_ISREG((directory / LOCK).lstat().st_mode):
            return None
        with open(directory / LOCK, "rb") as file:
            file.seek(NOTED_AT)
            found = NOTED.fullmatch(file.read(64))
    except OSError:
        return None
    return None if found is None else (found[1].decode(), int(found[2]))


def missing_commit(directory: Path, lineage: str | None, generation: int, noted: tuple[str, int] | None) -> str | None:
    """Say that commits up to a noted one are missing behind a generation, None if none is."""
    if noted is None or noted[0] != lineage or noted[1] <= generation:
        return None
    return (
        f"{directory}: commit {noted[1]} was made, but the bank ends with commit {generation}. Later ones were "
        "removed, or this is a copy that was made while somebody wrote: restore their files, or go on without them."
    )


def warn_of_missing_commit(
    directory: Path, lineage: str | None, generation: int, noted: tuple[str, int] | None
) -> None:
    """Warn of what `missing_commit` says: a copy that was made beside a writer lacks commits as well, and is usable."""
    if cause := missing_commit(directory, lineage, generation, noted):
        logger.warning("%s", cause)


def _open(path: Path) -> int:
    """Open a lock file, made where missing: only a regular one that has no other name."""
    with suppress(FileNotFoundError):
        _check_plain(path, path.lstat())  # before it is opened, which may do something with a device or a pipe
    flags = os.O_RDWR | os.O_CREAT | (0 if os.name == "nt" else os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BankNotWritable(f"{path} has become a symbolic link; remove it.") from error
        raise
    try:
        _check_plain(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_plain(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BankNotWritable(f"{path} is {_kind(found.st_mode)} and no file, so it cannot be locked; remove it.")
    if found.st_nlink > 1:
        raise BankNotWritable(
            f"{path} has {found.st_nlink} names (hard links), so that writing to it would change a file elsewhere; "
            "remove it."
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a directory"}
    kinds |= {stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def _lock(descriptor: int, directory: Path) -> bool:
    """Ask for the lock; returns whether it was given. It is asked for again by who has it without harm."""
    if os.name == "nt":
        windows = importlib.import_module("msvcrt")
        try:
            # Far behind the text, which others may then still read.
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    fcntl = importlib.import_module("fcntl")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise BankNotWritable(
            f"{directory} lies on {file_system(directory)}, which gives no locks ({error.strerror}), so that another "
            "writer would go unnoticed. Keep the bank on a file system with locks; or, if you vouch that nothing else "
            "writes to it, say so: sole_writer=True, on the command line --sole-writer."
        ) from error
    return True


def file_system(path: Path) -> str:
    """Name the file system that a path lies on, by its type and where it is mounted."""
    place = path.resolve()
    found, longest = "a file system of a kind that is not known", -1
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4]))
        # What was mounted later at the same place lies over it.
        if place.is_relative_to(mount) and len(mount.parts) >= longest:
            longest = len(mount.parts)
            found = f"a file system of the type {after.split(' ')[0]!r}, mounted at {mount}"
    return found


def _holder(content: str) -> str:
    try:
        record = json.loads(content)
        return f"process {int(record['pid'])} on {record['host']!s:.80} since {record['since']!s:.40}"
    except (ValueError, TypeError, KeyError):
        return "a process that did not say its name"


def _drop_in_child() -> None:
    for lock in list(_held):
        lock.drop()


if os.name != "nt":
    os.register_at_fork(after_in_child=_drop_in_child)
