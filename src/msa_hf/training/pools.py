"""Pools for routers without labels: which passages compete in a step, and what each of them is asked by.

A quarter of a pool's questions are seeds; each brings its passage, wrong passages that were found for it, and another
passage of the same document. What room is left goes to passages at random. Every passage of the pool that has pairs
asks a question of its own, so that near-misses cost nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..generation.prompting import prompting_of
from ..model.tokenizing_msa import tokenize_texts
from .mining import TokenStore
from .pairs import PairMaker

SEED_SHARE = 4  # one seed for so many passages of a pool
LABELED_SHARE = 4  # one labeled question for so many seeds, at least
ASKED_SHARE = 0.5  # of a passage's questions that a model asked, where it did
COMPANIONS = 2  # wrong passages of a seed
MOST_GOLD = 4  # passages of a labeled question in a pool


class Coder:
    """Texts in tokens, as a bank holds documents and as questions are put.

    Args:
        tokenizer: of the model.
        protocol: that wraps documents and questions; None: documents are encoded as they are, questions put by the
            chat template, else by the training prompt.

    Attributes:
        skipped: tokens of every question that stand before the first that routes.

    Raises:
        ValueError: for a protocol whose prompt has words between those that route that do not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol | None = None) -> None:
        self.tokenizer, self.protocol = tokenizer, protocol
        self.prompting = prompting_of(tokenizer, protocol)
        self.skipped, _ = self.prompting.routing_rows(["?"])

    def documents(self, texts: Sequence[str], numbers: Sequence[int]) -> list[list[int]]:
        """Token ids of passages; `numbers` are the ids that a protocol may name them by."""
        if self.protocol is None:
            return tokenize_texts(self.tokenizer, texts)
        return [
            self.protocol.encode(self.tokenizer, self.protocol.document, id=number, text=text)
            for number, text in zip(numbers, texts, strict=True)
        ]

    def questions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of questions, up to the last that routes."""
        return self.prompting.routing_rows(texts)[1]


@dataclass(frozen=True)
class Asked:
    """A question that passages answer.

    Attributes:
        query: its words.
        kind: of a pair, or `"question"` for a labeled one.
        gold: places of passages.
        text: the passage as it is to be found, where it is not as it stands.
        answer: of a labeled question.
    """

    query: str
    kind: str
    gold: tuple[int, ...]
    text: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Round:
    """The seeds of some steps, with what is wrong for them.

    Attributes:
        first: step that it begins with.
        seeds: questions.
        misses: [seeds, n] int64 places of wrong passages, -1 for none.
    """

    first: int
    seeds: list[Asked]
    misses: NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """The passages and questions that compete in a step.

    Attributes:
        places: of the passages.
        documents: token ids of the passages.
        queries, questions: the questions, as words and as token ids.
        positives: [Q, N] bool.
        labeled: [Q] bool, questions that people asked.
        seeds: numbers of the seeds among the round's.
    """

    places: list[int]
    documents: list[list[int]]
    queries: list[str]
    questions: list[list[int]]
    positives: Tensor
    labeled: Tensor
    seeds: list[int]


class PoolDrawer:
    """Draws seeds and pools; the same ones for the same step, whatever was drawn before.

    Args:
        maker: of the pairs.
        store: token ids of all passages.
        coder: of texts.
        held_out: places of passages that ask nothing, but are wrong answers like others.
        labeled: questions with the passages that answer them.
        asked: place -> further questions about a passage.
        size: passages of a pool.
        question_tokens: of the questions of a pool, at most.
        seed: of the draws.
    """

    def __init__(
        self,
        maker: PairMaker,
        store: TokenStore,
        coder: Coder,
        held_out: set[int],
        labeled: Sequence[Asked] = (),
        asked: dict[int, list[str]] | None = None,
        size: int = 64,
        question_tokens: int = 30_000,
        seed: int = 0,
    ) -> None:
        self.maker, self.store, self.coder, self.held_out = maker, store, coder, held_out
        self.labeled, self.asked = labeled, asked or {}
        self.size, self.question_tokens, self.seed = min(size, len(store)), question_tokens, seed
        self.free = np.asarray([place for place in range(len(store)) if place not in held_out])
        documents = np.asarray([passage.document for passage in maker.passages])
        self.first = np.searchsorted(documents, documents, side="left")
        self.last = np.searchsorted(documents, documents, side="right")

    @property
    def seeds_per_pool(self) -> int:
        return max(self.size // SEED_SHARE, 1)

    def question(self, place: int, turn: int, pick: random.Random) -> Asked | None:
        """What a passage is asked by in a turn: one that a model asked, as often as not, or a pair.

        Its own place stands last among those of the passages that answer it.
        """
        if place in self.held_out:
            return None
        if (asked := self.asked.get(place)) and pick.random() < ASKED_SHARE:
            return Asked(pick.choice(asked), "asked", (place,))
        pair = self.maker.one(place, turn)
        if pair is None:
            return None
        gold: tuple[int, ...] = (place,)
        if pair.kind == "title":
            gold = (*(other for other in range(int(self.first[place]), int(self.last[place])) if other != place), place)
        text = None if pair.text == self.maker.passages[place].text else pair.text
        return Asked(pair.query, pair.kind, gold, text)

    def seeds(self, first: int, most: int) -> list[Asked]:
        """The seeds of the round that begins at a step."""
        pick = np.random.default_rng((self.seed, 1, first))
        found: list[Asked] = []
        if self.labeled:
            count = min(max(most // LABELED_SHARE, 1), len(self.labeled))
            found += [self.labeled[number] for number in pick.permutation(len(self.labeled))[:count]]
        for place in pick.permutation(self.free).tolist():
            if len(found) >= most:
                break
            if (item := self.question(place, first, random.Random(f"{self.seed}, seed {first} {place}"))) is not None:
                found.append(item)
        order = pick.permutation(len(found))
        return [found[number] for number in order]

    def draw(self, step: int, round: Round) -> Pool:
        """The pool of a step of a round."""
        pick = random.Random(f"{self.seed}, pool {step}")
        count = min(self.seeds_per_pool, len(round.seeds))
        start = (step - round.first) * count
        numbers = [place % len(round.seeds) for place in range(start, start + count)]
        texts: dict[int, str | None] = {}  # place -> the passage where it is not as it stands
        asked: list[Asked] = []
        used: list[int] = []
        own: list[int] = []  # passages that are to ask for themselves
        for number in numbers:
            item = round.seeds[number]
            if item.kind == "question":
                for place in item.gold[:MOST_GOLD]:
                    texts[place] = None  # whole, also where a pair has taken its sentence out: it may be the answer
            elif item.gold[-1] in texts:
                continue
            else:
                texts[item.gold[-1]] = item.text
            asked.append(item)
            used.append(number)
        companions: list[int] = []
        for number in used:
            wrong = [place for place in round.misses[number].tolist() if place >= 0]
            companions += pick.sample(wrong, min(COMPANIONS, len(wrong)))
            place = round.seeds[number].gold[-1]
            if self.last[place] - self.first[place] > 1:
                companions.append(pick.randrange(int(self.first[place]), int(self.last[place])))
        for place in companions:
            if len(texts) < self.size and place not in texts:
                texts[place] = None
                own.append(place)
        left = min(self.size, len(self.store)) - len(texts)
        for place in pick.sample(range(len(self.store)), min(self.size + left, len(self.store))) if left > 0 else ():
            if len(texts) < self.size and place not in texts:
                texts[place] = None
                own.append(place)
        for place in own:
            if (question := self.question(place, step, pick)) is not None:
                asked.append(question)
                texts[place] = question.text
        return self._pool(texts, asked, used)

    def _pool(self, texts: dict[int, str | None], asked: list[Asked], used: list[int]) -> Pool:
        questions = self.coder.questions([item.query for item in asked])
        total = np.cumsum([len(question) for question in questions])
        fits = max(int(np.searchsorted(total, self.question_tokens, side="right")), 1)
        asked, questions = asked[:fits], questions[:fits]
        changed = [place for place, text in texts.items() if text is not None]
        coded = self.coder.documents([texts[place] or "" for place in changed], changed)
        rows = dict(zip(changed, coded, strict=True))
        places = list(texts)
        column = {place: number for number, place in enumerate(places)}
        positives = torch.zeros(len(asked), len(places), dtype=torch.bool)
        for row, item in enumerate(asked):
            positives[row, [column[place] for place in item.gold if place in column]] = True
        return Pool(
            places,
            [rows[place] if rows.get(place) else self.store.row(place) for place in places],
            [item.query for item in asked],
            questions,
            positives,
            torch.tensor([item.kind == "question" for item in asked]),
            used,
        )
