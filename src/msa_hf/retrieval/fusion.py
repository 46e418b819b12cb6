"""Putting several rankings together: by reciprocal ranks, or by weights that were learned on questions with answers.

A *way* of searching (router, lexical, dense) gives a question a list of documents with scores, best first. What the
fused score is a weighted sum of, per document and way:

    score        the way's score, as standard deviations above the mean of the way's list for this question; a document
                 that is not on the list has the lowest of the list, less one
    gap          the same scale, below the best of the list: 0 for the first
    level        below the best of the list in the way's own unit, which is the same for all questions: how far a best
                 document usually stands above the mean of its list
    reciprocal   61 / (60 + rank): 1 for the first, 0 for a document that is not on the list
    steep        6 / (5 + rank), the same for the first few
    absent       1 for a document that is not on the list, else 0

The weights differ from question to question, because a way may be good for some only (words for questions that name
what they are about, vectors for what people type into a search box): each is itself a weighted sum of

    always       1
    lead, ten    per way, how far the best document stands above the second and the tenth, in the way's unit
    height       per way, how far it stands above the mean of the list, in standard deviations
    best         per way, its score, in the way's unit, above what is usual
    words        of the question
    asks         whether it ends with a question mark
    capital      whether it begins with a capital letter

With weights on `reciprocal` and `always` alone this is fusion by reciprocal ranks, so the learned weights contain it.

Weights may also say how the best of what they put together is read for its wording (`wording`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..model.bounds_msa import read_json
from ..model.hub_files_msa import file_beside
from . import wording as reading
from .rankings import Candidates, Ranking, ranks_of, scores_of, standing
from .sidecar import write_sidecar

FILE = "fusion.json"
FORMAT = "msa_hf-fusion"
VERSION, WITH_WORDING = 1, 2  # releases that do not read for wording refuse weights that want it
STEEP = 5  # of `steep`
CONSTANT = 60  # of reciprocal ranks, as in the method's paper (Cormack, Clarke and Buettcher, 2009)
FEATURES = ("score", "gap", "level", "reciprocal", "steep", "absent")
ABOUT_WAYS = ("lead", "ten", "height", "best")
ABOUT_WORDS = ("words", "asks", "capital")
RECIPROCAL, LEARNED = "reciprocal ranks", "learned weights"
DEPTHS = (1, 10)  # recall at these, averaged, is what methods are compared by
RIDGE = 1e-3
STEPS = 80
# Of the questions, every third judges the methods; all of them make the weights that are kept.
JUDGES = 3


@dataclass(frozen=True)
class FusionWeights:
    """A way to put rankings together.

    Attributes:
        ways: in order, those that the weights are for.
        method: `"learned weights"`, `"reciprocal ranks"`, or the name of one way, whose order is kept and which others
            only follow.
        weights: [ways * features][1 + 4 ways + 3], of `FEATURES` and of what they depend on; used by learned weights.
        units: per way its unit and the usual score of its best document; used by learned weights.
        questions: that it was fitted on.
        recall: method -> mean of recall at 1 and at 10 on the questions that judged, which chose the method.
        wording: of `rank_by_wording`, by which the best are read again, with the words of the lexical index, which is
            one of the ways then; empty: they are not.
    """

    ways: tuple[str, ...]
    method: str = RECIPROCAL
    weights: tuple[tuple[float, ...], ...] = ()
    units: tuple[tuple[float, ...], ...] = ()
    questions: int = 0
    recall: dict[str, float] = field(default_factory=dict)
    wording: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that none can be, a way named twice, or weights of a wording that are no table
        of theirs, or that no index has the words of."""
        if len(set(self.ways)) < len(self.ways):
            raise ValueError("it has a way twice")
        if not all(math.isfinite(value) for row in (*self.weights, *self.units, *self.wording) for value in row):
            raise ValueError("its weights have one that is not finite")
        if any(unit[0] <= 0 for unit in self.units):
            raise ValueError("the unit of a way is not positive")
        rows = len(reading.FEATURES) + len(self.ways)
        if self.wording and [len(row) for row in self.wording] != [len(reading.ABOUT)] * rows:
            raise ValueError("its weights of wording are not those of its features")
        if self.wording and "lexical" not in self.ways:
            raise ValueError("texts are read for their wording with the words of a lexical index, which is not asked")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `fusion.json` beside a checkpoint or a bank."""
        record = {"format": FORMAT, "version": VERSION, "features": list(FEATURES), **asdict(self)}
        if self.wording:
            record |= {"version": WITH_WORDING, "wording_features": [list(reading.FEATURES), list(reading.ABOUT)]}
        else:
            del record["wording"]
        write_sidecar(Path(directory) / FILE, record)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FusionWeights:
        """Read `fusion.json` of a checkpoint or a bank.

        Raises:
            FileNotFoundError: where there is none.
            ValueError: for what is no such file, naming the cause.
        """
        path = Path(directory) / FILE
        try:
            record = read_json(path)
            version = record["version"]
            if record["format"] != FORMAT or version not in (VERSION, WITH_WORDING):
                raise ValueError("its format or version are others")
            words = tuple(map(tuple, record["wording_features"])) if version == WITH_WORDING else None
            if tuple(record["features"]) != FEATURES or words not in (None, (reading.FEATURES, reading.ABOUT)):
                raise ValueError("its features are others")
            ways, method = tuple(map(str, record["ways"])), str(record["method"])
            weights = tuple(tuple(map(float, row)) for row in record["weights"])
            if method not in (RECIPROCAL, LEARNED, *ways):
                raise ValueError(f"no method is called {method!r:.80}")
            units = tuple(tuple(map(float, row)) for row in record["units"])
            about = 1 + len(ABOUT_WAYS) * len(ways) + len(ABOUT_WORDS)
            if method == LEARNED and (
                [len(row) for row in weights] != [about] * (len(FEATURES) * len(ways))
                or [len(row) for row in units] != [2] * len(ways)
            ):
                raise ValueError("its weights are not those of its ways and features")
            recall = {str(name): float(value) for name, value in record["recall"].items()}
            wording = () if words is None else tuple(tuple(map(float, row)) for row in record["wording"])
            return cls(ways, method, weights, units, int(record["questions"]), recall, wording)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"{path}: not weights of a fusion ({error}); fit them again.") from error


def fusion_beside(name_or_path: str) -> FusionWeights | None:
    """The weights that lie beside a checkpoint, in a directory or on the Hub; None where it is known to have none.

    Args:
        name_or_path: of the checkpoint; a directory without config.json is none, and "" no name.

    Raises:
        BankUnavailable: where the Hub refuses or cannot be reached and its cache does not know either, with the remedy.
        ValueError: for what is no such file, naming the cause.
    """
    directory = Path(name_or_path)
    if not name_or_path or (directory.is_dir() and not (directory / "config.json").is_file()):
        return None
    found = file_beside(name_or_path, FILE)
    return None if found is None else FusionWeights.from_pretrained(found.parent)


def fuse(
    candidates: Candidates, weights: FusionWeights | None = None, question: str | None = None
) -> list[tuple[int, float]]:
    """One ranking of all documents on the lists, best first; equal scores go to the lower document.

    Args:
        candidates: way -> its list.
        weights: None: by reciprocal ranks.
        question: its text, on which learned weights may depend. None: what they learned of texts does not count.

    Raises:
        ValueError: where weights, learned or of a wording, are for other ways than those asked; or where they are so
            large, or a way's scores such, that no number is left.
    """
    method = RECIPROCAL if weights is None else weights.method
    weighed = weights is not None and (method != RECIPROCAL or weights.wording)
    if weights is not None and weighed and set(weights.ways) != set(candidates):
        raise ValueError(
            f"The fusion weights are for {', '.join(weights.ways)}, but {', '.join(candidates)} were asked: fit "
            "others, or pass fusion='reciprocal' (--fusion reciprocal)."
        )
    documents = sorted({document for ranking in candidates.values() for document, _ in ranking})
    if not documents:
        return []
    if weights is not None and method == LEARNED:
        features = _features(candidates, weights.ways, weights.units, documents)
        about = _about(candidates, weights.ways, weights.units, question)
        scores = (features @ (torch.tensor(weights.weights, dtype=torch.float64) @ about)).tolist()
        if not all(map(math.isfinite, scores)):
            raise ValueError(
                "The fusion weights make scores of these rankings that are not finite: fit others, or pass "
                "fusion='reciprocal' (--fusion reciprocal)."
            )
    else:
        reciprocal = [_reciprocal(ranks_of(item, documents), CONSTANT) for item in candidates.values()]
        scores = torch.stack(reciprocal).sum(0).tolist()
        if method != RECIPROCAL:  # one way first; the others order what it does not have
            first = {document: len(candidates[method]) - rank for rank, (document, _) in enumerate(candidates[method])}
            ways = len(candidates)
            scores = [
                score / (ways + 1) + first.get(document, 0) for document, score in zip(documents, scores, strict=True)
            ]
    return sorted(zip(documents, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))


def fit_fusion(
    candidates: Sequence[Candidates],
    gold: Sequence[Collection[int]],
    questions: Sequence[str] | None = None,
    importance: Sequence[float] | None = None,
) -> FusionWeights:
    """Learn weights on questions whose documents are known; the same questions give the same weights.

    A softmax over a question's candidates is fitted to its right documents (a convex loss, with a small ridge) on two
    thirds of the questions. On the others learned weights, reciprocal ranks and every way alone are compared by the
    mean of recall at 1 and at 10; the best is kept, the first of these where they are equal. Learned weights are then
    fitted on all questions. What was chosen gives way to reciprocal ranks, or to one way alone, where these are better
    on all questions together.

    Args:
        candidates: of each question, way -> its list. All have the same ways, at least one.
        gold: of each question, the documents that answer it, at least one.
        questions: their texts. None: the weights do not depend on texts.
        importance: of each question, positive (default: all the same).

    Raises:
        ValueError: for no questions, other ways in one of them, a question without a document, or texts or importances
            of another number.
    """
    if not candidates or len(candidates) != len(gold):
        raise ValueError(f"{len(candidates)} questions with candidates, {len(gold)} with documents: at least one each.")
    for name, given in (("questions", questions), ("importance", importance)):
        if given is not None and len(given) != len(gold):
            raise ValueError(f"`{name}` has {len(given)} entries for {len(gold)} questions.")
    ways = tuple(candidates[0])
    for number, (lists, right) in enumerate(zip(candidates, gold, strict=True)):
        if set(lists) != set(ways) or not ways:
            raise ValueError(f"Question {number} has lists of {sorted(lists)}, the first of {sorted(ways)}.")
        if not right:
            raise ValueError(f"Question {number} has no document that answers it; leave it out.")
    shares = [1.0] * len(gold) if importance is None else [float(item) for item in importance]
    if min(shares) <= 0:
        raise ValueError("`importance` must be positive.")
    judges = [number for number in range(len(gold)) if number % JUDGES == JUDGES - 1] or [0]
    taught = sorted(set(range(len(gold))) - set(judges)) or judges
    texts = [None] * len(gold) if questions is None else list(questions)

    def methods(numbers: Sequence[int]) -> dict[str, FusionWeights]:
        asked = [_Question(candidates[number], gold[number], texts[number], shares[number]) for number in numbers]
        return {
            LEARNED: _learned(ways, asked),
            RECIPROCAL: FusionWeights(ways),
            **{way: FusionWeights(ways, way) for way in ways},
        }

    def recalls(found: Mapping[str, FusionWeights], numbers: Sequence[int]) -> dict[str, float]:
        total = sum(shares[number] for number in numbers)
        return {
            name: sum(
                shares[number] * _recall(fuse(candidates[number], item, texts[number]), gold[number])
                for number in numbers
            )
            / total
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
    return FusionWeights(ways, best, kept.weights, kept.units, len(gold), judged)


@dataclass(frozen=True)
class _Question:
    lists: Candidates
    gold: Collection[int]
    text: str | None
    importance: float


def _reciprocal(ranks: Tensor, constant: int) -> Tensor:
    return (constant + 1) / (constant + 1 + ranks)


def _features(
    candidates: Candidates, ways: Sequence[str], units: Sequence[Sequence[float]], documents: Sequence[int]
) -> Tensor:
    """[documents, ways * features] float64."""
    columns = []
    for way, (unit, _) in zip(ways, units, strict=True):
        scores, spread = scores_of(candidates[way])
        ranks = ranks_of(candidates[way], documents)
        there = ranks.isfinite()
        own = scores[torch.where(there, ranks, len(scores) - 1).long()]
        absent = (~there).double()
        columns += [
            standing(candidates[way], documents),
            (own - scores[0]) / spread - absent,
            (own - scores[0]) / unit - absent,
            _reciprocal(ranks, CONSTANT),
            _reciprocal(ranks, STEEP),
            absent,
        ]
    return torch.stack(columns, 1)


def _about(
    candidates: Candidates, ways: Sequence[str], units: Sequence[Sequence[float]], question: str | None
) -> Tensor:
    """[1 + 4 ways + 3] float64, what a question's weights depend on."""
    found = [1.0]
    for way, (unit, usual) in zip(ways, units, strict=True):
        scores, spread = scores_of(candidates[way])
        best, second, tenth = (float(scores[min(place, len(scores) - 1)]) for place in (0, 1, 9))
        height = (best - float(scores.mean())) / spread
        found += [
            min((best - second) / unit, 3.0),
            min((best - tenth) / unit, 6.0) / 3,
            (height - 2) / 2,
            max(min((best - usual) / unit, 3.0), -3.0),
        ]
    if question is None:
        return torch.tensor([*found, 0.0, 0.0, 0.0], dtype=torch.float64)
    text = question.strip()
    words = min(len(text.split()), 40) / 10 - 1
    return torch.tensor([*found, words, float(text.endswith("?")), float(text[:1].isupper())], dtype=torch.float64)


