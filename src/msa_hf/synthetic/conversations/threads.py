"""Threads: statements that belong together, in the order in which they are said, and the question that they answer.

A thread does not know where in the conversation it will stand: it asks for moments, and says what is said at each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta

from .attributes import ATTRIBUTES, COMPARABLE, NAMES, ROLES, Attribute
from .statements import Statement, long_date

Days = tuple[date, ...]


@dataclass(frozen=True)
class Thread:
    """Statements in order, and a question.

    Attributes:
        statements: each stands in a session of its own, later than the one before.
        dated: they say the day on which they hold.
        kind, sort: of the question; "" for a thread that nobody asks about.
        ask: makes text and answer of the days of the sessions; None: there is no answer.
        gold: which of the statements the question takes.
        stale: answers that were right once.
        seen: of the question.
    """

    statements: tuple[Statement, ...]
    kind: str = ""
    sort: str = ""
    ask: Callable[[Days], tuple[str, str | None]] = field(default=lambda days: ("", None))
    gold: tuple[int, ...] = ()
    stale: tuple[str, ...] = ()
    dated: bool = False
    seen: tuple[tuple[str, str], ...] = ()


class Cast:
    """People and what is said of them: every person and attribute is handed out once.

    Args:
        chance: decides.
        names: of the people.
        roles: that name them.
    """

    def __init__(self, chance: random.Random, names: tuple[str, ...], roles: tuple[str, ...]) -> None:
        self.chance = chance
        self._names, self._roles = list(names), list(roles)
        chance.shuffle(self._names)
        chance.shuffle(self._roles)
        self._known: list[str] = []
        self._used: dict[str, set[str]] = {}

    def person(self) -> str:
        """Somebody of whom nothing was said."""
        if not self._names:
            raise ValueError("There are no people left: ask for fewer questions.")
        name = self._names.pop()
        self._used[name] = set()
        self._known.append(name)
        return name

    def role(self) -> str:
        """A relation of somebody to the user that nobody else has."""
        if not self._roles:
            raise ValueError("There are no roles left: ask for fewer questions.")
        return self._roles.pop()

    def fact(self, attributes: tuple[Attribute, ...] = ATTRIBUTES) -> tuple[str, Attribute]:
        """Somebody, and something that was not said of them: of people already known in one case of two."""
        for _ in range(8):
            if self._known and self.chance.random() < 0.5:
                person = self.chance.choice(self._known)
                free = [item for item in attributes if item.name not in self._used[person]]
                if free and len(self._used[person]) < len(ATTRIBUTES) // 2:
                    return person, self.take(person, self.chance.choice(free))
        person = self.person()
        return person, self.take(person, self.chance.choice(attributes))

    def another(self, person: str) -> Attribute:
        """Something else that was not said of a person whom `fact` gave."""
        free = [item for item in ATTRIBUTES if item.name not in self._used[person]]
        return self.take(person, self.chance.choice(free))

    def take(self, person: str, attribute: Attribute) -> Attribute:
        """Hand out an attribute of a person."""
        self._used[person].add(attribute.name)
        return attribute


def asked_threads(cast: Cast, kind: str, sort: str) -> Thread:
    """A thread with a question of this kind and sort."""
    return _MAKERS[kind, sort](cast)


def idle_threads(cast: Cast, count: int) -> Iterator[Thread]:
    """Threads that nobody asks about: facts, of which one in four changes and one in ten is withdrawn."""
    for _ in range(count):
        person, attribute = cast.fact()
        statements = _chain(cast.chance, person, attribute, 2 if cast.chance.random() < 0.25 else 1)
        if cast.chance.random() < 0.1:
            statements.append(Statement("withdraw", person, attribute))
        yield Thread(tuple(statements), dated=cast.chance.random() < 0.2)


def _chain(
    chance: random.Random, person: str, attribute: Attribute, length: int, pinned: bool = False
) -> list[Statement]:
    """A statement and its updates, all of them with different values."""
    values: list[str] = []
    for _ in range(length):
        values.append(attribute.draw(chance, values))
    return [
        Statement("update" if place else "state", person, attribute, value, pinned=pinned)
        for place, value in enumerate(values)
    ]


def _question(cast: Cast, attribute: Attribute, person: str) -> str:
    return cast.chance.choice(attribute.questions).format(n=person)


def _last(cast: Cast, kind: str, sort: str, length: int, pinned: bool = False, after: int = 0) -> Thread:
    """A thread whose last value is asked for; `after` statements mention it later, without the value."""
    person, attribute = cast.fact()
    chain = _chain(cast.chance, person, attribute, length, pinned)
    text, answer = _question(cast, attribute, person), chain[-1].value
    return Thread(
        (*chain, *(Statement("mention", person, attribute) for _ in range(after))),
        kind,
        sort,
        lambda days: (text, answer),
        (length - 1,),
        tuple(item.value for item in chain[:-1]),
        seen=((person, attribute.name),),
    )


def _said_once(cast: Cast) -> Thread:
    return _last(cast, "single session", "said once", 1, after=cast.chance.randint(0, 1))


def _pinned(cast: Cast) -> Thread:
    return _last(cast, "single session", "pinned", 1, pinned=True)


def _updated_once(cast: Cast) -> Thread:
    return _last(cast, "update", "updated once", 2, after=cast.chance.randint(0, 1))


def _updated_often(cast: Cast) -> Thread:
    return _last(cast, "update", "updated more often", cast.chance.randint(3, 4))


def _named_elsewhere(cast: Cast) -> Thread:
    """A person gets a role in one session; in another, something is said of the role; the name is asked about."""
    person, attribute = cast.fact()
    role, value = cast.role(), attribute.draw(cast.chance)
    text = _question(cast, attribute, person)
    statements = Statement("name", person, role=role), Statement("state", person, attribute, value, role=role)
    seen = ((person, attribute.name),)
    return Thread(statements, "across sessions", "named elsewhere", lambda days: (text, value), (0, 1), seen=seen)


def _said_of_another(cast: Cast) -> Thread:
    """Ask about somebody of whom the same is said as of another person, whose value stands in another session."""
    person, attribute = cast.fact()
    other, value = cast.person(), attribute.draw(cast.chance)
    cast.take(other, attribute)
    text = _question(cast, attribute, other)
    statements = Statement("state", person, attribute, value), Statement("same", person, attribute, other=other)
    seen = ((other, attribute.name),)
    return Thread(statements, "across sessions", "said of another", lambda days: (text, value), (0, 1), seen=seen)


def _comparison(cast: Cast) -> Thread:
    person, attribute = cast.fact(COMPARABLE)
    other = cast.person()
    cast.take(other, attribute)
    first = attribute.draw(cast.chance)
    second = attribute.draw(cast.chance, (first,))
    higher = person if _number(first) > _number(second) else other
    text = f"Whose {attribute.name} is the higher number, {person}'s or {other}'s?"
    statements = Statement("state", person, attribute, first), Statement("state", other, attribute, second)
    seen = ((person, attribute.name), (other, attribute.name))
    return Thread(
        statements,
        "across sessions",
        "comparison",
        lambda days: (text, higher),
        (0, 1),
        _others(higher, seen),
        seen=seen,
    )


def _as_of(cast: Cast) -> Thread:
    """Ask which value held on a day between two changes."""
    person, attribute = cast.fact()
    chain = _chain(cast.chance, person, attribute, 3)
    place, share = cast.chance.randint(0, 1), cast.chance.random()

    def ask(days: Days) -> tuple[str, str | None]:
        apart = (days[place + 1] - days[place]).days
        day = days[place] + timedelta(min(int(share * apart), apart - 1))
        return f"What was {person}'s {attribute.name} on {long_date(day)}?", chain[place].value

    stale = tuple(item.value for item in chain if item is not chain[place])
    seen = ((person, attribute.name),)
    return Thread(tuple(chain), "time", "as of a day", ask, (place, place + 1), stale, dated=True, seen=seen)


def _before(cast: Cast) -> Thread:
    """Ask which value stood before the one that is named."""
    person, attribute = cast.fact()
    chain = _chain(cast.chance, person, attribute, 2)
    text = f"What was {person}'s {attribute.name} before it was {chain[1].value}?"
    answer, seen = chain[0].value, ((person, attribute.name),)
    return Thread(tuple(chain), "time", "before", lambda days: (text, answer), (0, 1), (chain[1].value,), seen=seen)


def _which_first(cast: Cast) -> Thread:
    """Ask of whom something was said first."""
    person, attribute = cast.fact()
    other = cast.person()
    cast.take(other, attribute)
    first = attribute.draw(cast.chance)
    second = attribute.draw(cast.chance, (first,))
    pair = sorted((person, other))
    text = f"Of whom did I tell you the {attribute.name} first, {pair[0]} or {pair[1]}?"
    statements = Statement("state", person, attribute, first), Statement("state", other, attribute, second)
    seen = ((person, attribute.name), (other, attribute.name))
    return Thread(
        statements, "time", "which first", lambda days: (text, person), (0, 1), (other,), dated=True, seen=seen
    )


def _never_said(cast: Cast) -> Thread:
    """Ask of somebody who was spoken of something that was not said."""
    person, attribute = cast.fact()
    said = cast.another(person)
    text = _question(cast, attribute, person)
    statements = (Statement("state", person, said, said.draw(cast.chance)),)
    seen = ((person, attribute.name),)
    return Thread(statements, "unanswerable", "never said", lambda days: (text, None), seen=seen)


def _withdrawn(cast: Cast) -> Thread:
    """Something that was said, perhaps changed, and taken back."""
    person, attribute = cast.fact()
    chain = _chain(cast.chance, person, attribute, cast.chance.randint(1, 2))
    text = _question(cast, attribute, person)
    statements = (*chain, Statement("withdraw", person, attribute))
    stale = tuple(item.value for item in chain)
    return Thread(
        statements,
        "unanswerable",
        "withdrawn",
        lambda days: (text, None),
        (len(chain),),
        stale,
        seen=((person, attribute.name),),
    )


def _number(value: str) -> int:
    return int(value.split()[0])


def _others(person: str, seen: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(name for name, _ in seen if name != person)


_MAKERS: dict[tuple[str, str], Callable[[Cast], Thread]] = {
    ("single session", "said once"): _said_once,
    ("single session", "pinned"): _pinned,
    ("across sessions", "named elsewhere"): _named_elsewhere,
    ("across sessions", "said of another"): _said_of_another,
    ("across sessions", "comparison"): _comparison,
    ("update", "updated once"): _updated_once,
    ("update", "updated more often"): _updated_often,
    ("time", "as of a day"): _as_of,
    ("time", "before"): _before,
    ("time", "which first"): _which_first,
    ("unanswerable", "never said"): _never_said,
    ("unanswerable", "withdrawn"): _withdrawn,
}


def cast_of(seed: int, part: str) -> Cast:
    """The people whom questions are about ("asked"), or other people with other roles ("idle")."""
    half = len(NAMES) // 2, len(ROLES) // 2
    order = random.Random(f"{seed} names")
    names, roles = list(NAMES), list(ROLES)
    order.shuffle(names)
    order.shuffle(roles)
    asked = part == "asked"
    chosen = (names[: half[0]], roles[: half[1]]) if asked else (names[half[0] :], roles[half[1] :])
    return Cast(random.Random(f"{seed} {part}"), tuple(chosen[0]), tuple(chosen[1]))
