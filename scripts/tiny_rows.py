"""Training rows of `msa-hf-tiny`: questions about a small corpus as whole or partial transcripts, in tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from msa_hf.evaluation import UNANSWERABLE, Corpus, Question
from msa_hf.generation import COMPACT
from msa_hf.synthetic.corpora import QuestionKind

# An answer begins with a space, so that its tokens are those of the text it is copied from.
TINY = replace(COMPACT, answer_opening=" ")
UNLABELLED = -100
# Of the questions read for, those whose (last) document is withheld, so that there is no answer.
WITHHELD = 0.12
# Of the second rounds, those whose first one missed, so that the same document is still to be found.
MISSED = 0.12


@dataclass
class Pieces:
    """Token ids of a small corpus, from which transcripts are put together without tokenizing again."""

    texts: list[list[int]]
    ids: list[int]
    symbols: dict[str, int]

    def number(self, id: int) -> list[int]:
        return [self.symbols["["], *(self.symbols[digit] for digit in str(id)), self.symbols["]"]]

    def document(self, place: int) -> list[int]:
        """`TINY.document`: "[id] text\\n[id]"."""
        number = self.number(self.ids[place])
        return [*number, *self.texts[place], self.symbols["\n"], *number]

    def named(self, places: list[int]) -> list[int]:
        tokens = [token for place in places for token in self.number(self.ids[place])]
        return [*tokens, self.symbols["<|docs|>"]]

    def block(self, places: list[int]) -> list[int]:
        tokens: list[int] = []
        for place in places:
            tokens += [*self.number(self.ids[place]), *self.texts[place], self.symbols["\n"]]
        return [*tokens, self.symbols["<|ids|>"]]


def symbols_of(tokenizer: Any) -> dict[str, int]:
    """Token of each character and marker that transcripts are put together with."""
    names = [*"[]0123456789", "\n"]
    found = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in names}
    assert all(len(ids) == 1 for ids in found.values()), "digits, brackets and line ends must be one token each"
    special = {name: [tokenizer.convert_tokens_to_ids(name)] for name in TINY.special_tokens}
    return {name: ids[0] for name, ids in (found | special).items()}


def encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


@dataclass
class Row:
    """One training sequence."""

    ids: list[int]
    labels: list[int]
    routes: list[bool]
    positives: list[int]

    def add(self, ids: list[int], labeled: bool = False, routes: bool = False) -> None:
        self.ids += ids
        self.labels += ids if labeled else [UNLABELLED] * len(ids)
        self.routes += [routes] * len(ids)


@dataclass
class Rows:
    """Makes the rows of a batch.

    Attributes:
        memory: whether there is one, so that documents can be named before they were read.
    """

    tokenizer: Any
    corpus: Corpus
    pieces: Pieces
    draw: random.Random
    memory: bool

    def questions(self, count: int) -> list[Question]:
        kinds: dict[QuestionKind, int] = {
            "one_hop": count - 2 * (count // 4),
            "two_hop": count // 4,
            "unanswerable": count // 4,
        }
        questions = [
            question
            for kind, wanted in kinds.items()
            for question in self.corpus.questions(wanted, kind, seed=self.draw.randrange(1 << 30))
        ]
        self.draw.shuffle(questions)
        return questions

    def distractors(self, question: Question, near: list[int], most: int) -> list[int]:
        """Up to `most` documents that do not answer: those whose names are most like, and any."""
        count = self.draw.choices(range(most + 1), weights=(4, 3, 2, 2)[: most + 1])[0]
        likely = [place for place in (*question.hard_negatives, *near) if place not in question.positives]
        chosen: list[int] = []
        while len(chosen) < count:
            place = self.draw.randrange(len(self.corpus))
            if likely and self.draw.random() < 0.7:
                place = likely.pop(0)
            if place not in question.positives and place not in chosen:
                chosen.append(place)
        return chosen

    def near(self, questions: list[Question]) -> list[list[list[int]]]:
        """For every question and round, documents with names like that of the document to be found."""
        places = [question.positives for question in questions]
        found = self.corpus.nearest([place for row in places for place in row], 4).tolist()
        rows = iter([[place for place in near if place >= 0] for near in found])
        return [[next(rows) for _ in row] for row in places]

    def blocks(
        self, question: Question, near: list[list[int]], missed: int | None
    ) -> list[tuple[list[int], list[int]]]:
        """For every round what it was to find, and what it reads; round `missed` does not find it."""
        read: list[int] = []
        blocks = []
        for number, found in enumerate(question.rounds or ((),)):
            wanted = [] if number == missed else list(found)
            others = self.distractors(question, near[number] if near else [], 3)
            if not wanted and not others:
                others = [place for place in self.any_others(question, 1)]
            chosen = [place for place in (*wanted, *others) if place not in read]
            self.draw.shuffle(chosen)
            read += chosen
            blocks.append((list(found), chosen))
        return blocks

    def any_others(self, question: Question, count: int) -> list[int]:
        places = self.draw.sample(range(len(self.corpus)), count + len(question.positives))
        return [place for place in places if place not in question.positives][:count]

    def naming(self, count: int) -> list[Row]:
        """The first round alone: question, and the ids of its documents.

        Questions about unknown entities are left out: how far the best document stands above the others depends on the
        bank's size, so that there is none is to be said of texts that were read.
        """
        return self.first_rounds([question for question in self.questions(count + count // 6) if question.rounds])

    def first_rounds(self, questions: list[Question]) -> list[Row]:
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        rows = []
        for question, asked in zip(questions, coded, strict=True):
            row = self.opened(asked)
            row.add(self.pieces.named(list(question.rounds[0])), labeled=True)
            row.positives = list(question.rounds[0])
            rows.append(row)
        return rows

    def second(self, count: int) -> list[Row]:
        """Up to the second round: question and the texts of the first, then the ids that these lead to, if any."""
        questions = self.corpus.questions(count // 2, "two_hop", seed=self.draw.randrange(1 << 30))
        rows = self.second_rounds(questions + self.questions(count - len(questions)), MISSED)
        self.draw.shuffle(rows)
        return rows

    def second_rounds(self, questions: list[Question], missing: float = 0.0) -> list[Row]:
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        rows = []
        for question, asked, near in zip(questions, coded, self.near(questions), strict=True):
            row = self.opened(asked)
            missed = 0 if self.draw.random() < missing else None
            (found, chosen), *_ = self.blocks(question, near, missed)
            row.add(self.pieces.named(chosen))
            row.add(self.pieces.block(chosen), routes=True)
            second = list(question.rounds[1]) if len(question.rounds) > 1 else []
            wanted = found if missed is not None else second
            row.add(self.following(wanted), labeled=True)
            row.positives = wanted or found
            rows.append(row)
        return rows

    def reading(self, count: int) -> list[Row]:
        """Whole transcripts: question, texts of one or two rounds, answer; and further questions about the texts."""
        questions = self.questions(count)
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        known = self.corpus.facts()
        rows, answers, further = [], [], []
        for question, asked, near in zip(questions, coded, self.near(questions), strict=True):
            row = self.opened(asked)
            missed = len(question.rounds) - 1 if self.draw.random() < WITHHELD else None
            blocks = self.blocks(question, near, missed)
            if len(blocks) == 1 and self.draw.random() < 0.3:  # a second look that finds nothing new
                others = [place for place in self.any_others(question, 2) if place not in blocks[0][1]]
                blocks.append(([], others))
            read: list[int] = []
            for number, (found, chosen) in enumerate(blocks):
                # Ids of documents that nothing but chance put there cannot be learnt.
                exact = self.memory and found == chosen
                row.add(self.pieces.named(chosen), labeled=exact)
                row.add(self.pieces.block(chosen), routes=number == len(blocks) - 1)
                read += chosen
            row.add([self.pieces.symbols["<|answer|>"]], labeled=missed is None and self.memory)
            row.add([*asked, self.pieces.symbols["\n"]])
            row.positives = [place for place in question.positives if place in read]
            rows.append(row)
            answers.append(UNANSWERABLE if missed is not None else question.answer)
            stated = [(place, fact) for place in read for fact in known[place]]
            for number, (place, fact) in enumerate(self.draw.sample(stated, min(6, len(stated)))):
                further.append((row, place if number == 0 else None, self.draw.choice(fact.questions), fact.answer))
        for row, said in zip(rows, encode_all(self.tokenizer, [f" {answer}" for answer in answers]), strict=True):
            row.add([*said, self.pieces.symbols["<|end|>"]], labeled=True)
        again = encode_all(self.tokenizer, [text for _, _, text, _ in further])
        said = encode_all(self.tokenizer, [f" {text}" for _, _, _, text in further])
        for (row, place, _, _), asked, answer in zip(further, again, said, strict=True):
            row.add(asked)
            if place is not None:  # which of the texts says it
                row.add([self.pieces.symbols["<|ids|>"]])
                row.add(self.pieces.named([place]), labeled=True)
            else:
                row.add([self.pieces.symbols["\n"]])
                row.add([*answer, self.pieces.symbols["<|end|>"]], labeled=True)
        return rows

    dense = reading

    def opened(self, asked: list[int]) -> Row:
        row = Row([], [], [], [])
        row.add(asked, routes=True)
        row.add([self.pieces.symbols["<|ids|>"]])
        return row

    def following(self, places: list[int]) -> list[int]:
        """The text that the model is to say in a round: ids, or the end of retrieval."""
        return self.pieces.named(places) if places else [self.pieces.symbols["<|answer|>"]]
