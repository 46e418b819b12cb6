"""A clock that tests move."""

from __future__ import annotations


class Clock:
    """A clock that tests move; every look at it takes a millisecond."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        self.time += 0.001
        return self.time
