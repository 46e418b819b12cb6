"""The figures of a diagnosis, as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..tables import table_lines
from .recall import RouterRecall

EVERY = "all"  # what questions of all kinds together are called


@dataclass(frozen=True)
class Answers:
    """The answers to questions of one kind under one condition, as shares of them.

    Attributes:
        questions: how many there were.
        exact: answered right, by `exact_match`.
        empty: answered with nothing.
        refused: answered with the refusal, rightly or not; None where the caller named none.
        gold_read: the mean share of a question's positives whose texts were read; None where no texts are read.
    """

    questions: int
    exact: float
    empty: float
    refused: float | None = None
    gold_read: float | None = None


@dataclass
class Diagnosis:
    """The measurements of `diagnose`.

    Attributes:
        documents, tokens: of the bank.
        questions: kind -> how many.
        router: what `router_recall` returned; None where no question has positives.
        answers: condition -> kind -> figures. The kind `"all"` is all of them.
        ids: how documents were named (`"generate"`, `"constrained"`) -> kind -> share of the questions in whose first
            round exactly the right ids were named.
        predictions: condition -> what was answered to each question; None where it was not asked.
        left_out: condition -> texts that did not fit into the model's positions.
        settings: what was asked for.
    """

    documents: int
    tokens: int
    questions: dict[str, int]
    router: RouterRecall | None = None
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    ids: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: dict[str, list[str | None]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values; layers become strings, as keys of JSON objects are."""
        return json.loads(self.to_json())

    def to_json(self, indent: int | None = None) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, indent=indent)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.questions.items())
        lines = [f"{self.documents} documents, {self.tokens} tokens; questions: {counts}"]
        if self.router is not None:
            lines += ["", *_router_table(self.router)]
        if self.answers:
            lines += ["", *self._answer_table()]
        if self.ids:
            lines += ["", "ids named in the first round, exactly the right ones"]
            rows = [[name, *(_shown(found.get(kind)) for kind in self._columns())] for name, found in self.ids.items()]
            lines += table_lines([["selection", *self._columns()], *rows])
        return "\n".join(lines)

    def _columns(self) -> list[str]:
        kinds = list(self.questions)
        return [*kinds, EVERY] if len(kinds) > 1 else kinds

    def _answer_table(self) -> Iterator[str]:
        columns = self._columns()
        rows, notes = [], []
        for condition, found in self.answers.items():
            if not found:
                notes.append(f"{condition}: left out, as no question has positives")
                continue
            total = found[EVERY]
            rows.append(
                [
                    condition,
                    *(_shown(found[kind].exact if kind in found else None) for kind in columns),
                    *(_shown(value) for value in (total.empty, total.refused, total.gold_read)),
                ]
            )
            most = max(item[EVERY].questions for item in self.answers.values() if item)
            if total.questions < most:
                notes.append(f"{condition}: of {total.questions} questions; the others have no positives")
            if self.left_out.get(condition):
                notes.append(f"{condition}: {self.left_out[condition]} texts were left out, as they did not fit")
        yield "exact answers by kind of question; over all of them: empty, refused, gold documents read"
        yield from table_lines([["condition", *columns, "empty", "refused", "gold read"], *rows])
        yield from notes


def _router_table(router: RouterRecall) -> Iterator[str]:
    k = router["k"]
    yield f"router, {router['questions']} questions as first put, {router['wanted']} documents wanted first"
    by_layer = (router["layers"], router["first_layers"], router["layers_at_1"], router["first_layers_at_1"])
    rows = [
        [str(layer), *(_shown(shares[layer]) for shares in by_layer), str(router["distinct"][layer])]
        for layer in router["layers"]
    ]
    of_any = (router["recall"], router["first"], router["recall_at_1"], router["first_at_1"])
    rows.append(["any", *map(_shown, of_any), ""])
    yield from table_lines([["layer", f"all@{k}", f"first@{k}", "all@1", "first@1", "distinct"], *rows])


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
