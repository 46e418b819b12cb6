"""Blind spots of a whole bank: documents that no question reaches, scores that drift as documents are added."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...retrieval import Searcher
from .finding import Finding

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")
SIDES = ("first", "last")
SLACK = 0.1  # of a document's tokens


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, as far as their ends can be told."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def left_out(encoded: int, needed: int) -> float:
    """The share of a text that was not encoded, 0 to 1; up to `SLACK` is taken for another way of wrapping it.

    Args:
        encoded: tokens of the document in the bank.
        needed: tokens of its whole text.
    """
    share = 1 - encoded / max(needed, 1)
    return share if share > SLACK else 0.0


def never_routed(findings: Iterable[Finding], documents: int) -> list[int]:
    """Positions of the documents that no memory layer chose for any of the questions.

    Args:
        documents: of the bank, to which the findings' positions belong.
    """
    routed = [position for finding in findings for position in finding.routed]
    return np.setdiff1d(np.arange(documents), np.array(routed, dtype=np.int64)).tolist()


@dataclass(frozen=True)
class Probe:
    """A document, asked for with a sentence of its own.

    Attributes:
        key: its name.
        side: the sentence is its `"first"` or its `"last"`.
        sentence: text.
        rank: that the routers give the document, from 1; None: not among the best `k`.
    """

    key: str
    side: str
    sentence: str
    rank: int | None


def probe_documents(searcher: Searcher, positions: Sequence[int], k: int | None = None) -> list[Probe]:
    """Ask the routers for documents with their own first and last sentences.

    A document that they do not find so is one that no question will find: its keys are damaged, of another text, or of
    a part of it. Documents without text are left out.

    Args:
        searcher: with the model, the tokenizer and the protocol of the bank.
        positions: of the documents.
        k: a document is found that is among the `k` best (default: those that a memory layer attends to).

    Raises:
        ValueError: where the searcher has no model.
    """
    if searcher.model is None:
        raise ValueError("Probing documents needs the `model`, whose routers are asked.")
    k = searcher.model.config.top_k if k is None else k
    asked: list[tuple[int, str, str]] = []
    for position in positions:
        sentences = sentences_of(searcher.bank.documents[position].text or "")
        ends = zip(SIDES, sentences[:1] + sentences[1:][-1:], strict=False)
        asked += [(position, side, sentence) for side, sentence in ends]
    probes = []
    for start in range(0, len(asked), 8):
        batch = asked[start : start + 8]
        rankings = searcher.rankings("router", [sentence for _, _, sentence in batch], k)
        for (position, side, sentence), ranking in zip(batch, rankings, strict=True):
            ranks = {found: rank for rank, (found, _) in enumerate(ranking, 1)}
            key = searcher.bank.documents[position].key
            probes.append(Probe(key, side, sentence, ranks.get(position)))
    return probes


@dataclass(frozen=True)
class Drift:
    """The difference between the best router scores of two sets of questions.

    Attributes:
        distance: the largest difference of their distribution functions, from 0 to 1 (Kolmogorov and Smirnov).
        limit: of chance: of two sets of one distribution 5 % are further apart.
        shift: the difference of their medians, in scores.
    """

    distance: float
    limit: float
    shift: float

    @property
    def drifted(self) -> bool:
        """Tell whether it is more than chance."""
        return self.distance > self.limit


def score_drift(before: Sequence[float], now: Sequence[float]) -> Drift:
    """Compare the best router scores of questions with those of others, such as before documents were added.

    Raises:
        ValueError: for no scores.
    """
    if not len(before) or not len(now):
        raise ValueError("A drift is between two sets of scores; one of them is empty.")
    first, second = np.sort(np.asarray(before, float)), np.sort(np.asarray(now, float))
    both = np.concatenate([first, second])
    below = [np.searchsorted(scores, both, side="right") / len(scores) for scores in (first, second)]
    # 1.358 is the 95 % point of the Kolmogorov distribution.
    limit = 1.358 * float(np.sqrt((len(first) + len(second)) / (len(first) * len(second))))
    return Drift(float(np.abs(below[0] - below[1]).max()), limit, float(np.median(second) - np.median(first)))
