"""One writer at a time: a lock file that the operating system frees when its holder dies."""

from __future__ import annotations

import importlib
import json
import logging
import os
import socket
import stat
import weakref
from datetime import UTC, datetime
from pathlib import Path

from ...model.bank_format_msa import LOCK, BankError

logger = logging.getLogger(__name__)
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class BankLocked(BankError, RuntimeError):
    """Another writer has the bank open. The message names it."""


class WriterLock:
    """The right to write to a directory, from construction to `release`.

    The file stays when the lock is free, because removing it would let two writers lock two files of that name. A
    process that was forked does not inherit the right.

    Raises:
        BankLocked: naming the process, the host and since when.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._process = os.getpid()
        flags = os.O_RDWR | os.O_CREAT | (0 if os.name == "nt" else os.O_NOFOLLOW | os.O_NONBLOCK)
        self._descriptor = os.open(self._path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise BankLocked(f"{self._path} is not a regular file; remove it.")
            if not _lock(self._descriptor):
                raise BankLocked(
                    f"{directory} is open for writing in {_holder(self._content())}. Close it there, or open it here "
                    "with read_only=True."
                )
            if left := self._content():
                logger.warning("%s: taken over from %s, which did not close it.", directory, _holder(left))
            since = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"pid": self._process, "host": socket.gethostname(), "since": since}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(record).encode(), 0)
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = -1
            raise
        _held.add(self)

    def _content(self) -> str:
        return os.pread(self._descriptor, 1000, 0).decode(errors="replace").strip()

    @property
    def held(self) -> bool:
        """Tell whether this process has the lock."""
        return self._descriptor >= 0 and self._process == os.getpid()

    def release(self) -> None:
        """Let go of the lock."""
        if self.held:
            os.ftruncate(self._descriptor, 0)
        self.drop()

    def drop(self) -> None:
        """Close the file alone, as a forked process does: its parent keeps the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _lock(descriptor: int) -> bool:
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
    return True


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
