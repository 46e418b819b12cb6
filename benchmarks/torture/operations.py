"""The operations under attack: what each does to a bank, and to the state that the bank must be in."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .events import Change, Held, State, events, text_of

Bank = Any  # a BankStore: this file is imported where nothing of the package is
SAVED = State({f"saved {row}": Held(row, None, f"text saved {row}") for row in range(4)}, {}, 4)


@dataclass(frozen=True)
class Step:
    """One commit, or what is none.

    Attributes:
        act: carries it out, on an open bank or in a directory.
        after: the state after it, from the one before.
    """

    act: Callable[[Bank, Path], object]
    after: Callable[[State], State] = lambda state: state


@dataclass(frozen=True)
class Operation:
    """Steps on a bank.

    Attributes:
        base: name in `BASES`, of the bank that lies there before.
        options: of opening it. None: no bank is opened, the steps work on the directory.
        opening: opening it is under attack as well.
        erases: after it, no file holds a text that no document has.
    """

    base: str
    steps: list[Step]
    options: dict[str, Any] | None = field(default_factory=dict)
    opening: bool = False
    erases: bool = False

    def states(self) -> list[State]:
        """The state before the first step, and after each."""
        states = [BASES[self.base]]
        for step in self.steps:
            states.append(step.after(states[-1]))
        return states


# Banks that lie there before -----------------------------------------------------------------------------------------


def _mixed() -> list[list[Change]]:
    pick = random.Random(1)
    commits = [[Change(f"k{row}", text_of(f"k{row}", pick), 1) for row in range(at, at + 4)] for at in (0, 4, 8)]
    return [*commits, [Change("k1", None, 9)], [Change("k6", None, 9)], [Change("k2", "another text", 3)]]


def _states(commits: Iterable[list[Change]]) -> State:
    state = State()
    for changes in commits:
        state = state.after(changes)
    return state


def _churned() -> list[list[Change]]:
    """So many commits that small segments were merged, and a checkpoint of the log was written."""
    return [changes for number in range(60) if (changes := events("churned", number, keys=12)) or number < 40]


def _saved_of(state: State) -> State:
    return State(state.documents, {}, state.next_id)  # `save_pretrained` of a snapshot forgets what was deleted


BASES = {
    "none": State(),
    "mixed": _states(_mixed()),
    "churned": _states(_churned()),
    "copied": _saved_of(_states(_mixed())),
    "version1": SAVED,
}
ERASED = ("text k1 ", "text k2 ", "text k6 ")  # texts of documents of the base `mixed` that were deleted or replaced


def make_base(name: str, directory: Path) -> None:
    """Make one of `BASES`; in a child."""
    from .check import commit
    from .stub import open_bank

    if name in ("mixed", "churned"):
        # Shards so small that there are several.
        with open_bank(directory, max_shard_size=1000 if name == "mixed" else "1GB") as bank:
            for changes in _mixed() if name == "mixed" else _churned():
                commit(bank, changes)
    elif name == "copied":
        make_base("mixed", directory / "of")
        open_bank(directory / "of", read_only=True).snapshot().save_pretrained(directory)
        shutil.rmtree(directory / "of")
    elif name == "version1":
        save(directory)


def save(directory: Path) -> None:
    """Put the bank `SAVED` into a directory with `save_pretrained`."""
    from .stub import StubModel

    rows = [{"key": key, "text": held.text} for key, held in SAVED.documents.items()]
    StubModel().encode_documents(rows).save_pretrained(directory, max_shard_size=300)


# Operations -----------------------------------------------------------------------------------------------------------


def _commit(*changes: Change) -> Step:
    def act(bank: Bank, directory: Path) -> None:
        from .check import commit

        commit(bank, changes)

    return Step(act, lambda state: state.after(changes))


def _add(bank: Bank, directory: Path) -> None:
    bank.add([{"key": "new", "text": "a new text", "version": 5}])


NEW = Change("new", "a new text", 5)
ADD = Step(_add, lambda state: state.after([NEW]))

ADD_MORE = _commit(Change("more", "one more", 6))

OPERATIONS = {
    "add": Operation("mixed", [ADD]),
    "upsert": Operation("mixed", [_commit(Change("k3", "k3 has this text now", 5))]),
    "delete": Operation("mixed", [_commit(Change("k4", None, 5))]),
    "batch": Operation(
        "mixed",
        [_commit(NEW, Change("more", "one more", 5), Change("k3", "k3 is changed", 5), Change("k4", None, 5))],
    ),
    "compact": Operation("mixed", [Step(lambda bank, directory: bank.compact())], erases=True),
    "delete_compact": Operation(
        "mixed", [_commit(Change("k4", None, 5)), Step(lambda bank, directory: bank.compact())], erases=True
    ),
    "forget": Operation("mixed", [Step(lambda bank, directory: bank.forget_deletions(20), lambda state: state)]),
    "checkpoint": Operation("mixed", [ADD, Step(lambda bank, directory: bank.checkpoint()), ADD_MORE]),
    # So many commits that small segments are merged, and a checkpoint of the log is written, at some of them.
    "many": Operation("mixed", [_commit(*(events("many", number) or [NEW])) for number in range(1, 41)]),
    "open": Operation("mixed", [ADD], opening=True),
    "create": Operation("none", [ADD], opening=True),
    "upgrade": Operation("version1", [ADD]),
    "upgrade_ids": Operation("copied", [ADD]),
    "go_on": Operation("churned", [ADD, _commit(Change("key 1", None, 99)), _commit(Change("key 2", "later", 99))]),
    "save": Operation("mixed", [Step(lambda bank, directory: save(directory), lambda state: SAVED)], options=None),
    "close": Operation("mixed", [ADD, Step(lambda bank, directory: bank.close())]),
    "index": Operation("mixed", [ADD], options={"lexical": True}, opening=True),
}
