"""Which files of a folder are read: one rule for hidden, linked and doubly reachable ones.

* What begins with `.` or `~$` is hidden and left out, a folder with all that it holds.
* Links are followed, to files and to folders, wherever they lead; but not to a folder that holds this one.
* A file is read once, however many names it has: under the name that leads over no link, of several under the first. So
  links in a circle end.
* What is neither a file nor a folder, such as a pipe, is left out.
* Files come in the order of their paths, folder by folder.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HIDDEN = (".", "~$")


@dataclass(frozen=True)
class Skipped:
    """Something that was left out.

    Attributes:
        place: a path in the folder, or file and line.
        reason: such as `"hidden"`; equal ones are counted together.
        bad: it should have been read and could not be.
    """

    place: str
    reason: str
    bad: bool = False


class Found(NamedTuple):
    """The files of a folder, in order, as paths inside of it; and what was left out."""

    names: list[str]
    skipped: list[Skipped]


def find_files(folder: Path, patterns: Sequence[str] = ()) -> Found:
    """The files of a folder and of the folders in it.

    Args:
        patterns: those to read, all where there are none. A pattern without `/` is of names (`*.md`), another one of
            paths inside the folder (`notes/**/*.txt`); `*` and `?` stop at `/`, `**` does not.
    """
    wanted = [_compiled(pattern) for pattern in patterns]
    skipped: list[Skipped] = []
    links: list[Path] = []
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def walk(start: Path, follow: bool) -> None:
        """Look at a place and all below it in order; links are put off, so that a file's own name comes first."""
        stack = [start]
        while stack:
            place = stack.pop()
            name = place.as_posix()
            try:
                status = (folder / place).stat(follow_symlinks=follow)
                if stat.S_ISLNK(status.st_mode):
                    links.append(place)
                    continue
                follow = False
                identity = status.st_dev, status.st_ino
                if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
                    skipped.append(Skipped(name, "neither a file nor a folder"))
                elif stat.S_ISREG(status.st_mode) and wanted and not any(item.fullmatch(name) for item in wanted):
                    continue
                elif identity in seen:
                    skipped.append(Skipped(name, "another name of what is there"))
                elif stat.S_ISREG(status.st_mode):
                    seen.add(identity)
                    files.append(place)
                else:
                    seen.add(identity)
                    entries = sorted(os.listdir(folder / place), reverse=True)
                    skipped.extend(
                        Skipped((place / entry).as_posix(), "hidden") for entry in entries if entry.startswith(HIDDEN)
                    )
                    stack += [place / entry for entry in entries if not entry.startswith(HIDDEN)]
            except FileNotFoundError:
                skipped.append(Skipped(name, "a link that leads nowhere"))
            except OSError as error:
                if error.errno == errno.ELOOP:
                    skipped.append(Skipped(name, "a link that leads nowhere but back"))
                else:
                    skipped.append(Skipped(name, error.strerror or str(error), bad=True))

    seen.update((status.st_dev, status.st_ino) for status in map(Path.stat, folder.resolve().parents))
    walk(Path(), follow=True)
    while links:
        links.sort(key=lambda place: place.parts, reverse=True)
        walk(links.pop(), follow=True)
    files.sort(key=lambda place: place.parts)
    skipped.sort(key=lambda item: item.place.split("/"))
    return Found([place.as_posix() for place in files], skipped)


def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of paths as a regular expression."""
    whole = pattern if "/" in pattern else f"**/{pattern}"
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", whole.removeprefix("./").removeprefix("/"))
    made = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            piece.replace("[!", "[^", 1) if piece.startswith("[") else made.get(piece) or re.escape(piece)
            for piece in pieces
        ),
        flags=re.DOTALL,
    )
