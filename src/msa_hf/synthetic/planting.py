"""Facts planted in a world, so that questions of a chosen kind have one answer, and their twins none.

Every question has entities of its own, whose records are changed: made to lead to each other, to differ, to agree, or
to leave out what is asked. A twin asks in the same words about other entities, where one link is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from .hashing import Draws, Permutation
from .kinds import BREAKS, HOPS, Broken, ChainKind
from .names import KINDS
from .templates import ATTRIBUTES, with_article
from .two_entities import COMPARISONS, HAPPENINGS, JOIN_QUESTIONS, ORDER_QUESTIONS, measure_of
from .world import Entities, Statement, World

_TRIES = 200  # entities that are looked at for one question
_EDITIONS = ("Edition {}. ", "Version {}. ", "Register of {}. ", "As of {}: ")


@dataclass
class Record:
    """The statement of one document about an entity.

    Attributes:
        serial: of the entity in its world.
        heading: stands before the text; of editions only.
    """

    serial: int
    kind: int
    name: str
    statements: list[Statement]
    heading: str = ""

    @property
    def subject(self) -> str:
        return with_article(self.kind, self.name)

    def states(self, attribute: int) -> str | None:
        return next((value for number, value in self.statements if number == attribute), None)

    def tells(self, text: str) -> bool:
        """Tell whether the text stands in the document."""
        return text in self.subject or any(text in value for _, value in self.statements)


@dataclass
class Planted:
    """A question with the records it needs, in the order of the hops.

    Attributes:
        answer: None for a twin.
        broken: what a twin lacks: a link that its document does not state, or the document itself.
        broken_hop: at which hop, from 1; of two entities, which of them.
    """

    kind: ChainKind
    text: str
    answer: str | None
    records: list[Record] = field(default_factory=list)
    broken: Broken | None = None
    broken_hop: int | None = None


class _Chain(NamedTuple):
    """The words of a question of several hops: the kinds of its entities, the attribute of each, and the phrases."""

    kinds: tuple[int, ...]
    attributes: tuple[int, ...]
    phrases: tuple[str, ...]

    def text(self, subject: str) -> str:
        called = subject
        for phrase in self.phrases:
            called = phrase.format(n=called)
        return called


class Planter:
    """Plants questions, each with its twin, in the records of a world.

    Args:
        world: whose entities with a record are used up one by one.
        key: another key gives other questions.

    Raises:
        ValueError: by its methods, where the world has no entities left.
    """

    def __init__(self, world: World, key: int) -> None:
        self._world, self._draws = world, Draws(key, "planting")
        self._left: list[list[int]] = [[] for _ in KINDS]
        order = Permutation(world.recorded, key).forward(np.arange(world.recorded))
        for serial in order[::-1].tolist():
            self._left[serial % len(KINDS)].append(serial)

    def plant(self, kind: ChainKind) -> tuple[Planted, Planted]:
        """A question and its twin."""
        if kind in HOPS:
            return self._chains(kind, HOPS[kind])
        if kind == "comparison":
            return self._comparisons()
        if kind == "order":
            return self._orders()
        if kind == "join":
            return self._joins()
        return self._versions()

    # Chains -----------------------------------------------------------------------------------------------------------

    def _chains(self, kind: ChainKind, hops: int) -> tuple[Planted, Planted]:
        chain = self._words(hops)
        whole = self._retry(lambda: self._whole_chain(kind, chain))
        hop, broken = self._draws.below(hops), self._draws.pick(BREAKS)
        # Before the break everything is as in a whole chain; behind it there is nothing.
        records = [self._take(kind_number) for kind_number in chain.kinds[: hop + (broken == "unstated")]]
        names = [record.name for record in records]
        if broken == "removed":
            names.append(self._unknown(chain.kinds[hop]))
        else:
            self._leave_out(records[-1], chain.attributes[hop])
        for record, attribute, name in zip(records, chain.attributes, names[1:], strict=False):
            self._state(record, attribute, name)
        text = chain.text(with_article(chain.kinds[0], names[0]))
        return whole, Planted(kind, text, None, records, broken, hop + 1)

    def _words(self, hops: int) -> _Chain:
        kinds, attributes, phrases = [self._draws.below(len(KINDS))], [], []
        for _ in range(hops - 1):
            links = [number for number, item in enumerate(ATTRIBUTES[kinds[-1]]) if item.link >= 0]
            attributes.append(self._draws.pick(links))
            link = ATTRIBUTES[kinds[-1]][attributes[-1]]
            phrases.append(self._draws.pick(link.descriptions))
            kinds.append(link.link)
        attributes.append(self._draws.below(len(ATTRIBUTES[kinds[-1]])))
        phrases.append(self._draws.pick(ATTRIBUTES[kinds[-1]][attributes[-1]].questions))
        return _Chain(tuple(kinds), tuple(attributes), tuple(phrases))

    def _whole_chain(self, kind: ChainKind, chain: _Chain) -> Planted | None:
        """None where a document tells what only a later one may."""
        records = [self._take(number) for number in chain.kinds]
        for record, attribute, following in zip(records, chain.attributes, records[1:], strict=False):
            self._state(record, attribute, following.name)
        answer = self._state(records[-1], chain.attributes[-1])
        later = [record.name for record in records[1:]] + [answer]
        for place, record in enumerate(records):
            others = [value for number, value in record.statements if number != chain.attributes[place]]
            if any(name in text for name in later[place:] for text in (*others, record.name)):
                self._give_back(records)
                return None
            if any(name == later[place] for name in later[place + 1 :]):
                self._give_back(records)
                return None
        return Planted(kind, chain.text(records[0].subject), answer, records)

    # Two entities -----------------------------------------------------------------------------------------------------

    def _comparisons(self) -> tuple[Planted, Planted]:
        comparison = self._draws.pick(COMPARISONS)
        question, kinds = self._draws.pick(comparison.questions), (comparison.kind, comparison.kind)
        slots = (comparison.attribute, comparison.attribute)

        def whole() -> Planted | None:
            first, second = records = [self._take(kind) for kind in kinds]
            return self._compared("comparison", records, slots, question, comparison.greatest, first, second)

        return self._retry(whole), self._half("comparison", kinds, slots, lambda n, m: question.format(n=n, m=m))

    def _orders(self) -> tuple[Planted, Planted]:
        one, other = (self._draws.pick(HAPPENINGS) for _ in range(2))
        latest = bool(self._draws.below(2))
        frame = self._draws.pick(ORDER_QUESTIONS[latest])
        phrases = self._draws.pick(one.phrases), self._draws.pick(other.phrases)
        kinds, slots = (one.kind, other.kind), (one.attribute, other.attribute)

        def asked(n: str, m: str) -> str:
            return frame.format(n=phrases[0].format(n=n), m=phrases[1].format(n=m))

        def whole() -> Planted | None:
            records = [self._take(kind) for kind in kinds]
            question = asked("{n}", "{m}")
            return self._compared("order", records, slots, question, latest, *records)

        return self._retry(whole), self._half("order", kinds, slots, asked)

    def _compared(
        self,
        kind: ChainKind,
        records: list[Record],
        slots: tuple[int, int],
        question: str,
        greatest: bool,
        first: Record,
        second: Record,
    ) -> Planted | None:
        """None where both are equal."""
        values = [measure_of(self._state(record, slot)) for record, slot in zip(records, slots, strict=True)]
        if values[0] == values[1]:
            self._give_back(records)
            return None
        answer = records[(values[1] > values[0]) == greatest].name
        return Planted(kind, question.format(n=first.subject, m=second.subject), answer, records)

    def _joins(self) -> tuple[Planted, Planted]:
        kind, question = self._draws.below(len(KINDS)), self._draws.pick(JOIN_QUESTIONS)

        def whole() -> Planted | None:
            first, second = records = [self._take(kind) for _ in range(2)]
            shared, value = self._draws.pick(first.statements)
            if value in (first.name, second.name):
                self._give_back(records)
                return None
            self._state(second, shared, value)
            if len(_agreements(first, second)) != 1:
                self._give_back(records)
                return None
            return Planted("join", question.format(n=first.subject, m=second.subject), value, records)

        def twin() -> Planted | None:
            broken = self._draws.pick(BREAKS)
            known = [self._take(kind) for _ in range(1 + (broken == "unstated"))]
            if len(known) == 2 and _agreements(*known):
                self._give_back(known)
                return None
            named = self._called(known, kind)
            text = question.format(n=named[0], m=named[1])
            missing = 2 if len(known) == 2 or named[0] == known[0].subject else 1
            return Planted("join", text, None, known, broken, missing)

        return self._retry(whole), self._retry(twin)

    def _half(
        self, kind: ChainKind, kinds: tuple[int, int], slots: tuple[int, int], asked: Callable[[str, str], str]
    ) -> Planted:
        """A question about two entities of which one is not known, or does not have what is asked."""
        missing, broken = self._draws.below(2), self._draws.pick(BREAKS)
        records, subjects = [], []
        for place in range(2):
            if place == missing and broken == "removed":
                subjects.append(with_article(kinds[place], self._unknown(kinds[place])))
                continue
            record = self._take(kinds[place])
            if place == missing:
                self._leave_out(record, slots[place])
            else:
                self._state(record, slots[place])
            records.append(record)
            subjects.append(record.subject)
        return Planted(kind, asked(*subjects), None, records, broken, missing + 1)

    def _called(self, known: Sequence[Record], kind: int) -> list[str]:
        """Two subjects: of both, or of one and of somebody without a document, in any order."""
        subjects = [record.subject for record in known]
        if len(subjects) < 2:
            subjects.append(with_article(kind, self._unknown(kind)))
            subjects = self._draws.shuffled(subjects)
        return subjects

    # Versions ---------------------------------------------------------------------------------------------------------

    def _versions(self) -> tuple[Planted, Planted]:
        kind = self._draws.below(len(KINDS))
        attribute = self._draws.below(len(ATTRIBUTES[kind]))
        question = self._draws.pick(ATTRIBUTES[kind][attribute].questions)
        record = self._take(kind)
        self._state(record, attribute)
        older, newer = self._editions(record)
        answer = self._state(newer, attribute, self._other_value(older, attribute))
        text = question.format(n=newer.subject)
        whole = Planted("version", text, answer, self._draws.shuffled([older, newer]))
        record = self._take(kind)
        self._leave_out(record, attribute)
        older, newer = self._editions(record)
        changed = self._draws.pick(newer.statements)[0]
        self._state(newer, changed, self._other_value(older, changed))
        text = question.format(n=newer.subject)
        return whole, Planted("version", text, None, self._draws.shuffled([older, newer]), "unstated", 1)

    def _editions(self, record: Record) -> tuple[Record, Record]:
        """An older and a newer edition of a record, alike but for their headings."""
        form = self._draws.below(len(_EDITIONS))
        first, last = (1, 24) if form < 2 else (1920, 2024)
        start = first + self._draws.below(last - first)
        numbers = start, start + 1 + self._draws.below(last - start)
        older, newer = (
            replace(record, statements=list(record.statements), heading=_EDITIONS[form].format(number))
            for number in numbers
        )
        return older, newer

    def _other_value(self, record: Record, attribute: int) -> str:
        """A value of the attribute that the record does not tell."""
        item = ATTRIBUTES[record.kind][attribute]
        for _ in range(_TRIES):
            value = self._draws.pick(item.values) if item.values else self._unknown(item.link)
            if not record.tells(value) and not any(said in value for _, said in record.statements):
                return value
        raise ValueError(f"no other {item.name} for {record.name}")

    # Records ----------------------------------------------------------------------------------------------------------

    def _retry(self, make: Callable[[], Planted | None]) -> Planted:
        for _ in range(_TRIES):
            if (made := make()) is not None:
                return made
        raise ValueError(f"no question in {_TRIES} tries: the world is too small")

    def _take(self, kind: int) -> Record:
        """The record of an entity that no question is about yet."""
        if not self._left[kind]:
            raise ValueError(
                f"too many questions for {self._world.recorded} entities: every {KINDS[kind]} is asked about already. "
                "Ask fewer questions, or of more documents."
            )
        serial = self._left[kind].pop()
        entity = Entities.at(np.array([serial]))
        return Record(serial, kind, self._world.names(entity)[0], list(self._world.statements(entity)[0]))

    def _give_back(self, records: Sequence[Record]) -> None:
        """Let others use these, later."""
        for record in records:
            self._left[record.kind].insert(0, record.serial)

    def _unknown(self, kind: int) -> str:
        """The name of an entity without a document."""
        known, unknown = self._world.counts(kind)
        number = known + self._draws.below(unknown)
        return self._world.names(Entities(np.array([kind]), np.array([number])))[0]

    def _state(self, record: Record, attribute: int, value: str | None = None) -> str:
        """Have a record state this, or what is so in its world; the number of its statements stays."""
        stated = record.states(attribute)
        if value is None:
            value = stated
        if value is None:
            entity = Entities.at(np.array([record.serial]))
            value = self._world.values(entity, np.array([attribute]))[0]
        if stated is None:
            place = self._draws.below(len(record.statements))
        else:
            place = next(place for place, (number, _) in enumerate(record.statements) if number == attribute)
        record.statements[place] = (attribute, value)
        return value

    def _leave_out(self, record: Record, attribute: int) -> None:
        """Have a record state something else in the place of this."""
        if record.states(attribute) is None:
            return
        numbers = range(len(ATTRIBUTES[record.kind]))
        others = [number for number in numbers if record.states(number) is None]
        place = next(place for place, (number, _) in enumerate(record.statements) if number == attribute)
        if not others:
            del record.statements[place]
            return
        other = self._draws.pick(others)
        entity = Entities.at(np.array([record.serial]))
        record.statements[place] = (other, self._world.values(entity, np.array([other]))[0])


def _agreements(first: Record, second: Record) -> set[str]:
    return {value for _, value in first.statements} & {value for _, value in second.statements}
