"""Readers beside a writer: whatever they read is a state that the bank was in, as a whole."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attack import Outcome, Settings, Wrong
from .children import Child, killed_at_the_end
from .events import Change, Held, State, events

CLOCK = "clock"  # a document whose text is the number of the commit, so that a reader knows which state it reads
WAYS = ("open", "refresh", "load", "lookup")


class Readers:
    """Many processes read while one adds, replaces, deletes and compacts."""

    name = "readers"
    title = "readers beside a writer"
    seconds = 0.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def cases(self) -> Iterator[str]:
        for number in itertools.count(self._settings.seed * 1000):
            yield f"beside:{number}"

    def run(self, case: str, place: Path) -> Outcome:
        seed, directory, seconds = int(case.split(":")[1]), place / "bank", self._settings.seconds
        writer = Child(write_clock, directory, seed)
        with killed_at_the_end(writer):
            said = writer.said(seconds + 120)
            next(said)
            until = time.time() + seconds
            readers = [
                Child(read_clock, directory, seed, until, WAYS[number % len(WAYS)])
                for number in range(self._settings.readers)
            ]
            with killed_at_the_end(*readers):
                counted: Counter[str] = Counter()
                for reader in readers:
                    for word, count in reader.said(seconds + 120):
                        counted[word] += count
        writer.kill()
        commits = sum(1 for _ in said)
        if not counted["read"]:
            raise Wrong(f"nothing was read: {dict(counted)}")
        figures = {"commits meanwhile": float(commits), "refused in words": float(counted["refused"])}
        return Outcome("consistent", counted["read"], figures)


def changes_of(seed: int, number: int) -> list[Change]:
    """The changes of a commit; none: compact."""
    changes = events(seed, number, keys=16)
    return changes and [*changes, Change(CLOCK, str(number), number)]


class States:
    """The state after each commit, from the first."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states = [State().after([Change(CLOCK, "0", 0)])]

    def __getitem__(self, number: int) -> State:
        for later in range(len(self._states), number + 1):
            self._states.append(self._states[-1].after(changes_of(self._seed, later)))
        return self._states[number]


# In a child -----------------------------------------------------------------------------------------------------------


def write_clock(say: Callable[[object], None], directory: Path, seed: int) -> None:
    """Commit without an end; says the number of each."""
    from .check import commit
    from .stub import open_bank

    with open_bank(directory) as bank:
        bank.upsert(CLOCK, "0", 0)
        for number in itertools.count(1):
            commit(bank, changes_of(seed, number))
            say(number)


def read_clock(say: Callable[[object], None], directory: Path, seed: int, until: float, way: str) -> None:
    """Read again and again; says how often, and how often it was refused."""
    from msa_hf.bank import BankDamaged, BankError, BankFormatError
    from msa_hf.model.memory_msa import MemoryBank

    from .check import contents
    from .stub import open_bank

    states, counted, last = States(seed), Counter[str](), -1
    kept: Any = None
    while time.time() < until:
        try:
            if way == "load":
                read = MemoryBank.from_pretrained(directory)
            elif way == "refresh":
                kept = kept or open_bank(directory, read_only=True)
                kept.refresh()
                read = kept.snapshot()
            else:
                kept = open_bank(directory, read_only=True)
                read = kept.snapshot()
            number = is_consistent(contents(read), states, last)
            if way == "lookup":
                look_up(kept, states[number])
        except Wrong as wrong:
            raise Wrong(f"{way}: {wrong}") from wrong
        except (BankDamaged, BankFormatError) as error:
            raise Wrong(f"{way}: {type(error).__name__}, though nothing is damaged: {error}") from error
        except BankError:
            counted["refused"] += 1
            kept = None
            continue
        except Exception as error:
            raise Wrong(f"{way}: {type(error).__name__}: {error}") from error
        last = number
        counted["read"] += 1
    for item in counted.items():
        say(item)


def is_consistent(found: dict[str, Held], states: States, last: int) -> int:
    """Make sure that documents are a whole state, none before commit `last`; returns the number of its commit."""
    number = int(found[CLOCK].text) if CLOCK in found else -1
    if number < last:
        raise Wrong(f"commit {number} was read after commit {last}")
    if found != states[number].documents:
        raise Wrong(f"commit {number} is not what was written")
    return number


def look_up(bank: Any, state: State) -> None:
    """Look every key up; a bank that moves on to a later commit meanwhile may say what that one says."""
    from .check import lookups

    generation = bank.generation
    try:
        lookups(bank, state)
    except Wrong:
        if bank.generation == generation:
            raise
