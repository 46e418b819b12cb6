"""Findings and a monitor without a model, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_hf.hybrid.monitoring import Cost, Finding, SecondAnswer


def finding(question: str = "Where is it?", **changes: Any) -> Finding:
    """A question that is flagged because the texts say otherwise."""
    values: dict[str, Any] = {
        "question": question,
        "answer": "in the mill",
        "unanswered": False,
        "read": ["mill"],
        "routed": [0, 2],
        "signals": {"texts_disagree": 4.0, "low_score": -0.5},
        "reasons": ["texts_disagree"],
        "second": {"texts": SecondAnswer("in the barn", False, ["barn"]), "denser": SecondAnswer("", True, [])},
        "cost": {"routing": Cost(0.25), "texts": Cost(0.5, 120)},
    }
    return Finding(**{**values, **changes})


def healthy(question: str = "Who is it?", **changes: Any) -> Finding:
    """A question that is not flagged."""
    agrees = {"texts": SecondAnswer("in the mill", True, ["barn"])}
    return finding(question, reasons=[], second=agrees, signals={"texts_disagree": 0.0, "low_score": -0.9}, **changes)


class FakeMonitor:
    """Finds every question flagged, fails where one says so, and remembers its batches."""

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size
        self.batches: list[list[str]] = []

    def check(self, questions: Sequence[str], answers: Sequence[Any]) -> list[Finding]:
        self.batches.append(list(questions))
        if any("fail" in question for question in questions):
            raise RuntimeError("a question that cannot be monitored")
        return [
            finding(question, answer=answer, signals={}) for question, answer in zip(questions, answers, strict=True)
        ]
