"""The shim for system calls (`shim.c`): compiled here, loaded by the server of children, armed by a child."""

from __future__ import annotations

import ctypes
import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .attack import Skipped

CHANGING = ("create", "write", "sync", "rename", "link", "unlink", "mkdir", "truncate", "lock", "chmod")
HOW = {"once": 1, "on": 2, "after": 3, "short": 4}
KILL, INTERRUPT = "KILL", "INTERRUPT"
SIGNALS = {KILL: -1, INTERRUPT: -2}  # as in shim.c

# Kinds of calls in the order of `enum kind` in shim.c, and the errors that each may well give.
ERRORS = {
    "open": ["EMFILE", "EACCES", "EIO", "EINTR"],
    "create": ["EMFILE", "EACCES", "EIO", "ENOSPC", "EINTR"],
    "read": ["EIO", "EINTR"],
    "write": ["ENOSPC", "EIO", "EINTR"],
    "sync": ["EIO", "ENOSPC", "EINTR"],
    "rename": ["EIO", "ENOSPC", "EACCES"],
    "link": ["EIO", "ENOSPC", "EMLINK"],
    "unlink": ["EIO", "EACCES"],
    "mkdir": ["EIO", "ENOSPC", "EACCES"],
    "mmap": ["ENOMEM", "EACCES"],
    "truncate": ["EIO", "ENOSPC", "EINTR"],
    "stat": ["EIO", "EACCES"],
    "list": ["EMFILE", "EIO", "EACCES"],
    "lock": ["EINTR", "ENOLCK", "EIO"],
    "chmod": ["EIO", "EACCES"],
}
KINDS = tuple(ERRORS)


def build(place: Path) -> Path:
    """Compile the shim into a directory.

    Raises:
        Skipped: where it cannot be.
    """
    if not sys.platform.startswith("linux"):
        raise Skipped("LD_PRELOAD and /proc are those of Linux")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Skipped("there is no C compiler (cc, gcc, clang) for the shim")
    made = place / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(Path(__file__).with_name("shim.c")), "-ldl"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise Skipped(f"the shim was not compiled: {ran.stderr.strip().splitlines()[-1]}")
    return made


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kinds: of calls that count.
        number: of the call that fails, from 1; 0: none does, they are counted alone.
        error: name of the error, KILL, or INTERRUPT: Ctrl-C, and the call is carried out.
        how: as `HOW`: the call alone, all from there on, after it was carried out, or half of what is to be written.
    """

    kinds: tuple[str, ...]
    number: int
    error: str = "EIO"
    how: str = "once"


@dataclass
class Hit:
    """What a fault came to, filled in at its end.

    Attributes:
        times: calls that failed.
        call: the first of them, and its file.
        counted: calls of each kind.
    """

    times: int = 0
    call: str = ""
    counted: dict[str, int] | None = None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    try:
        library.torture_last.restype = ctypes.c_char_p
    except AttributeError:
        raise Skipped("the shim is not loaded: there is no C compiler, or this is not Linux") from None
    library.torture_disarm.restype = library.torture_count.restype = ctypes.c_long
    library.torture_arm.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library


@dataclass(frozen=True)
class Trace:
    """Where every change is written down.

    Attributes:
        file: a line for each.
        graveyard: a directory of the same file system, for what is removed or replaced, by inode.
    """

    file: Path
    graveyard: Path


@contextmanager
def failing(directory: Path, fault: Fault, trace: Trace | None = None) -> Iterator[Hit]:
    """A block in which a system call that touches a directory fails, in this process."""
    library, hit = _library(), Hit()
    kinds = sum(1 << KINDS.index(kind) for kind in fault.kinds)
    code = SIGNALS.get(fault.error) or getattr(errno, fault.error)
    if trace is not None:
        library.torture_trace(str(trace.file).encode(), str(trace.graveyard).encode())
    library.torture_arm(str(directory.resolve()).encode(), kinds, fault.number, code, HOW[fault.how])
    try:
        yield hit
    finally:
        hit.times = library.torture_disarm()
        hit.call = library.torture_last().decode(errors="replace")
        hit.counted = {kind: library.torture_count(place) for place, kind in enumerate(KINDS)}
