"""An invented world: its entities, their values and links, and which of these are on record.

An entity is a kind and a number within the kind. The first numbers of each kind have a record (a document); the
others exist only as names that records mention. Everything is a function of the world's arguments and of the entity.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .hashing import Integers, Permutation, derive_key, random_below, random_bits, random_true
from .names import KINDS, Names
from .templates import ATTRIBUTES, with_article
from .words import Split

FEWEST, MOST = 5, 7  # facts on record
_UNRECORDED = 16  # entities of each kind without record, at least; else as many as there are with one
_WIDTH = max(map(len, ATTRIBUTES))

# [kinds, attributes] the kind that a link leads to or -1, and the number of values or 0. Columns that a kind lacks: 0.
_LINKS = np.array([[a.link for a in attributes] + [0] * (_WIDTH - len(attributes)) for attributes in ATTRIBUTES])
_VALUES = np.array(
    [[len(a.values) for a in attributes] + [0] * (_WIDTH - len(attributes)) for attributes in ATTRIBUTES]
)
ATTRIBUTE_COUNTS = np.array([len(attributes) for attributes in ATTRIBUTES])

Statement = tuple[int, str]  # the attribute's place in ATTRIBUTES[kind], and the value


class Entities(NamedTuple):
    """Some entities: [n] kinds and [n] numbers within the kind."""

    kinds: Integers
    numbers: Integers

    def take(self, rows: Integers) -> "Entities":
        return Entities(self.kinds[rows], self.numbers[rows])

    def serials(self) -> Integers:
        """One number for each; those with a record come first and without gaps."""
        return self.numbers * len(KINDS) + self.kinds

    @classmethod
    def at(cls, serials: Integers) -> "Entities":
        """The inverse of `serials`."""
        return cls(serials % len(KINDS), serials // len(KINDS))

    def by_kind(self) -> Iterator[tuple[int, Integers]]:
        """(kind, rows) of each kind that occurs."""
        for kind in range(len(KINDS)):
            rows = np.flatnonzero(self.kinds == kind)
            if rows.size:
                yield kind, rows


class World:
    """Entities that take turns among the kinds.

    Args:
        recorded: how many have a record: those with the lowest serials.
        seed: another seed gives another world.
        split: "train" and "test" worlds have no name in common, nor a word of a name.
        linked_share: the share of links that lead to an entity with a record.
        alike_share: the share of entities whose name shares a part with that of another one with a record.
        crowding: names are as near to each other as in a world so many times as large.
    """

    def __init__(
        self, recorded: int, seed: int, split: Split, linked_share: float, alike_share: float, crowding: int = 1
    ) -> None:
        self.recorded, self.linked_share = recorded, linked_share
        known = [(recorded - kind + len(KINDS) - 1) // len(KINDS) for kind in range(len(KINDS))]
        unknown = [max(count, _UNRECORDED) for count in known]
        self._known, self._unknown = np.array(known), np.array(unknown)
        self._names = Names(known, unknown, seed, split, alike_share, crowding)
        self._key = derive_key("world", seed, split)

    def counts(self, kind: int) -> tuple[int, int]:
        """The numbers of entities of a kind with a record and without; those with one have the lower numbers."""
        return int(self._known[kind]), int(self._unknown[kind])

    def unrecorded(self, turns: Integers, key: int) -> Entities:
        """Entities without record, in an order that the key gives; after the last the first comes again."""
        ends = np.cumsum(self._unknown)
        chosen = Permutation(int(ends[-1]), key).forward(turns % ends[-1])
        kinds = np.searchsorted(ends, chosen, side="right")
        return Entities(kinds, self._known[kinds] + chosen - (ends - self._unknown)[kinds])

    def names(self, entities: Entities) -> list[str]:
        """Without articles."""
        names = [""] * len(entities.kinds)
        for kind, rows in entities.by_kind():
            for row, name in zip(rows.tolist(), self._names.names(kind, entities.numbers[rows]), strict=True):
                names[row] = name
        return names

    def subjects(self, entities: Entities) -> list[str]:
        """Names as they stand in a sentence, with their articles."""
        names = self.names(entities)
        return [with_article(kind, name) for kind, name in zip(entities.kinds.tolist(), names, strict=True)]

    def lookalikes(self, entities: Entities) -> Integers:
        """[n, 2] serials of the entities with a record whose names share a part with each of these, -1 for none."""
        found = np.full((len(entities.kinds), 2), -1)
        for kind, rows in entities.by_kind():
            alike = self._names.lookalikes(kind, entities.numbers[rows])
            found[rows] = np.where(alike >= 0, alike * len(KINDS) + kind, -1)
        return found

    def nearest(self, entities: Entities, count: int) -> Integers:
        """[n, count] serials of the entities of the same kind and with a record whose names are nearest to those of
        these, which have one too; -1 where there are no more."""
        found = np.full((len(entities.kinds), count), -1)
        for kind, rows in entities.by_kind():
            near = self._names.nearest(kind, entities.numbers[rows], count)
            found[rows] = np.where(near >= 0, near * len(KINDS) + kind, -1)
        return found

    def record(self, entities: Entities) -> tuple[Integers, Integers]:
        """[n, _WIDTH] attributes in the order of the record, and [n] how many of them, from the left, are on record.
        Attributes of the kind that are not on record follow; what stands in columns behind those means nothing."""
        attributes = np.arange(_WIDTH)
        ranks = random_bits(
            derive_key(self._key, "record"), entities.serials()[:, None] * 64 + attributes
        ) >> np.uint64(1)
        ranks[attributes >= ATTRIBUTE_COUNTS[entities.kinds][:, None]] = np.iinfo(np.int64).max
        counts = random_below(derive_key(self._key, "facts"), entities.serials(), MOST - FEWEST + 1) + FEWEST
        return ranks.argsort(axis=1, kind="stable"), counts

    def targets(self, entities: Entities, attributes: Integers) -> tuple[Entities, npt.NDArray[np.bool_]]:
        """The end of a link of each entity, and if that entity has a record; of other attributes, anything."""
        links = _LINKS[entities.kinds, attributes]
        facts, key = entities.serials() * 64 + attributes, derive_key(self._key, "links")
        itself = (links == entities.kinds).astype(np.int64)  # nobody is linked to themselves
        others = self._known[links] - itself
        recorded = random_true(derive_key(key, "recorded"), facts, self.linked_share) & (others > 0)
        numbers = random_below(key, facts, np.where(recorded, others, self._unknown[links]))
        inside = numbers + itself * (numbers >= entities.numbers)
        return Entities(links, np.where(recorded, inside, self._known[links] + numbers)), recorded

    def recorded_links(self, entities: Entities, draws: Integers) -> tuple[Integers, Integers]:
        """One link of each entity that is on record and leads to an entity with a record: [n] attributes, chosen by the
        draws, and the rows that have any."""
        order, counts = self.record(entities)
        stated = order[:, :MOST]
        rows = np.repeat(np.arange(len(stated)), MOST)
        usable = self.targets(entities.take(rows), stated.ravel())[1].reshape(stated.shape)
        usable &= (np.arange(MOST) < counts[:, None]) & (_LINKS[entities.kinds[:, None], stated] >= 0)
        choice = draws % np.maximum(usable.sum(axis=1), 1)
        columns = (usable.cumsum(axis=1) > choice[:, None]).argmax(axis=1)
        return pick_columns(stated, columns), np.flatnonzero(usable.any(axis=1))

    def values(self, entities: Entities, attributes: Integers) -> list[str]:
        """The value of one attribute of each entity, as it stands in the text."""
        draws = random_below(
            derive_key(self._key, "values"), entities.serials() * 64 + attributes, _VALUES[entities.kinds, attributes]
        )
        places = zip(entities.kinds.tolist(), attributes.tolist(), draws.tolist(), strict=True)
        links = np.flatnonzero(_LINKS[entities.kinds, attributes] >= 0)
        targets, _ = self.targets(entities.take(links), attributes[links])
        names = iter(self.names(targets))
        lists = [[attribute.values for attribute in attributes] for attributes in ATTRIBUTES]
        return [closed[draw] if (closed := lists[kind][attribute]) else next(names) for kind, attribute, draw in places]

    def statements(self, entities: Entities) -> list[list[Statement]]:
        """The attributes that the record of each entity states, in its order."""
        order, counts = self.record(entities)
        rows, columns = np.nonzero(np.arange(MOST) < counts[:, None])
        attributes = order[rows, columns]
        flat = list(zip(attributes.tolist(), self.values(entities.take(rows), attributes), strict=True))
        return [flat[start:end] for start, end in pairwise(accumulate(counts.tolist(), initial=0))]


def pick_columns(table: Integers, columns: Integers) -> Integers:
    """[n] one entry of each row."""
    return np.take_along_axis(table, columns[:, None], axis=1)[:, 0]
