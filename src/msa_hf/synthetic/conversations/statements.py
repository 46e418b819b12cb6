"""Statements about people in a conversation, as data and in words."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import date
from typing import Literal

from .attributes import Attribute

Act = Literal["state", "update", "withdraw", "mention", "name", "same"]

_UPDATES = (
    "There is news: {said}",
    "That has changed. {said}",
    "What I told you about {who}'s {attribute} is out of date. {said}",
)
_WITHDRAWALS = (
    "Please forget what I said about {who}'s {attribute}. It was a mistake, and nobody has told me what is right.",
    "I was wrong about {who}'s {attribute}. Disregard it: I do not know.",
)
_MENTIONS = (
    "I had to think of {who}'s {attribute} again today, about which I told you once.",
    "Somebody asked me about {who}'s {attribute} at lunch, and I said that you would know.",
    "You remember that we talked about {who}'s {attribute}.",
)
_NAMINGS = ("By the way, {who} is my {role}.", "The person I call my {role} is {who}.")
_SAME = (
    "{other} has the same {attribute} as {who}.",
    "As to the {attribute}: with {other} it is just what I told you about {who}.",
)


@dataclass(frozen=True, slots=True)
class Statement:
    """Something that a turn says.

    Attributes:
        act: "state": an attribute has a value. "update": from now on it has another one. "withdraw": what was said of
            it does not count. "mention": it is spoken of without its value. "name": a person is the user's `role`.
            "same": `other` has the same value as the person.
        person, attribute: whom and what it is about; no attribute for "name".
        value: of "state" and "update".
        role: by which the person is named; given to "name", and to a statement that uses it in place of the name.
        other: of "same".
        pinned: the user asks for it to be kept in view, see `pin_of`.
    """

    act: Act
    person: str
    attribute: Attribute | None = None
    value: str = ""
    role: str = ""
    other: str = ""
    pinned: bool = False

    def words(self, chance: random.Random, day: date | None = None) -> str:
        """A sentence or two that say it; with a day, that it holds since then."""
        named = f"my {self.role}" if self.role else self.person
        if self.act == "name":
            return chance.choice(_NAMINGS).format(who=self.person, role=self.role)
        assert self.attribute is not None
        fields = {"who": named, "attribute": self.attribute.name, "other": self.other}
        if self.act == "withdraw":
            return chance.choice(_WITHDRAWALS).format(**fields)
        if self.act == "mention":
            return chance.choice(_MENTIONS).format(**fields)
        if self.act == "same":
            return chance.choice(_SAME).format(**fields)
        said = chance.choice(self.attribute.sentences).format(n=named, v=self.value)
        said = said[0].upper() + said[1:]
        if day is not None:
            said = f"Since today, {long_date(day)}: {said}"
        if self.act == "update":
            said = chance.choice(_UPDATES).format(said=said, **fields)
        return f"{_PIN}{self.person}'s {self.attribute.name}: {said}" if self.pinned else said


_PIN = "Keep this in view, "


def pin_of(text: str) -> tuple[str, str] | None:
    """The name and the text of what a user asks to be kept in view: "Keep this in view, <name>: <text>"; else None."""
    if not text.startswith(_PIN):
        return None
    name, _, said = text.removeprefix(_PIN).partition(": ")
    return name, said


def long_date(day: date) -> str:
    """A date such as 3 March 2026."""
    return f"{day.day} {day:%B} {day.year}"