def _units(ways: Sequence[str], questions: Sequence[_Question]) -> tuple[tuple[float, float], ...]:
    """Per way how far a best document usually stands above the mean of its list, and its usual score."""
    found = []
    for way in ways:
        lists = [scores_of(item.lists[way])[0] for item in questions]
        above = sum(float(scores[0] - scores.mean()) for scores in lists) / len(lists)
        found.append((above if above > 0 else 1.0, sum(float(scores[0]) for scores in lists) / len(lists)))
    return tuple(found)


def _learned(ways: tuple[str, ...], questions: Sequence[_Question]) -> FusionWeights:
    """Weights fitted to these questions; those whose documents are on no list teach nothing."""
    units = _units(ways, questions)
    parts: list[Tensor] = []
    right: list[Tensor] = []
    about: list[Tensor] = []
    importance: list[float] = []
    for item in questions:
        documents = sorted({document for ranking in item.lists.values() for document, _ in ranking})
        mask = torch.tensor([document in item.gold for document in documents])
        if documents and bool(mask.any()):
            parts.append(_features(item.lists, ways, units, documents))
            about.append(_about(item.lists, ways, units, item.text))
            right.append(mask)
            importance.append(item.importance)
    start = torch.zeros(len(ways) * len(FEATURES), 1 + len(ABOUT_WAYS) * len(ways) + len(ABOUT_WORDS)).double()
    start[FEATURES.index("reciprocal") :: len(FEATURES), 0] = 1.0  # reciprocal ranks
    if parts:
        # All questions in one padded tensor: [Q, documents, features].
        features = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        there = torch.nn.utils.rnn.pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], True)
        wanted = torch.nn.utils.rnn.pad_sequence(right, batch_first=True)
        share = wanted.double() / wanted.sum(1, keepdim=True)
        shares = torch.tensor(importance, dtype=torch.float64)
        start = _fitted(start, features, torch.stack(about), there, share * (shares / shares.sum())[:, None])
    return FusionWeights(ways, LEARNED, tuple(tuple(row) for row in start.tolist()), units)


def _fitted(start: Tensor, features: Tensor, about: Tensor, there: Tensor, share: Tensor) -> Tensor:
    """The weights of least cross entropy, `share` [Q, documents] summing to 1 over all questions."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("qcf,qf->qc", features, about @ weights.T).masked_fill(~there, float("-inf"))
        logs = scores.log_softmax(1).masked_fill(~there, 0.0)
        value = -(share * logs).sum() + RIDGE * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()


def _recall(ranking: Ranking, gold: Collection[int]) -> float:
    documents = [document for document, _ in ranking]
    shares = (len(set(documents[:depth]) & set(gold)) / min(len(gold), depth) for depth in DEPTHS)
    return sum(shares) / len(DEPTHS)
