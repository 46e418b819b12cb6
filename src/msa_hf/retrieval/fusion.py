"""Putting several rankings together: by reciprocal ranks, or by weights that were learned on questions with answers.

A *way* of searching (router, lexical, dense) gives a question a list of documents with scores, best first. What the
fused score is a weighted sum of, per document and way:

    score        the way's score, as standard deviations above the mean of the way's list for this question; a document
                 that is not on the list has the lowest of the list, less one
    gap          the same scale, below the best of the list: 0 for the first
    reciprocal   61 / (60 + rank): 1 for the first, 0 for a document that is not on the list
    absent       1 for a document that is not on the list, else 0

With weights on `reciprocal` alone this is fusion by reciprocal ranks, so the learned weights contain it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

FILE = "fusion.json"
FORMAT = "msa_hf-fusion"
VERSION = 1
CONSTANT = 60  # of reciprocal ranks, as in the method's paper (Cormack, Clarke and Buettcher, 2009)
FEATURES = ("score", "gap", "reciprocal", "absent")
RECIPROCAL, LEARNED = "reciprocal ranks", "learned weights"
DEPTHS = (1, 10)  # recall at these, averaged, is what methods are compared by
RIDGE = 1e-3
STEPS = 200
# Of the questions, every third judges the methods; all of them make the weights that are kept.
JUDGES = 3

Ranking: TypeAlias = Sequence[tuple[int, float]]  # documents and scores, best first
Candidates: TypeAlias = Mapping[str, Ranking]  # way -> its list


@dataclass(frozen=True)
class FusionWeights:
    """How rankings are put together.

    Attributes:
        ways: in order, those that the weights are for.
        method: `"learned weights"`, `"reciprocal ranks"`, or the name of one way, whose order is kept and which others
            only follow.
        weights: [ways][features], of `FEATURES`; used by learned weights.
        questions: that it was fitted on.
        recall: method -> mean of recall at 1 and at 10 on the questions that judged, which chose the method.
    """

    ways: tuple[str, ...]
    method: str = RECIPROCAL
    weights: tuple[tuple[float, ...], ...] = ()
    questions: int = 0
    recall: dict[str, float] = field(default_factory=dict)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `fusion.json` beside a checkpoint or a bank."""
        record = {"format": FORMAT, "version": VERSION, "features": list(FEATURES), **asdict(self)}
        (Path(directory) / FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FusionWeights:
        """Read `fusion.json` of a checkpoint or a bank.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for what is no such file, naming the cause.
        """
        path = Path(directory) / FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT or record["version"] != VERSION or tuple(record["features"]) != FEATURES:
                raise ValueError("its format, version or features are others")
            ways, method = tuple(map(str, record["ways"])), str(record["method"])
            weights = tuple(tuple(map(float, row)) for row in record["weights"])
            if method not in (RECIPROCAL, LEARNED, *ways):
                raise ValueError(f"no method is called {method!r:.80}")
            if method == LEARNED and [len(row) for row in weights] != [len(FEATURES)] * len(ways):
                raise ValueError("its weights are not those of its ways and features")
            recall = {str(name): float(value) for name, value in record["recall"].items()}
            return cls(ways, method, weights, int(record["questions"]), recall)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not weights of a fusion ({error}); fit them again.") from error


def fuse(candidates: Candidates, weights: FusionWeights | None = None) -> list[tuple[int, float]]:
    """One ranking of all documents on the lists, best first; equal scores go to the lower document.

    Args:
        candidates: way -> its list.
        weights: None: by reciprocal ranks.

    Raises:
        ValueError: where learned weights are for other ways than those asked.
    """
    method = RECIPROCAL if weights is None else weights.method
    if weights is not None and method != RECIPROCAL and set(weights.ways) != set(candidates):
        raise ValueError(
            f"The fusion weights are for {', '.join(weights.ways)}, but {', '.join(candidates)} were asked: fit "
            "others, or pass fusion='reciprocal'."
        )
    documents = sorted({document for ranking in candidates.values() for document, _ in ranking})
    if not documents:
        return []
    if weights is not None and method == LEARNED:
        features = torch.cat([_features(candidates[way], documents) for way in weights.ways], dim=1)
        scores = (features @ torch.tensor(weights.weights, dtype=torch.float64).flatten()).tolist()
    else:
        reciprocal = torch.stack([_features(ranking, documents)[:, 2] for ranking in candidates.values()])
        scores = reciprocal.sum(0).tolist()
        if method != RECIPROCAL:  # one way first; the others order what it does not have
            first = {document: len(candidates[method]) - rank for rank, (document, _) in enumerate(candidates[method])}
            ways = len(candidates)
            scores = [
                score / (ways + 1) + first.get(document, 0) for document, score in zip(documents, scores, strict=True)
            ]
    return sorted(zip(documents, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))


def fit_fusion(candidates: Sequence[Candidates], gold: Sequence[Collection[int]]) -> FusionWeights:
    """Learn weights on questions whose documents are known; the same questions give the same weights.

    A softmax over a question's candidates is fitted to its right documents (a convex loss, with a small ridge) on two
    thirds of the questions. On the others learned weights, reciprocal ranks and every way alone are compared by the
    mean of recall at 1 and at 10; the best is kept, the first of these where they are equal. Learned weights are then
    fitted on all questions. What was chosen gives way to reciprocal ranks, or to one way alone, where these are better
    on all questions together.

    Args:
        candidates: of each question, way -> its list. All have the same ways, at least one.
        gold: of each question, the documents that answer it, at least one.

    Raises:
        ValueError: for no questions, other ways in one of them, or a question without a document.
    """
    if not candidates or len(candidates) != len(gold):
        raise ValueError(f"{len(candidates)} questions with candidates, {len(gold)} with documents: at least one each.")
    ways = tuple(candidates[0])
    for number, (lists, right) in enumerate(zip(candidates, gold, strict=True)):
        if set(lists) != set(ways) or not ways:
            raise ValueError(f"Question {number} has lists of {sorted(lists)}, the first of {sorted(ways)}.")
        if not right:
            raise ValueError(f"Question {number} has no document that answers it; leave it out.")
    judges = [number for number in range(len(gold)) if number % JUDGES == JUDGES - 1] or [0]
    taught = sorted(set(range(len(gold))) - set(judges)) or judges

    def methods(numbers: Sequence[int]) -> dict[str, FusionWeights]:
        learned = _learned(ways, [candidates[number] for number in numbers], [gold[number] for number in numbers])
        return {LEARNED: learned, RECIPROCAL: FusionWeights(ways), **{way: FusionWeights(ways, way) for way in ways}}

    def recalls(found: Mapping[str, FusionWeights], numbers: Sequence[int]) -> dict[str, float]:
        return {
            name: sum(_recall(fuse(candidates[number], item), gold[number]) for number in numbers) / len(numbers)
            for name, item in found.items()
        }

    judged = recalls(methods(taught), judges)
    best = max(judged, key=lambda name: judged[name])
    final = methods(range(len(gold)))
    everywhere = recalls(final, range(len(gold)))
    plain = max((RECIPROCAL, *ways), key=lambda name: everywhere[name])
    if everywhere[best] < everywhere[plain]:
        best = plain
    kept = final[best]
    return FusionWeights(ways, best, kept.weights, len(gold), judged)


def _features(ranking: Ranking, documents: Sequence[int]) -> Tensor:
    """[documents, features] float64."""
    scores = torch.tensor([score for _, score in ranking], dtype=torch.float64)
    places = {document: place for place, (document, _) in enumerate(ranking)}
    spread = float(scores.std(correction=0)) if len(ranking) else 0.0
    normal = (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
    lowest, highest = (float(normal.min()), float(normal.max())) if len(ranking) else (0.0, 0.0)
    rows = []
    for document in documents:
        place = places.get(document)
        if place is None:
            rows.append((lowest - 1, lowest - 1 - highest, 0.0, 1.0))
        else:
            score = float(normal[place])
            rows.append((score, score - highest, (CONSTANT + 1) / (CONSTANT + 1 + place), 0.0))
    return torch.tensor(rows, dtype=torch.float64)


def _learned(ways: tuple[str, ...], candidates: Sequence[Candidates], gold: Sequence[Collection[int]]) -> FusionWeights:
    """Weights fitted to these questions; those whose documents are on no list teach nothing."""
    parts: list[Tensor] = []
    right: list[Tensor] = []
    for lists, wanted in zip(candidates, gold, strict=True):
        documents = sorted({document for ranking in lists.values() for document, _ in ranking})
        mask = torch.tensor([document in wanted for document in documents])
        if documents and bool(mask.any()):
            parts.append(torch.cat([_features(lists[way], documents) for way in ways], dim=1))
            right.append(mask)
    start = [[0.0, 0.0, 1.0, 0.0]] * len(ways)  # reciprocal ranks
    if not parts:
        return FusionWeights(ways, LEARNED, tuple(map(tuple, start)))
    # All questions in one padded tensor: [Q, documents, features].
    features = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    there = torch.nn.utils.rnn.pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], True)
    wanted = torch.nn.utils.rnn.pad_sequence(right, batch_first=True)
    share = wanted.double() / wanted.sum(1, keepdim=True)
    weights = torch.tensor(start, dtype=torch.float64).flatten().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = (features @ weights).masked_fill(~there, float("-inf"))
        logs = scores.log_softmax(1).masked_fill(~there, 0.0)
        value = -(share * logs).sum(1).mean() + RIDGE * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    rows = weights.detach().view(len(ways), len(FEATURES)).tolist()
    return FusionWeights(ways, LEARNED, tuple(tuple(row) for row in rows))


def _recall(ranking: Ranking, gold: Collection[int]) -> float:
    documents = [document for document, _ in ranking]
    shares = (len(set(documents[:depth]) & set(gold)) / min(len(gold), depth) for depth in DEPTHS)
    return sum(shares) / len(DEPTHS)
