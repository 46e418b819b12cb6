"""Tasks planted in a haystack and asked for: as many in one bank as leave most of its documents as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tqdm.auto import tqdm

from ..synthetic.sentences import insert_sentence
from .asking import Ask, Judge, Outcome, holds_all, put
from .banks import HaystackBanks
from .haystack import Haystack, HaystackTooSmall, Insert, Plant
from .result import Axis, Result, Trial

MOST_PLANTED = 0.25  # of a bank's documents: in a small haystack the tasks take turns in several banks
READ_KEPT = 16  # positions of documents read that a trial keeps


@dataclass(frozen=True)
class Question:
    """A question about what a task plants.

    Attributes:
        id, kind, axes: of its trial.
        expected: what the answer must hold.
        gold: which of the task's plants hold the answer, in the order of the hops; none where nothing does.
    """

    id: str
    kind: str
    axes: Mapping[str, Axis]
    text: str
    expected: tuple[str, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Sentences to be planted, and the questions about them."""

    plants: tuple[Plant, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Asking:
    """Settings by which questions are put.

    Attributes:
        max_new_tokens: of an answer, for each value that is asked for.
        options: of Memory Interleave.
        judge: whether an answer holds what was expected.
        insert: how a sentence goes into a text.
    """

    batch_size: int = 8
    max_new_tokens: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    judge: Judge = holds_all
    insert: Insert = insert_sentence


def check_room(haystack: Haystack, tokens: int, most_plants: int) -> None:
    """Make sure that the largest task goes into the smallest haystack.

    Raises:
        HaystackTooSmall: naming how many documents it has.
    """
    documents = haystack.documents(tokens)
    if documents * MOST_PLANTED < most_plants:
        raise HaystackTooSmall(
            f"A haystack of {tokens:,} tokens has {documents} documents, too few for {most_plants} sentences of one "
            f"question where at most one document in {round(1 / MOST_PLANTED)} gets one; ask for larger sizes or "
            "smaller documents."
        )


def asked_before(result: Result, task: Task) -> bool:
    """Tell whether a result has all questions of a task.

    Raises:
        ResultError: where it has another question of that name.
    """
    return all([result.done(item.id, item.text, item.expected) for item in task.questions])


def ask_tasks(
    result: Result,
    tasks: Sequence[Task],
    documents: int,
    banks: HaystackBanks,
    asking: Asking,
    progress: tqdm[Any] | None = None,
) -> None:
    """Plant tasks among the first documents of a haystack, ask all that the result does not have, and keep the trials.

    What lies in a bank does not depend on what was asked before.
    """
    for group in banks_of_tasks(tasks, documents):
        left = [item for task in group for item in task.questions if not result.done(item.id)]
        if progress is not None:
            progress.update(sum(len(task.questions) for task in group) - len(left))
        for trials in _trials(result, group, documents, banks, asking) if left else ():
            result.add(trials)
            if progress is not None:  # a large bank has all questions of its size
                progress.update(len(trials))


def banks_of_tasks(tasks: Sequence[Task], documents: int) -> Iterator[list[Task]]:
    """The tasks in groups, each for a bank of its own; at most a quarter of its documents get a sentence."""
    group: list[Task] = []
    most, planted = int(documents * MOST_PLANTED), 0
    for task in tasks:
        if group and planted + len(task.plants) > most:
            yield group
            group, planted = [], 0
        group.append(task)
        planted += len(task.plants)
    if group:
        yield group


def _trials(
    result: Result, group: Sequence[Task], documents: int, banks: HaystackBanks, asking: Asking
) -> Iterator[list[Trial]]:
    plants = [plant for task in group for plant in task.plants]
    places = banks.haystack.place(documents, plants)
    bank = banks.bank(documents, banks.haystack.planted(places, plants, asking.insert))
    rest = iter(places)
    asks: list[tuple[Question, Ask]] = []
    for task in group:
        own = [next(rest) for _ in task.plants]
        for question in task.questions:
            if not result.done(question.id, question.text, question.expected):
                rounds = tuple((own[number],) for number in question.gold)
                asks.append((question, Ask(question.text, question.expected, rounds)))
    for values in sorted({len(question.expected) for question, _ in asks}):
        alike = [item for item in asks if len(item[0].expected) == values]
        found = put(
            banks.model,
            banks.tokenizer,
            bank,
            banks.protocol,
            [ask for _, ask in alike],
            asking.judge,
            batch_size=asking.batch_size,
            max_new_tokens=asking.max_new_tokens * values,
            **asking.options,
        )
        rest_of = iter(alike)
        for outcomes in found:
            yield [_trial(banks.haystack, *next(rest_of), outcome) for outcome in outcomes]


def _trial(haystack: Haystack, question: Question, ask: Ask, outcome: Outcome) -> Trial:
    detail = {
        "found": outcome.found,
        "of": len(ask.expected),
        "broke": outcome.broke,
        "gold": list(ask.gold),
        "tokens_apart": [abs(haystack.tokens(b) - haystack.tokens(a)) for a, b in pairwise(ask.gold)],
        "gold_read": len(set(ask.gold) & set(outcome.read)),
        "read": list(outcome.read)[:READ_KEPT],
        **outcome.rungs,
    }
    return Trial(
        question.id,
        question.kind,
        question.axes,
        question.text,
        question.expected,
        outcome.answer,
        outcome.right,
        detail,
    )
