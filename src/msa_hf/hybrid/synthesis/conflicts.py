"""Contradictions: answers to one question that are not the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...evaluation.metrics import normalize_answer
from .findings import Finding


@dataclass(frozen=True, slots=True)
class Conflict:
    """A question to which documents give different answers.

    Attributes:
        question: as it was asked.
        sides: the findings of each answer; answers in the order in which they came.
    """

    question: str
    sides: tuple[tuple[Finding, ...], ...]

    def describe(self) -> str:
        """All sides with their sources, on one line."""
        told = [f"{side[0].answer!r} {''.join(f'[{finding.key}]' for finding in side)}" for side in self.sides]
        return f"{self.question}: {'; '.join(told)}"


def find_conflicts(findings: Sequence[Finding]) -> list[Conflict]:
    """The questions whose findings differ. Answers are the same if they are without case, articles, punctuation and
    surplus white space; no answer is taken for a more precise form of another. Empty ones say nothing."""
    questions: dict[str, dict[str, dict[str, Finding]]] = {}
    first: dict[str, str] = {}
    for finding in findings:
        answer, question = normalize_answer(finding.answer), " ".join(finding.question.split()).casefold()
        if answer:
            first.setdefault(question, finding.question)
            questions.setdefault(question, {}).setdefault(answer, {}).setdefault(finding.key, finding)
    return [
        Conflict(first[question], tuple(tuple(side.values()) for side in sides.values()))
        for question, sides in questions.items()
        if len(sides) > 1
    ]
