"""Corpora with needles in some of their documents, to train models that read them (`needles.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .corpora import UNANSWERABLE, make_corpus
from .hashing import Draws, Integers
from .needle_wordings import Wording
from .needles import TASKS, VALUES, NeedleTasks
from .sentences import insert_sentence
from .words import Split

PLANTED = 0.4  # of the documents
UNANSWERED = 0.2  # of the questions


@dataclass(frozen=True, slots=True)
class NeedleQuestion:
    """A question to a corpus with needles.

    Attributes:
        text: the question.
        answers: the values, in the order of `positives`; nothing where there is none.
        kind: the task, or "unanswerable".
        positives: positions of the documents with these values, which come in any order.
        near: those that are easily taken for them.
    """

    text: str
    answers: tuple[str, ...]
    kind: str
    positives: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def answer(self) -> str:
        """The values, or `UNANSWERABLE`."""
        return ", ".join(self.answers) or UNANSWERABLE


class NeedleCorpus:
    """A corpus of invented entities (`make_corpus`) with a needle in some of its documents.

    Args:
        documents: how many.
        seed: another seed gives other documents and needles.
        split: "train" and "test" share no names, keys and wordings.
        words, wordings: of the needles, see `NeedleTasks`.
        options: of `make_corpus`.

    Attributes:
        questions: about each needle task once, in turns of all kinds; some have no answer.
    """

    def __init__(
        self,
        documents: int,
        seed: int = 0,
        split: Split = "train",
        words: tuple[Sequence[str], Sequence[str]] | None = None,
        wordings: Sequence[Wording] | None = None,
        **options: Any,
    ) -> None:
        self._texts = make_corpus(documents, seed=seed, split=split, **options).texts()
        self.questions: list[NeedleQuestion] = []
        tasks, draws = NeedleTasks(seed, split, words, wordings), Draws("needle corpus", seed, split)
        free = draws.shuffled(range(documents))[: round(documents * PLANTED)]
        number = 0
        while True:
            name, values = TASKS[number % len(TASKS)], draws.pick(VALUES)
            task = tasks.task(name, values, number)
            if len(free) < len(task.needles) or number + 1 == len(tasks):
                break
            places = [free.pop() for _ in task.needles]
            for place, needle in zip(places, task.needles, strict=True):
                self._texts[place] = insert_sentence(self._texts[place], needle.sentence, draws.below(1001) / 1000)
            gold = len(task.answers)
            if gold == 1 and draws.below(1000) < 1000 * UNANSWERED * len(TASKS) / 3:
                asked = tasks.unanswerable(values, number)
                self.questions.append(NeedleQuestion(asked, (), "unanswerable", (), tuple(places)))
            else:
                answer, near = tuple(places[:gold]), tuple(places[gold:])
                self.questions.append(NeedleQuestion(task.question, task.answers, name, answer, near))
            number += 1
        self._near = {place: item.near for item in self.questions for place in item.positives}

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self) -> list[str]:
        """The documents."""
        return list(self._texts)

    def nearest(self, positions: Sequence[int], count: int) -> Integers:
        """[n, count] documents that are easily taken for these; -1 where there are no more."""
        rows = [[*self._near.get(place, ())][:count] for place in positions]
        return np.array([row + [-1] * (count - len(row)) for row in rows], np.int64).reshape(len(rows), count)
