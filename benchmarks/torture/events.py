"""The oracle: changes of a bank as plain data, and the dictionary that the bank must agree with after them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Change(NamedTuple):
    """One change: a document put in, or in another's place; `text` None: deleted."""

    key: str
    text: str | None
    version: int


class Held(NamedTuple):
    """A document as a bank has it."""

    id: int
    version: int | None
    text: str


@dataclass(frozen=True)
class State:
    """The contents that a bank must have.

    Attributes:
        documents: by key.
        deleted: versions of deleted keys.
        next_id: the first id that no document ever had.
    """

    documents: dict[str, Held] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)
    next_id: int = 0

    def after(self, changes: Iterable[Change]) -> State:
        """The state after one commit."""
        documents, deleted, next_id = dict(self.documents), dict(self.deleted), self.next_id
        for key, text, version in changes:
            held = documents.get(key)
            known = deleted.get(key, -1) if held is None else held.version
            if known is not None and version <= known:
                continue  # a late event
            if text is None:
                documents.pop(key, None)
                deleted[key] = version
            elif held is None:
                documents[key] = Held(next_id, version, text)
                next_id += 1
            else:
                documents[key] = Held(held.id, version, text)
        return State(documents, deleted, next_id)


def events(seed: object, number: int, keys: int = 8) -> list[Change]:
    """The changes of commit `number`, each of another key; some of them late. None: compact instead."""
    pick = random.Random(f"{seed}/{number}")
    if pick.random() < 0.15:
        return []
    changes = []
    for key in pick.sample(range(keys), pick.randint(1, 5)):
        version = max(number - pick.choice([0, 0, 0, 3, 10]), 0)
        text = None if pick.random() < 0.3 else text_of(f"{number}", pick)
        changes.append(Change(f"key {key}", text, version))
    return changes


def text_of(name: str, pick: random.Random) -> str:
    """A text that no other name gives, of a few chunks."""
    return f"text {name} " + "x" * pick.randint(0, 40)
