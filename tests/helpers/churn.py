"""A writer to be killed, and what it must have done: `serve()` forks one for every line it reads.

A line is `directory first`; the writer applies event `first`, `first + 1`, ... and says `ack n` when event n is
committed. `dead` follows when it is gone.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import tempfile
from typing import Any

from fake_model import FakeModel

from msa_hf.bank import BankStore

State = dict[str, tuple[int, str | None]]  # key -> version, text or None


def event(number: int) -> list[tuple[str, str | None, int]]:
    """Changes of one commit: key, text (None: delete), version; some of them repeated or late. Empty: compact."""
    pick = random.Random(number)
    if pick.random() < 0.15:
        return []
    changes = []
    for _ in range(pick.randint(1, 5)):
        version = max(number - pick.choice([0, 0, 0, 3, 10]), 0)
        text = None if pick.random() < 0.3 else f"text {number} " + "x" * pick.randint(0, 20)
        changes.append((f"key {pick.randrange(8)}", text, version))
    return changes


def apply(state: State, changes: list[tuple[str, str | None, int]]) -> State:
    """The dictionary that a bank must agree with."""
    state = dict(state)
    for key, text, version in changes:
        if version > state.get(key, (-1, None))[0]:
            state[key] = (version, text)
    return state


def commit(bank: Any, changes: list[tuple[str, str | None, int]]) -> None:
    if not changes:
        bank.compact()
        return
    with bank.batch():
        for key, text, version in changes:
            if text is None:
                bank.delete(key, version)
            else:
                bank.upsert(key, text, version)


def write(directory: str, first: int) -> None:
    with BankStore(FakeModel(), directory) as bank:
        for number in itertools.count(first):
            commit(bank, event(number))
            os.write(1, f"ack {number}\n".encode())


def serve() -> None:
    """Fork a writer for every line of the input."""
    with tempfile.TemporaryDirectory() as warm, BankStore(FakeModel(), warm) as first_bank:
        for number in range(20):  # what is imported on first use is there before the first fork
            commit(first_bank, event(number))
    for line in sys.stdin:
        directory, first = line.split()
        if (child := os.fork()) == 0:
            try:
                os.write(1, f"pid {os.getpid()}\n".encode())  # by the child, so that it comes before its first ack
                write(directory, int(first))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")
