"""Kills: a writer that dies at any moment loses nothing that it acknowledged, and leaves nothing half done."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .attack import Outcome, Settings, Wrong
from .children import Child, call
from .events import State, events
from .faults import Bases, killed, round_robin, shuffled
from .operations import BASES, OPERATIONS
from .shim import CHANGING

KILLS = 5  # of a round


class Kills:
    """Kills at every system call that changes something, before it and after it, and at random moments."""

    name = "kills"
    title = "SIGKILL of a writer"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases
        self._span = 0.08  # seconds until a kill, at most

    def cases(self) -> Iterator[str]:
        """`add:before:7`: killed before the seventh system call of `add`; `random:3`: at random moments."""
        exact = round_robin(*(self._exact_cases(operation) for operation in OPERATIONS))
        for number in itertools.count(self._settings.seed * 1000):
            yield from itertools.islice(exact, len(OPERATIONS))
            yield f"random:{number}"

    def _exact_cases(self, operation: str) -> Iterator[str]:
        counted = self._bases.counts(operation)
        calls = sum(counted[kind] for kind in CHANGING)
        cases = (f"{operation}:{how}:{call + 1}" for call in range(calls) for how in ("before", "after"))
        yield from shuffled(cases, f"{self._settings.seed}/{operation}")

    def run(self, case: str, place: Path) -> Outcome:
        kind, *how = case.split(":")
        return self._round(int(how[0]), place) if kind == "random" else self._exact(kind, *how, place=place)

    def _exact(self, name: str, when: str, number: str, place: Path) -> Outcome:
        operation = OPERATIONS[name]
        directory, states = self._bases.copy(operation.base, place), operation.states()
        done = killed(name, directory, int(number), "once" if when == "before" else "after")
        possible = states[done : done + 2]
        if done == 0 and operation.base == "none":
            call(create, directory, possible)
            return Outcome("no bank, half made: made anew")
        reached = call(survivors, directory, possible)
        return Outcome("acknowledged commits alone" if reached == 0 else "the one in flight as well")

    def _round(self, seed: int, place: Path) -> Outcome:
        pick, directory, state, number, flying = random.Random(seed), place / "bank", State(), 0, 0
        for _ in range(KILLS):
            writer = Child(write, directory, seed, number)
            said = writer.said(120)
            next(said)  # it is about to open the bank
            time.sleep(pick.uniform(0, self._span))
            writer.kill()
            before = number
            for acknowledged in said:
                if acknowledged != number:
                    raise Wrong(f"commit {acknowledged} was acknowledged in the place of {number}")
                state, number = state.after(events(seed, number)), number + 1
            self._span *= 1.15 if number == before else 0.95  # as long as a few commits take here
            states = [state, state.after(events(seed, number))]
            if call(survivors, directory, states):
                state, number, flying = states[1], number + 1, flying + 1
        return Outcome("acknowledged commits, and the one in flight or not", KILLS)


# In a child -----------------------------------------------------------------------------------------------------------


def write(say: Callable[[object], None], directory: Path, seed: int, first: int) -> None:
    """Commit event after event, and say the number of each."""
    from .check import commit
    from .stub import open_bank

    say(-1)
    with open_bank(directory) as bank:
        for number in itertools.count(first):
            commit(bank, events(seed, number))
            say(number)


def survivors(directory: Path, states: list[State]) -> int:
    """The number of the state that a bank is in, after its writer was killed."""
    from .check import check
    from .stub import open_bank

    try:
        # As the next writer would, which may be needed before it can be read.
        open_bank(directory).close()
    except Exception as error:
        raise Wrong(f"cannot be opened to write: {type(error).__name__}: {error}") from error
    return check(directory, states)


def create(directory: Path, states: list[State]) -> None:
    """Make a bank where a writer was killed that was about to."""
    survivors(directory, [BASES["none"], *states])
