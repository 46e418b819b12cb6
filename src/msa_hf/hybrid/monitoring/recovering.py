"""Answers to questions that had none: candidates are read one by one, and what several of them say is read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...evaluation.metrics import normalize_answer
from .names import QuestionNames
from .second_reading import Evidence, Reading, SecondReader, same_answer

CONFIRMING = 2  # documents that must be enough for an answer of several


@dataclass(frozen=True)
class Unanswered:
    """A question that had no answer.

    Attributes:
        question, answer: texts; the answer is empty or a refusal.
        read: positions of the documents that were read first.
        candidates: positions of documents that were not read, best first.
        names: which of the question's names documents have; None: unknown.
    """

    question: str
    answer: str
    read: Sequence[int]
    candidates: Sequence[int]
    names: QuestionNames | None = None

    def rounds(self, candidate: int) -> tuple[list[list[int]], float]:
        """The rounds that are read for a candidate, and the share of the question's names in it.

        What was read first stands before it where it has names that the candidate lacks: it may lead there. Elsewhere
        it only has the model refuse once more.
        """
        together = [*self.read, candidate]
        share = 1.0 if self.names is None else self.names.share(together)
        known = self.names is not None and self.names.weights and share <= self.names.share([candidate])
        return ([[candidate]] if known else in_rounds(self.read, [candidate])), share


@dataclass(frozen=True)
class Recovered:
    """The best answer of single documents.

    Attributes:
        text: of the answer; empty where none of them answers.
        advantage: in nats over no answer, times the share of names; 0 where none of them answers.
        tokens: that were processed for all of them.
        position: of the document that answers, or None.
    """

    text: str = ""
    advantage: float = 0.0
    tokens: int = 0
    position: int | None = None


def read_one_by_one(
    reader: SecondReader, asked: Sequence[Unanswered], says_nothing: Callable[[str], bool], batch_size: int
) -> list[Recovered]:
    """Put questions with one candidate each time, by itself or behind what leads to it (`Unanswered.rounds`).

    A model that finds the answer in one text may refuse it among several, or take a wrong one out of several.
    Candidates without any of the question's names are left out.
    """
    tried = [
        (place, position, *item.rounds(position)) for place, item in enumerate(asked) for position in item.candidates
    ]
    tried = [entry for entry in tried if entry[-1] > 0]
    best = [Recovered() for _ in asked]
    for start in range(0, len(tried), batch_size):
        batch = tried[start : start + batch_size]
        items = [asked[place] for place, *_ in batch]
        readings = reader.read(
            [item.question for item in items],
            [Evidence(rounds) for _, _, rounds, _ in batch],
            [item.answer for item in items],
        )
        for (place, position, _, share), reading in zip(batch, readings, strict=True):
            before, tokens = best[place], best[place].tokens + reading.tokens
            best[place] = replace(before, tokens=tokens)
            advantage = 0.0 if says_nothing(reading.text) else reading.advantage * share
            if advantage > before.advantage:
                best[place] = Recovered(reading.text, advantage, tokens, position)
    return best


def confirm(
    reader: SecondReader, item: Unanswered, reading: Reading, text_of: Callable[[int], str]
) -> tuple[float, int]:
    """The advantage of an answer that came from several documents, if those that say it are enough for it, else 0; and
    the tokens for that. An answer that no document says in these words keeps its advantage."""
    said = f" {normalize_answer(reading.text)} "
    saying = [position for position in item.candidates if said in f" {normalize_answer(text_of(position))} "]
    if not saying:
        return reading.advantage, 0
    (again,) = reader.read([item.question], [Evidence(in_rounds(item.read, saying[:CONFIRMING]))], [item.answer])
    same = same_answer(again.text, reading.text)
    return (min(reading.advantage, again.advantage) if same else 0.0), again.tokens


def in_rounds(read: Sequence[int], new: Sequence[int]) -> list[list[int]]:
    """Documents as two rounds read them, without rounds of none."""
    return [list(group) for group in (read, new) if group]
