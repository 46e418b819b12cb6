"""Documents, questions and answers about invented entities, to train and judge models with memories of any size.

Every document is about one entity and states five to seven facts about it; some values are other entities of the same
corpus, which makes questions that need two documents. All of it is a function of the arguments and of the position:
nothing is stored, and any range can be made anywhere, by any number of processes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .hashing import Integers, Permutation, derive_key, random_below
from .templates import ATTRIBUTES
from .words import Split
from .world import ATTRIBUTE_COUNTS, Entities, Statement, World, pick_columns
from .writing import write_records

UNANSWERABLE = "The memory does not hold the answer."

QuestionKind = Literal["one_hop", "two_hop", "unanswerable"]

_BLOCK = 4096  # documents made at a time
_TRIES = 1 << 16  # candidates for two-hop questions at a time
_COMPARABLE = 1 << 16  # documents of which each name may be compared with all others
_MANY = 1 << 20  # a draw below it, modulo a small number, is as good as uniform


@dataclass(frozen=True, slots=True)
class Question:
    """A question to a corpus.

    Attributes:
        text: the question; it names one entity.
        answer: exactly as it stands in the last positive document, or `UNANSWERABLE`.
        kind: how many documents the answer takes, or that there is none.
        positives: positions of the documents, in the order of the hops. An unanswerable question has that of the
            entity it names, which does not state what is asked, or none where the entity has no document.
        rounds: the documents that each round of retrieval should find.
        hard_negatives: documents of other entities whose names share a part with those of the entities asked about.
    """

    text: str
    answer: str
    kind: QuestionKind
    positives: tuple[int, ...]
    rounds: tuple[tuple[int, ...], ...]
    hard_negatives: tuple[int, ...]


class Fact(NamedTuple):
    """One statement of a document, with all the ways to ask for it."""

    attribute: str
    answer: str
    questions: tuple[str, ...]


def facts_of(kind: int, subject: str, statements: Iterable[Statement]) -> list[Fact]:
    """The facts of an entity of a kind, of which `subject` is the name as it stands in a sentence."""
    return [
        Fact(attribute.name, value, tuple(question.format(n=subject) for question in attribute.questions))
        for attribute, value in ((ATTRIBUTES[kind][number], value) for number, value in statements)
    ]


class Corpus:
    """Documents by position, made when asked for. `make_corpus` makes one."""

    def __init__(self, world: World, prose: Sequence[str], prose_count: int, key: int) -> None:
        self._world, self._prose, self._prose_count, self._key = world, tuple(prose), prose_count, key
        # Slots of prose, then of entities by serial; the images are positions.
        self._order = Permutation(prose_count + world.recorded, derive_key(key, "order"))

    def __len__(self) -> int:
        return self._order.size

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """The documents at positions start .. stop - 1."""
        texts: list[str] = []
        for slots in self._blocks(start, stop):
            entities = self._write(Entities.at(slots[slots >= 0]))
            texts += [
                next(entities) if slot >= 0 else reprint(self._prose, slot + self._prose_count)
                for slot in slots.tolist()
            ]
        return texts

    def names(self, start: int = 0, stop: int | None = None) -> list[str | None]:
        """The entity that each document is about, without article; None for prose."""
        names: list[str | None] = []
        for slots in self._blocks(start, stop):
            entities = iter(self._world.names(Entities.at(slots[slots >= 0])))
            names += [next(entities) if slot >= 0 else None for slot in slots.tolist()]
        return names

    def facts(self, start: int = 0, stop: int | None = None) -> list[list[Fact]]:
        """The facts of each document, in the order of its sentences; nothing for prose. They come with all phrasings of
        their questions, so that a trainer can tokenise the one-hop questions of a whole corpus beforehand."""
        facts: list[list[Fact]] = []
        for slots in self._blocks(start, stop):
            entities = self._facts(Entities.at(slots[slots >= 0]))
            facts += [next(entities) if slot >= 0 else [] for slot in slots.tolist()]
        return facts

    def questions(self, count: int, kind: QuestionKind, seed: int = 0) -> list[Question]:
        """Questions of one kind, about different entities until all have had their turn.

        Args:
            count: how many.
            kind: "one_hop": one document answers. "two_hop": the named entity's document says which other document
                answers. "unanswerable": in turns about an entity without document, and about something that the named
                entity's document does not state.
            seed: another seed gives other questions.
        """
        key = derive_key(self._key, "questions", kind, seed)
        if kind not in ("one_hop", "two_hop", "unanswerable"):
            raise ValueError(f"no questions of kind {kind!r}")
        if count and not self._world.recorded:
            raise ValueError("a corpus without entities has no questions")
        if kind == "one_hop":
            return self._one_hop(np.arange(count), key)
        if kind == "two_hop":
            return self._two_hop(count, key)
        turns = self._about_unknown(np.arange((count + 1) // 2), key), self._about_unstated(np.arange(count // 2), key)
        return [turns[i % 2][i // 2] for i in range(count)]

    def nearest(self, positions: Sequence[int] | Integers, count: int) -> Integers:
        """The documents that are most easily taken for others.

        Args:
            positions: [n] documents.
            count: how many to find for each.

        Returns:
            [n, count] positions of documents about entities of the same kind, first those whose names agree in the most
            places (syllables, noun); -1 where there are no more, and for prose.
        """
        if len(self) > _COMPARABLE:
            raise ValueError(f"nearest() compares every name: at most {_COMPARABLE:,} documents, here {len(self):,}")
        if count < 0:
            raise ValueError(f"no nearest {count} documents")
        asked = np.asarray(positions, np.int64)
        if asked.size and not (asked.min() >= 0 and asked.max() < len(self)):
            raise IndexError(f"documents {asked.min()} .. {asked.max()} of {len(self)}")
        found = np.full((len(asked), count), -1)
        serials = self._order.inverse(asked) - self._prose_count
        rows = np.flatnonzero(serials >= 0)
        near = self._world.nearest(Entities.at(serials[rows]), count)
        found[rows] = np.where(near >= 0, self._positions(np.maximum(near, 0)), -1)
        return found

    # Documents

    def _blocks(self, start: int, stop: int | None) -> Iterator[Integers]:
        """The serial of the entity that each document is about; -prose_count .. -1 for prose."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"documents {start} .. {stop} of {len(self)}")
        for begin in range(start, stop, _BLOCK):
            yield self._order.inverse(np.arange(begin, min(begin + _BLOCK, stop))) - self._prose_count

    def _positions(self, serials: Integers) -> Integers:
        return self._order.forward(serials + self._prose_count)

    def _write(self, entities: Entities) -> Iterator[str]:
        world = self._world
        return write_records(
            entities.kinds, world.subjects(entities), world.statements(entities), entities.serials(), self._key
        )

    def _facts(self, entities: Entities) -> Iterator[list[Fact]]:
        subjects, records = self._world.subjects(entities), self._world.statements(entities)
        for kind, subject, statements in zip(entities.kinds.tolist(), subjects, records, strict=True):
            yield facts_of(kind, subject, statements)

    # Questions

    def _named(self, turns: Integers, key: int) -> Entities:
        """Entities with documents in an order that the key gives; after the last the first comes again."""
        order = Permutation(self._world.recorded, derive_key(key, "entities"))
        return Entities.at(order.forward(turns % self._world.recorded))

    def _one_hop(self, turns: Integers, key: int) -> list[Question]:
        named = self._named(turns, key)
        order, counts = self._world.record(named)
        lap = turns // self._world.recorded  # another fact every time that the entity comes round
        fact = random_below(derive_key(key, "fact"), named.serials(), _MANY) + lap
        attributes = pick_columns(order, fact % counts)
        return self._ask("one_hop", turns, key, named, attributes, self._world.values(named, attributes), [named])

    def _about_unknown(self, turns: Integers, key: int) -> list[Question]:
        unknown = self._world.unrecorded(turns, key)
        attributes = random_below(derive_key(key, "attribute"), turns, ATTRIBUTE_COUNTS[unknown.kinds])
        return self._ask("unanswerable", turns, key, unknown, attributes, [UNANSWERABLE] * len(turns), [])

    def _about_unstated(self, turns: Integers, key: int) -> list[Question]:
        named = self._named(turns, key)
        order, counts = self._world.record(named)
        omitted = random_below(derive_key(key, "omitted"), turns, ATTRIBUTE_COUNTS[named.kinds] - counts)
        attributes = pick_columns(order, counts + omitted)
        return self._ask("unanswerable", turns, key, named, attributes, [UNANSWERABLE] * len(turns), [named])

    def _two_hop(self, count: int, key: int) -> list[Question]:
        questions: list[Question] = []
        seen: set[tuple[int, ...]] = set()
        tried, most = 0, 16 * count + 2 * self._world.recorded
        while len(questions) < count:
            if tried > most:
                raise ValueError(f"{len(self)} documents gave {len(questions)} two-hop questions, not {count}")
            turns = np.arange(tried, tried + min(max(3 * (count - len(questions)) // 2 + 16, tried), _TRIES))
            tried += len(turns)
            questions += self._try_two_hop(turns, key, seen)
        return questions[:count]

    def _try_two_hop(self, turns: Integers, key: int, seen: set[tuple[int, ...]]) -> list[Question]:
        """Questions of some turns, without those whose first document has no link to follow or tells the answer, and
        without those seen before."""
        world, named = self._world, self._named(turns, key)
        links, found = world.recorded_links(named, random_below(derive_key(key, "link"), turns, _MANY))
        turns, named, links = turns[found], named.take(found), links[found]
        linked, _ = world.targets(named, links)
        order, counts = world.record(linked)
        attributes = pick_columns(order, random_below(derive_key(key, "fact"), turns, counts))
        answers, subjects = world.values(linked, attributes), world.subjects(named)
        rows = []
        paths = zip(named.serials().tolist(), links.tolist(), attributes.tolist(), strict=True)
        for row, (path, statements) in enumerate(zip(paths, world.statements(named), strict=True)):
            told = any(answers[row] in text for text in (subjects[row], *(value for _, value in statements)))
            if not told and path not in seen:
                seen.add(path)
                rows.append(row)
        kept = np.array(rows, np.int64)
        phrases = [
            ATTRIBUTES[kind][link].descriptions for kind, link in zip(named.kinds[kept], links[kept], strict=True)
        ]
        choices = random_below(derive_key(key, "description"), turns[kept], _MANY).tolist()
        called = [_pick(phrases[i], choices[i]).format(n=subjects[row]) for i, row in enumerate(rows)]
        hops = [named.take(kept), linked.take(kept)]
        return self._ask(
            "two_hop", turns[kept], key, hops[-1], attributes[kept], [answers[row] for row in rows], hops, called
        )

    def _ask(
        self,
        kind: QuestionKind,
        turns: Integers,
        key: int,
        entities: Entities,
        attributes: Integers,
        answers: list[str],
        hops: list[Entities],
        called: list[str] | None = None,
    ) -> list[Question]:
        """Questions for one attribute of each entity, which is called by its name or as given; the hops lead to it."""
        alike = np.concatenate([self._world.lookalikes(group) for group in hops or [entities]], axis=1)
        rows, columns = np.nonzero(alike >= 0)
        near: dict[int, list[int]] = {}
        for row, position in zip(rows.tolist(), self._positions(alike[rows, columns]).tolist(), strict=True):
            near.setdefault(row, []).append(position)
        found = [self._positions(hop.serials()).tolist() for hop in hops]
        positives: list[tuple[int, ...]] = list(zip(*found, strict=True)) if found else [()] * len(turns)
        phrases = random_below(derive_key(key, "question"), turns, _MANY)
        called = called or self._world.subjects(entities)
        questions = []
        for row, (owner, attribute, phrase) in enumerate(
            zip(entities.kinds.tolist(), attributes.tolist(), phrases.tolist(), strict=True)
        ):
            text = _pick(ATTRIBUTES[owner][attribute].questions, phrase).format(n=called[row])
            documents = positives[row]
            rounds = tuple((document,) for document in documents)
            hard = tuple(document for document in near.get(row, ()) if document not in documents)
            questions.append(Question(text, answers[row], kind, documents, rounds, hard))
        return questions


def _pick(alternatives: list[str], draw: int) -> str:
    return alternatives[draw % len(alternatives)]


def reprint(prose: Sequence[str], number: int) -> str:
    """Prose document `number`: the texts one after the other, then again under a heading."""
    times, item = divmod(number, len(prose))
    return f"Reprint {times}. {prose[item]}" if times else prose[item]


def checked_prose_count(documents: int, split: Split, prose: Sequence[str], prose_share: float) -> int:
    """The number of a corpus' documents that are prose.

    Raises:
        ValueError: for sizes and splits that make no corpus.
    """
    if documents < 0 or split not in ("train", "test"):
        raise ValueError(f"no corpus of {documents} documents for {split!r}")
    if not 0 <= prose_share <= 1:
        raise ValueError("shares lie between 0 and 1")
    prose_count = round(documents * prose_share)
    if prose_count and not prose:
        raise ValueError("a share of prose needs prose")
    return prose_count


def make_corpus(
    documents: int,
    seed: int = 0,
    split: Split = "train",
    prose: Sequence[str] = (),
    prose_share: float = 0.0,
    *,
    linked_share: float = 0.6,
    alike_share: float = 0.15,
    crowding: int = 1,
) -> Corpus:
    """A corpus of invented entities, the same for the same arguments on every machine.

    Args:
        documents: how many, up to some millions.
        seed: another seed gives other entities, other facts and another order.
        split: "train" and "test" corpora have no name in common, whatever their seeds, nor any invented word.
        prose: real texts that are mixed in (`prose_documents`), reprinted under a heading where they run out.
        prose_share: the share of documents that are prose.
        linked_share: the share of links between entities that lead to one with a document of its own.
        alike_share: the share of entities whose name shares a part with that of another one with a document.
        crowding: names are drawn as densely as in a corpus so many times as large, as far as they stay unique: the
            near-misses of a large corpus in a small one. Meant for small corpora: the words are drawn at once and kept.

    Returns:
        The corpus; it makes texts when asked for them.
    """
    if not all(0 <= share <= 1 for share in (linked_share, alike_share)):
        raise ValueError("shares lie between 0 and 1")
    if not isinstance(crowding, int) or crowding < 1:
        raise ValueError(f"crowding is a number from 1, not {crowding!r}")
    prose_count = checked_prose_count(documents, split, prose, prose_share)
    world = World(documents - prose_count, seed, split, linked_share, alike_share, crowding)
    return Corpus(world, prose, prose_count, derive_key("corpus", seed, split))
