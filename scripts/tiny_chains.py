"""Training rows of `msa-hf-tiny` about chains: four rounds, two entities, editions, and twins without an answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiny_rows import UNLABELLED as UNLABELLED
from tiny_rows import Pieces, Row, encode_all

from msa_hf.synthetic.chain_corpora import ChainCorpus, ChainQuestion, make_chain_corpus
from msa_hf.synthetic.kinds import CHAIN_KINDS, HOPS, ChainKind

# How often each kind comes, its twin with it. One and two hops are what the other rows are full of.
SHARES: dict[ChainKind, int] = {
    "one_hop": 1,
    "two_hop": 1,
    "three_hop": 4,
    "four_hop": 5,
    "comparison": 4,
    "order": 3,
    "join": 3,
    "version": 3,
}
ASTRAY = 0.12  # of the rounds that read a document which leads nowhere before the right one
BESIDE = 0.15  # of the rounds that read another document beside the right one
STUDIED = 6  # documents at most that are read for several questions
FACTS = 3  # of these documents that are asked for beside
SPARED = 0.6  # of the twins that are left out there


def chain_corpus(documents: int, seed: int, **options: Any) -> ChainCorpus:
    """A corpus of which nearly half the documents are planted, or as many as its entities allow: chains meet at people
    and places, so that in a small corpus these run out first."""
    draw = random.Random(f"chain mix {seed}")
    times = 0.42 * documents / (sum(SHARES.values()) * 4.2)  # a question and its twin take 4.2 documents
    rounding = {kind: draw.random() for kind in CHAIN_KINDS}
    while True:
        counts = {kind: int(times * SHARES[kind] + rounding[kind]) for kind in CHAIN_KINDS}
        if not any(counts.values()):
            raise ValueError(f"{documents} documents are too few for chains")
        try:
            return make_chain_corpus(documents, counts, seed=seed, **options)
        except ValueError as error:
            if "too many questions" not in str(error) and "too small" not in str(error):
                raise
        times, rounding = 0.8 * times, {kind: 0.9 * share for kind, share in rounding.items()}


@dataclass
class ChainRows:
    """Makes the rows of a batch.

    Attributes:
        memory: whether there is one, so that documents can be named before they were read.
    """

    tokenizer: Any
    corpus: ChainCorpus
    pieces: Pieces
    draw: random.Random
    memory: bool

    def questions(self, count: int) -> list[ChainQuestion]:
        """Some of the corpus, all of them before any comes again."""
        asked: list[ChainQuestion] = []
        while len(asked) < count:
            asked += self.draw.sample(self.corpus.questions, len(self.corpus.questions))
        return asked[:count]

    def following(self, count: int) -> list[Row]:
        """Up to a round: the question and the texts of the rounds before, then the ids of the next one, if any."""
        questions = self.questions(count)
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        rows = []
        for question, asked, near in zip(questions, coded, self.near(questions), strict=True):
            order = self.in_some_order(question)
            done = self.draw.randrange(len(order) + 1)
            row = self.opened(asked)
            blocks = self.blocks(order[:done], near)
            for number, chosen in enumerate(blocks):
                row.add(self.pieces.named(chosen))
                row.add(self.pieces.block(chosen), routes=number == len(blocks) - 1)
            wanted = order[done:] if question.kind not in HOPS else order[done : done + 1]
            # In the first round the routers find what there is; that there is nothing is said of texts that were read.
            if not wanted and not blocks:
                continue
            said = self.pieces.named(wanted[:1]) if wanted else [self.pieces.symbols["<|answer|>"]]
            # Which of several comes next is chance, but not that there is one.
            row.add(said[:1], labeled=True)
            row.add(said[1:], labeled=len(wanted) < 2)
            row.positives = wanted or order[-1:]
            rows.append(row)
        return rows

    def chains(self, count: int) -> list[Row]:
        """Whole transcripts: question, texts of all rounds, answer; and further questions of the same texts."""
        questions = self.questions(count)
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        said = encode_all(self.tokenizer, [f" {question.answer}" for question in questions])
        rows = []
        for question, asked, near, answer in zip(questions, coded, self.near(questions), said, strict=True):
            order = self.in_some_order(question)
            blocks = self.blocks(order, near) or [self.others(order, 1)]
            row = self.opened(asked)
            for number, chosen in enumerate(blocks):
                exact = self.memory and number < len(order) and chosen == [order[number]] and question.kind in HOPS
                row.add(self.pieces.named(chosen), labeled=exact)
                row.add(self.pieces.block(chosen), routes=number == len(blocks) - 1)
            row.add([self.pieces.symbols["<|answer|>"]], labeled=self.memory and bool(order))
            row.add([*asked, self.pieces.symbols["\n"]])
            row.add([*answer, self.pieces.symbols["<|end|>"]], labeled=True)
            row.positives = list(order)
            rows.append(row)
        return rows

    dense_chains = chains

    def studying(self, count: int) -> list[Row]:
        """Texts of several questions, then all of these, and single facts of the texts: what two documents say together
        is learned from answers, of which other rows have one."""
        known = self.corpus.facts()
        groups = [self.together() for _ in range(count)]
        asked: list[tuple[Row, str, str]] = []
        rows = []
        for questions, heading in zip(
            groups, encode_all(self.tokenizer, [group[0].text for group in groups]), strict=True
        ):
            places = list(dict.fromkeys(place for question in questions for place in question.positives))
            self.draw.shuffle(places)
            row = self.opened(heading)
            size = self.draw.choice((1, 1, 2, 3))
            blocks = [places[start : start + size] for start in range(0, len(places), size)]
            for number, chosen in enumerate(blocks):
                row.add(self.pieces.named(chosen))
                row.add(self.pieces.block(chosen), routes=number == len(blocks) - 1)
            row.add([self.pieces.symbols["<|answer|>"]])
            row.positives = list(questions[0].positives)
            rows.append(row)
            stated = [fact for place in places for fact in known[place]]
            further = [(item.text, item.answer) for item in questions[1:]]
            further += [
                (self.draw.choice(fact.questions), fact.answer)
                for fact in self.draw.sample(stated, min(FACTS, len(stated)))
            ]
            self.draw.shuffle(further)
            asked += [(row, text, answer) for text, answer in [(questions[0].text, questions[0].answer), *further]]
        texts = encode_all(self.tokenizer, [text for _, text, _ in asked])
        answers = encode_all(self.tokenizer, [f" {answer}" for _, _, answer in asked])
        for (row, _, _), text, answer in zip(asked, texts, answers, strict=True):
            row.add([*text, self.pieces.symbols["\n"]])
            row.add([*answer, self.pieces.symbols["<|end|>"]], labeled=True)
        return rows

    def together(self) -> list[ChainQuestion]:
        """Questions that are read for together, the first of which has documents; of twins fewer than there are."""
        chosen: list[ChainQuestion] = []
        documents = 0
        for question in self.draw.sample(self.corpus.questions, len(self.corpus.questions)):
            if question.broken and (not chosen or self.draw.random() < SPARED):
                continue
            if documents + len(question.positives) > STUDIED:
                break
            chosen.append(question)
            documents += len(question.positives)
        return chosen

    def in_some_order(self, question: ChainQuestion) -> list[int]:
        """The documents as rounds find them: hops one after the other, two entities or editions either way."""
        order = list(question.positives)
        if question.kind not in HOPS:
            self.draw.shuffle(order)
        return order

    def blocks(self, order: Sequence[int], near: Sequence[int]) -> list[list[int]]:
        """What each round reads: mostly its document alone."""
        blocks: list[list[int]] = []
        read = set(order)
        for place in order:
            if self.draw.random() < ASTRAY / 2:
                blocks.append(self.others(read, 1, near))
                read.update(blocks[-1])
            chosen = [place]
            if self.draw.random() < BESIDE:
                chosen += self.others(read, 1, near)
                self.draw.shuffle(chosen)
                read.update(chosen)
            blocks.append(chosen)
        return blocks

    def others(self, read: Sequence[int] | set[int], count: int, near: Sequence[int] = ()) -> list[int]:
        """Documents that lead nowhere, half of them with a name like that of the question's."""
        likely = [place for place in near if place not in read]
        if likely and self.draw.random() < 0.5:
            return [self.draw.choice(likely)]
        places = self.draw.sample(range(len(self.corpus)), count + len(read))
        return [place for place in places if place not in read][:count]

    def near(self, questions: Sequence[ChainQuestion]) -> list[list[int]]:
        """For every question, documents with names like those of its documents."""
        places = [place for question in questions for place in question.positives]
        found = iter(self.corpus.nearest(places, 2).tolist() if places else ())
        return [[place for _ in question.positives for place in next(found) if place >= 0] for question in questions]

    def opened(self, asked: list[int]) -> Row:
        row = Row([], [], [], [])
        row.add(asked, routes=True)
        row.add([self.pieces.symbols["<|ids|>"]])
        return row
