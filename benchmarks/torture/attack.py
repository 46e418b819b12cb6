"""The form of an attack: cases with names, each of which the bank survives or does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Wrong(Exception):
    """A bank that is not what it must be: what an attack is to bring to light."""


class Skipped(Exception):
    """An attack that this machine cannot carry out; says why."""


@dataclass(frozen=True)
class Settings:
    """The options that attacks have in common.

    Attributes:
        seed: every random choice follows from it.
        seconds: of one case of attacks that go on as long as one wants.
        commits: of the long run of commits.
        segments: of the bank that is opened with few descriptors.
        readers: processes beside a writer.
    """

    seed: int = 0
    seconds: float = 5.0
    commits: int = 100_000
    segments: int = 3000
    readers: int = 20


@dataclass
class Outcome:
    """What came of a case that was survived.

    Attributes:
        word: for the table; cases with the same one are counted together.
        times: single trials in the case.
        figures: measured, by name.
    """

    word: str
    times: int = 1
    figures: dict[str, float] = field(default_factory=dict)


class Attack(Protocol):
    """One way to try a bank.

    Attributes:
        name: of `--only`.
        title: for the table.
        seconds: that are left to it, set by whoever runs it.
    """

    name: str
    title: str
    seconds: float

    def cases(self) -> Iterator[str]:
        """Names of cases, `kind:...`, in the order in which they are tried; perhaps without an end."""
        ...

    def run(self, case: str, place: Path) -> Outcome:
        """Carry one out in an empty directory.

        Raises:
            Wrong: where the bank did not survive it.
            Skipped: where it cannot be carried out here.
        """
        ...


@dataclass
class Score:
    """Everything that came of an attack."""

    name: str
    title: str
    tried: Counter[str] = field(default_factory=Counter)  # by kind
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)  # case -> what is wrong
    skipped: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    complete: bool = False  # every case there is
