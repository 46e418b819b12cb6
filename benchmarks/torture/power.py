"""Losses of power: whatever was not flushed may be lost, in any combination, and nothing that was acknowledged is.

A writer is killed at a system call. Of the trace of its changes (`shim.c`) and of what it left, a directory is made as
a disk may have it after the power is back:

* A file has all its content if it was flushed (fsync) after it was last written, else all, half, nothing, or zeros.
* Changes of names (create, rename, link, unlink) have happened if their directory was flushed after them. Of others,
  `ordered`: those up to some moment, as file systems with a journal keep them; `unordered`: any.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .attack import Outcome, Settings, Wrong
from .children import call
from .faults import Bases, erased, killed, round_robin, shuffled
from .kills import create, survivors
from .operations import OPERATIONS
from .shim import CHANGING, Trace

DRAWS = 3  # directories that are made of one trace


class Power:
    """A loss of power at any system call that changes something."""

    name = "power"
    title = "losses of power, simulated"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases

    def cases(self) -> Iterator[str]:
        """`add:ordered:7`: at the seventh system call of `add`."""
        return round_robin(*(self._cases_of(operation) for operation in OPERATIONS))

    def _cases_of(self, operation: str) -> Iterator[str]:
        counted = self._bases.counts(operation)
        calls = sum(counted[kind] for kind in CHANGING)
        # The last: when all was done.
        cases = (f"{operation}:{how}:{call + 1}" for call in range(calls + 1) for how in ("ordered", "unordered"))
        yield from shuffled(cases, f"{self._settings.seed}/{operation}")

    def run(self, case: str, place: Path) -> Outcome:
        name, how, number = case.split(":")
        operation, pick = OPERATIONS[name], random.Random(case)
        directory, states = self._bases.copy(operation.base, place), operation.states()
        trace = Trace(place / "trace", place / "graveyard")
        trace.graveyard.mkdir()
        disk = Disk.of(directory)
        done = killed(name, directory, int(number), "once", trace)
        if trace.file.exists():
            disk.follow(trace.file.read_text())
        contents = {path.lstat().st_ino: path for path in (*directory.rglob("*"), *trace.graveyard.iterdir())}
        for draw in range(DRAWS):
            left = place / f"left-{draw}"
            disk.write(left, contents, how == "ordered", pick)
            try:
                if done == 0 and operation.base == "none":
                    call(create, left, states[:2])
                    continue
                if operation.erases and done == len(operation.steps):
                    erased(left)
                call(survivors, left, states[done : done + 2])
            except Wrong as wrong:
                raise Wrong(f"{disk.last}; {done} acknowledged: {wrong}") from wrong
        return Outcome("acknowledged commits, and the one in flight or not", DRAWS)


class Renamed(NamedTuple):
    """A change of names that may not be on the disk yet: `path` has this inode now, or none; `before` none."""

    path: str
    inode: int | None
    before: str | None


@dataclass
class Disk:
    """A directory as it is on the disk for sure, and what may be.

    Attributes:
        names: inodes by path, for sure.
        folders: paths of directories; that they are there costs nobody anything.
        pending: changes of names, in order.
        unflushed: inodes that were written since they were flushed.
        last: the last change.
    """

    names: dict[str, int]
    folders: set[str]
    pending: list[Renamed] = field(default_factory=list)
    unflushed: set[int] = field(default_factory=set)
    last: str = "nothing was changed"

    @classmethod
    def of(cls, directory: Path) -> Disk:
        """A directory of which everything is flushed."""
        paths = {f"/{path.relative_to(directory)}": path for path in directory.rglob("*")}
        files = {name: path.lstat().st_ino for name, path in paths.items() if not path.is_dir()}
        return cls(files, {name for name, path in paths.items() if path.is_dir()})

    def follow(self, trace: str) -> None:
        """Go on with what was written down."""
        live = dict(self.names)
        for line in trace.splitlines():
            kind, number, path, before = line.split("\t")
            inode, self.last = int(number), f"last: {kind} {path}"
            if kind == "mkdir":
                self.folders.add(path)
            elif kind == "write":
                self.unflushed.add(inode)
            elif kind == "sync" and (path in self.folders or path == ""):
                self._flush(path)
            elif kind == "sync":
                self.unflushed.discard(inode)
            elif kind == "unlink" and path in self.folders:
                self.folders.discard(path)
            elif kind != "create" or live.get(path) != inode:
                change = Renamed(path, inode or None, before if kind == "rename" else None)
                if kind == "create":
                    self.unflushed.add(inode)
                self.pending.append(change)
                _apply(live, change)

    def _flush(self, folder: str) -> None:
        kept = []
        for change in self.pending:
            if folder in {path.rpartition("/")[0] for path in (change.path, change.before) if path is not None}:
                _apply(self.names, change)
            else:
                kept.append(change)
        self.pending = kept

    def write(self, directory: Path, contents: dict[int, Path], ordered: bool, pick: random.Random) -> None:
        """Make one of the directories that may be there when the power is back."""
        names = dict(self.names)
        moment = pick.randint(0, len(self.pending))
        for number, change in enumerate(self.pending):
            if number < moment if ordered else pick.random() < 0.5:
                _apply(names, change)
        directory.mkdir()
        for path, inode in names.items():
            if inode not in contents:
                continue  # of a library that renames past libc (tantivy, in the folder of an index)
            to = directory / path[1:]
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(contents[inode], to)
            if inode in self.unflushed:
                data = to.read_bytes()
                to.write_bytes(pick.choice([data, data[: len(data) // 2], b"", bytes(len(data))]))


def _apply(names: dict[str, int], change: Renamed) -> None:
    if change.before is not None:
        names.pop(change.before, None)
    if change.inode is None:
        names.pop(change.path, None)
    else:
        names[change.path] = change.inode
