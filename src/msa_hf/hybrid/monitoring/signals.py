"""The signals of a blind spot: the table of them, and those that the routing of an answer shows by itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

TEMPERATURE = 0.1  # of the softmax whose entropy is taken; the one that routers are trained with


@dataclass(frozen=True)
class Signal:
    """A number per question that is large where routing may have missed a document.

    Attributes:
        weight: its say: what it counts relative to the others.
        unit: a difference that means something; tails of calibrations fall no faster.
        check: the second answer that it needs; None: the routing of the first answer is enough.
        meaning: what a large value says.
        remedy: what to do about it.
    """

    weight: float
    unit: float
    check: str | None
    meaning: str
    remedy: str


CHECKS = ("denser", "hybrid", "texts")

_READ_OTHER = (
    "Look at the documents that the check read and the answer did not. If one of them answers, its routing keys are at "
    "fault: replace the document (`BankStore.upsert`, or `msa-hf bank add`), and train the routers on such questions "
    "(docs/finetuning.md) if many are."
)
_BY_HYBRID = _READ_OTHER + " Or ask with `select='hybrid'`."
_TOO_LOW = (
    "The document is routed, but too low: raise `documents_per_round` or `top_k`, remove near-duplicates, or train the "
    "routers on such questions (docs/finetuning.md)."
)

SIGNALS: dict[str, Signal] = {
    "texts_disagree": Signal(
        1.0, 3.0, "texts", "with the texts of the best candidates the model answers otherwise", _READ_OTHER
    ),
    "texts_recover": Signal(
        1.0, 3.0, "texts", "it had no answer; with the texts of the best candidates it has one", _READ_OTHER
    ),
    "hybrid_disagree": Signal(
        0.5, 3.0, "hybrid", "with the documents of a hybrid search, the model answers otherwise", _BY_HYBRID
    ),
    "hybrid_recover": Signal(
        0.5, 3.0, "hybrid", "it had no answer; with the documents of a hybrid search, it has one", _BY_HYBRID
    ),
    "denser_disagree": Signal(
        0.5, 3.0, "denser", "with several times as many routed documents, the model answers otherwise", _TOO_LOW
    ),
    "denser_recover": Signal(
        0.5, 3.0, "denser", "it had no answer; with several times as many routed documents, it has one", _TOO_LOW
    ),
    "lexical_gap": Signal(
        0.5,
        1.0,
        None,
        "another document has names of the question that what was read lacks",
        _READ_OTHER,
    ),
    "dense_gap": Signal(
        0.5,
        0.05,
        None,
        "by its vector another document fits the question far better than what was read",
        _READ_OTHER,
    ),
    "look_alikes": Signal(
        0.5,
        3.0,
        None,
        "documents that were not read differ in a few words from one that was: the answer may be in one of them",
        "Compare the documents that look alike: remove or merge those that say the same, or read more per round.",
    ),
    "partly_encoded": Signal(
        0.5,
        0.1,
        None,
        "a document with names of the question is encoded in part: routers do not know the rest of its text",
        "Encode the document again, whole (`BankStore.upsert`, or `msa-hf bank add`); split what is too long.",
    ),
    "low_score": Signal(
        0.125,
        0.05,
        None,
        "the routers' best score is low: no document looks like one that answers",
        "If the memory should hold the answer, search for it by words (`msa-hf search --mode lexical`). If not, a "
        "document is missing: add it.",
    ),
    "small_margin": Signal(
        0.125,
        0.05,
        None,
        "the best document is hardly better than the next: near-duplicates may crowd out the one that answers",
        "Compare the documents that were routed; remove or merge near-duplicates, or read more documents per round.",
    ),
    "crowded": Signal(
        0.25,
        0.05,
        None,
        "even the last of the routed documents scores high: one that answers may lie beyond them",
        "Compare the documents that were routed: remove or merge near-duplicates, or raise `top_k`.",
    ),
    "router_entropy": Signal(
        0.125,
        0.05,
        None,
        "the routers' scores are spread over many documents",
        "The same as for a small margin; if most questions show it, the routers need training (docs/finetuning.md).",
    ),
    "layers_disagree": Signal(
        0.125,
        0.25,
        None,
        "memory layers choose different documents",
        "Some layers do not know this kind of document: measure them with `msa-hf eval`, and train them.",
    ),
    "unanswered": Signal(
        0.125,
        1.0,
        None,
        "the model gave no answer, or said that the memory does not hold it",
        "If the memory should hold the answer, search for it by words (`msa-hf search --mode lexical`), or add it.",
    ),
}


def signal_named(name: str) -> Signal:
    """The signal of a name.

    Raises:
        ValueError: naming those that there are.
    """
    if name not in SIGNALS:
        raise ValueError(f"There is no signal {name!r}; there are {', '.join(SIGNALS)}.")
    return SIGNALS[name]


@dataclass(frozen=True)
class RoutedRound:
    """The routing of one round of an answer.

    Attributes:
        combined: positions and scores of the layers together, best first, without what earlier rounds read.
        best: of each memory layer, its best document among these.
        read: the documents that the round read; without a protocol, those that were attended to most.
    """

    combined: Sequence[tuple[int, float]]
    best: Mapping[int, int]
    read: Collection[int]


def routing_signals(rounds: Sequence[RoutedRound], unanswered: bool, k: int) -> dict[str, float]:
    """The signals of the routing of an answer: of each the worst over its rounds.

    * `"low_score"`: the best score, negated.
    * `"small_margin"`: best score minus the second, negated.
    * `"crowded"`: the k-th score, or the last where fewer documents were routed.
    * `"router_entropy"`: of the softmax of the scores over `TEMPERATURE`, over its maximum: from 0 to 1.
    * `"layers_disagree"`: the share of memory layers whose best document is not among those read; only with two layers
      or more.

    Args:
        rounds: those that read something, or the first one where none did. None at all: only `"unanswered"`.
        unanswered: whether the answer is empty or a refusal.
        k: documents that a memory layer attends to.
    """
    found = {"unanswered": float(unanswered)}
    for name, values in {
        "low_score": [-item.combined[0][1] for item in rounds if item.combined],
        "small_margin": [item.combined[1][1] - item.combined[0][1] for item in rounds if len(item.combined) > 1],
        "crowded": [item.combined[:k][-1][1] for item in rounds if item.combined],
        "router_entropy": [entropy([score for _, score in item.combined]) for item in rounds if item.combined],
        "layers_disagree": [
            sum(position not in item.read for position in item.best.values()) / len(item.best)
            for item in rounds
            if len(item.best) > 1
        ],
    }.items():
        if values:
            found[name] = max(values)
    return found


def entropy(scores: Sequence[float], temperature: float = TEMPERATURE) -> float:
    """The entropy of the softmax of scores, over that of equal ones; 0 for a single score."""
    if len(scores) < 2:
        return 0.0
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    return -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(scores))
