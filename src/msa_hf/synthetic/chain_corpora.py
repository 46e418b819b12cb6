"""Corpora with questions whose facts lie in several documents, at chosen distances from each other.

Most documents are those of an invented world (`make_corpus`); some are planted, for questions of one to four hops, for
comparisons and joins of two entities, for time order and for facts of which a later edition holds. Every question has a
twin of the same words about other entities, which nothing answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from .corpora import UNANSWERABLE, Fact, checked_prose_count, facts_of, reprint
from .hashing import Draws, Integers, Permutation, derive_key
from .kinds import CHAIN_KINDS, HOPS, Broken, ChainKind
from .planting import Planted, Planter, Record
from .words import Split
from .world import Entities, World
from .writing import write_records

_BLOCK = 4096  # documents made at a time
_TRIES = 300  # places that are tried for the documents of a question
_SLACK = 8  # a distance is right to one part in so many

DEFAULT_QUESTIONS: Mapping[ChainKind, int] = MappingProxyType(dict.fromkeys(CHAIN_KINDS, 1))


@dataclass(frozen=True, slots=True)
class ChainQuestion:
    """A question to a corpus of chains, or its twin.

    Attributes:
        text: the question.
        answer: exactly as it stands in a document, or `UNANSWERABLE`.
        kind: what it asks for, also of a twin.
        positives: positions of its documents, in the order of the hops; of a twin, those that are there. Two editions,
            and two entities, come in any order.
        rounds: the documents that each round of retrieval should find: one.
        distance: documents from one of the positives to the next, about; None for anywhere, and for one document.
        broken: None, or what a twin lacks: "unstated", a link that its document does not state; "removed", the
            document of the next entity.
        broken_hop: at which hop, from 1; of two entities, which of them.
        hard_negatives: none; there for those who take other questions too.
    """

    text: str
    answer: str
    kind: ChainKind
    positives: tuple[int, ...]
    distance: int | None
    broken: Broken | None
    broken_hop: int | None
    hard_negatives: tuple[int, ...] = ()

    @property
    def rounds(self) -> tuple[tuple[int, ...], ...]:
        return tuple((position,) for position in self.positives)

    @property
    def hops(self) -> int:
        """The documents that the question takes, those that a twin lacks among them."""
        return HOPS.get(self.kind, 2)


class ChainCorpus:
    """Documents by position, made when asked for. `make_chain_corpus` makes one.

    Attributes:
        questions: each followed by its twin.
    """

    def __init__(self, world: World, prose: Sequence[str], prose_count: int, editions: int, key: int) -> None:
        self._world, self._prose, self._prose_count, self._key = world, tuple(prose), prose_count, key
        # Slots of prose, then of entities by serial, then of second editions; the images are positions.
        self._order = Permutation(prose_count + world.recorded + editions, derive_key(key, "order"))
        self._records: dict[int, Record] = {}  # by slot
        self._slot_at: dict[int, int] = {}  # of documents that were moved
        self._position_of: dict[int, int] = {}
        self._next_edition = prose_count + world.recorded
        self.questions: tuple[ChainQuestion, ...] = ()

    def __len__(self) -> int:
        return self._order.size

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The documents at positions start .. stop - 1."""
        texts: list[str] = []
        for slots in self._blocks(start, stop):
            records = [self._records.get(slot) for slot in slots.tolist() if slot >= self._prose_count]
            entities = self._entities(slots)
            statements = [
                natural if record is None else record.statements
                for record, natural in zip(records, self._world.statements(entities), strict=True)
            ]
            subjects, numbers = self._world.subjects(entities), slots[slots >= self._prose_count] - self._prose_count
            written = zip(records, write_records(entities.kinds, subjects, statements, numbers, self._key), strict=True)
            for slot in slots.tolist():
                if slot < self._prose_count:
                    texts.append(reprint(self._prose, slot))
                else:
                    record, text = next(written)
                    texts.append(text if record is None else record.heading + text)
        return texts

    def names(self, start: int = 0, stop: int | None = None) -> list[str | None]:
        """The entity that each document is about, without article; None for prose."""
        names: list[str | None] = []
        for slots in self._blocks(start, stop):
            entities = iter(self._world.names(self._entities(slots)))
            names += [next(entities) if slot >= self._prose_count else None for slot in slots.tolist()]
        return names

    def facts(self, start: int = 0, stop: int | None = None) -> list[list[Fact]]:
        """The facts of each document, in the order of its sentences, as of `Corpus`; nothing for prose, nor for an
        edition, which another one contradicts."""
        facts: list[list[Fact]] = []
        for slots in self._blocks(start, stop):
            entities = self._entities(slots)
            natural = zip(
                entities.kinds.tolist(), self._world.subjects(entities), self._world.statements(entities), strict=True
            )
            for slot in slots.tolist():
                if slot < self._prose_count:
                    facts.append([])
                    continue
                kind, subject, statements = next(natural)
                record = self._records.get(slot)
                if record is not None:
                    statements = [] if record.heading else record.statements
                facts.append(facts_of(kind, subject, statements))
        return facts

    def nearest(self, positions: Sequence[int] | Integers, count: int) -> Integers:
        """[n, count] positions of the documents whose names are nearest to those of these; -1 where there are no more,
        and for prose. Every name of a kind is compared: for small corpora."""
        asked = np.asarray(positions, np.int64)
        slots = np.array([self._slot(position) for position in asked.tolist()], np.int64)
        found = np.full((len(asked), count), -1)
        rows = np.flatnonzero(slots >= self._prose_count)
        near = self._world.nearest(self._entities(slots), count)
        found[rows] = [[self._position(s + self._prose_count) if s >= 0 else -1 for s in row] for row in near.tolist()]
        return found

    # Places -----------------------------------------------------------------------------------------------------------

    def _blocks(self, start: int, stop: int | None) -> Iterator[Integers]:
        """The slots of the documents at these positions."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"documents {start} .. {stop} of {len(self)}")
        for begin in range(start, stop, _BLOCK):
            positions = np.arange(begin, min(begin + _BLOCK, stop))
            slots = self._order.inverse(positions)
            for place in positions.tolist() if len(self._slot_at) > _BLOCK else self._slot_at:
                if begin <= place < begin + len(slots) and place in self._slot_at:
                    slots[place - begin] = self._slot_at[place]
            yield slots

    def _entities(self, slots: Integers) -> Entities:
        """The entities of those slots that are not of prose."""
        slots = slots[slots >= self._prose_count]
        serials = slots - self._prose_count
        for place in np.flatnonzero(serials >= self._world.recorded).tolist():
            record = self._records.get(int(slots[place]))
            serials[place] = record.serial if record is not None else 0
        return Entities.at(serials)

    def _slot(self, position: int) -> int:
        moved = self._slot_at.get(position)
        return int(self._order.inverse(np.array([position]))[0]) if moved is None else moved

    def _position(self, slot: int) -> int:
        moved = self._position_of.get(slot)
        return int(self._order.forward(np.array([slot]))[0]) if moved is None else moved

    def _move(self, slot: int, position: int) -> None:
        """Put a document at a position; the one that was there takes its place."""
        other, left = self._slot(position), self._position(slot)
        self._slot_at[position], self._position_of[slot] = slot, position
        self._slot_at[left], self._position_of[other] = other, left

    def _add(self, planted: Planted, distance: int | None, taken: set[int], draws: Draws) -> ChainQuestion:
        """Put the documents of a question in their places."""
        apart = None if len(planted.records) < 2 else distance
        places = _places(len(planted.records), apart, len(self), taken, draws)
        taken.update(places)
        for record, place in zip(planted.records, places, strict=True):
            slot = record.serial + self._prose_count
            if slot in self._records:
                slot, self._next_edition = self._next_edition, self._next_edition + 1
            self._records[slot] = record
            self._move(slot, place)
        answer = UNANSWERABLE if planted.answer is None else planted.answer
        return ChainQuestion(
            planted.text, answer, planted.kind, tuple(places), apart, planted.broken, planted.broken_hop
        )


def _places(count: int, apart: int | None, size: int, taken: set[int], draws: Draws) -> list[int]:
    """Free positions, each so far from the one before it, up or down."""
    slack = 0 if apart is None else apart // _SLACK
    for _ in range(_TRIES):
        places: list[int] = []
        while len(places) < count:
            if not places or apart is None:
                wanted = draws.below(size)
            else:
                ways = [way for way in (places[-1] - apart, places[-1] + apart) if 0 <= way < size]
                if not ways:
                    break
                wanted = draws.pick(ways)
            near = [wanted, *(wanted + side * step for step in range(1, slack + 1) for side in (1, -1))]
            free = (place for place in near if 0 <= place < size and place not in taken and place not in places)
            found = next(free, None)
            if found is None:
                break
            places.append(found)
        if len(places) == count:
            return places
    how = "" if apart is None else f" about {apart:,} documents apart"
    raise ValueError(f"no {count} free places{how} among {size:,} documents: ask fewer questions, or of more documents")


def make_chain_corpus(
    documents: int,
    questions: Mapping[ChainKind, int] = DEFAULT_QUESTIONS,
    distances: Sequence[int | None] = (None,),
    seed: int = 0,
    split: Split = "train",
    prose: Sequence[str] = (),
    prose_share: float = 0.0,
    *,
    alike_share: float = 0.15,
    crowding: int = 1,
) -> ChainCorpus:
    """A corpus with planted questions, the same for the same arguments on every machine.

    Args:
        documents: how many.
        questions: of each kind, how many for each distance; each has a twin without an answer besides.
        distances: documents from one document of a question to the next, right to an eighth; None: anywhere. Questions
            of one document come once.
        seed: another seed gives other entities, other facts, other questions and another order.
        split: "train" and "test" corpora have no name in common, whatever their seeds, nor any invented word.
        prose, prose_share, alike_share, crowding: as for `make_corpus`.

    Returns:
        The corpus; it makes texts when asked for them.

    Raises:
        ValueError: for an unknown kind, a distance that does not fit, and more questions than the documents hold.
    """
    for kind, count in questions.items():
        if kind not in CHAIN_KINDS:
            raise ValueError(f"no questions of kind {kind!r}: there are {', '.join(CHAIN_KINDS)}")
        if count < 0:
            raise ValueError(f"no {count} questions")
    for distance in distances:
        if distance is not None and not 1 <= distance < documents:
            raise ValueError(f"{documents:,} documents do not lie {distance:,} apart from each other")
    wanted = [
        (kind, distance)
        for kind, count in questions.items()
        for distance in (distances if HOPS.get(kind) != 1 else (None,))
        for _ in range(count)
    ]
    editions = 2 * sum(kind == "version" for kind, _ in wanted)
    prose_count = checked_prose_count(documents, split, prose, prose_share)
    entities = documents - prose_count - editions
    if entities < 0:
        raise ValueError(f"{documents:,} documents are too few for {len(wanted)} questions")
    key = derive_key("chain corpus", seed, split)
    world = World(entities, seed, split, 0.6, alike_share, crowding)
    corpus = ChainCorpus(world, prose, prose_count, editions, key)
    planter, draws = Planter(world, key), Draws(key, "places")
    taken: set[int] = set()
    # What takes the most places comes first, as long as there is room.
    order = sorted(range(len(wanted)), key=lambda place: (-(wanted[place][1] or 0), -HOPS.get(wanted[place][0], 2)))
    found: dict[int, list[ChainQuestion]] = {}
    for place in order:
        kind, distance = wanted[place]
        found[place] = [corpus._add(planted, distance, taken, draws) for planted in planter.plant(kind)]
    corpus.questions = tuple(question for place in range(len(wanted)) for question in found[place])
    return corpus
