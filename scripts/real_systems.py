"""What `eval_real.py` measures alike for every way to retrieve: questions, nested banks, recall, fusion."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from real_pools import is_held_out
from real_rows import log

from msa_hf.retrieval import FusionWeights, fit_fusion, fit_wording, fuse, rank_by_wording
from msa_hf.retrieval.lexical import LexicalIndex
from msa_hf.retrieval.wording import READ

AT = (1, 5, 10)
WAYS = {"router": "router", "bm25": "lexical", "minilm": "dense"}  # system -> its name in msa_hf.retrieval
KEPT = 50  # best passages kept per question and system


def held_out_numbers(data: dict[str, Any]) -> list[int]:
    """The labeled questions that training left out, without those of needles, which nobody asks."""
    questions = data["train"]["questions"]
    return [
        number for number, item in enumerate(questions) if is_held_out(number, item["set"]) and item["set"] != "needles"
    ]


def asked_questions(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The development questions, then the labeled ones that training left out."""
    held = [data["train"]["questions"][number] for number in held_out_numbers(data)]
    return [
        *({**item, "split": "dev"} for item in data["dev"]["questions"]),
        *({**item, "split": "fit"} for item in held),
    ]


def bank_limits(lengths: np.ndarray, sets: int, sizes: str) -> dict[str, int]:
    """Size such as `5M` -> passages of a bank of so many tokens at most; the first bank holds all sets."""
    ends = np.cumsum(lengths)
    found = {}
    for place, size in enumerate(sizes.split(",")):
        count = int(np.searchsorted(ends, float(size) * 1_000_000))
        found[f"{size}M"] = sets if place == 0 else min(count, len(lengths))
    return found


def recalls(best: np.ndarray, questions: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Set -> recall of any gold document, and of all of them, among the best passages [Q, n]."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({question["set"] for question in questions}):
        rows = [number for number, question in enumerate(questions) if question["set"] == kind]
        item: dict[str, float] = {"questions": len(rows)}
        for k in AT:
            hits = [hit_groups(best[number, :k], questions[number]) for number in rows]
            item[f"any@{k}"] = float(np.mean([any(row) for row in hits]))
            item[f"all@{k}"] = float(np.mean([all(row) for row in hits]))
        found[kind] = item
    return found


def hit_groups(best: np.ndarray, question: dict[str, Any]) -> list[bool]:
    """For every gold document whether one of its passages is among the best."""
    chosen = set(best.tolist())
    return [any(place in chosen for place in group) for group in question["wanted"]]


def interval(hits: list[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by bootstrap over questions."""
    values = np.asarray(hits, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


Lists = dict[str, list[tuple[int, float]]]


def lists_of(kept: dict[str, np.ndarray], systems: tuple[str, ...]) -> list[Lists]:
    """For every question the list of each way, best first.

    Args:
        kept: `places` [Q, C] of candidates, -1 for none, and per system its scores of them, NaN for those not listed.
    """
    places = kept["places"]
    best = {}
    for system in systems:
        scores = np.where((places < 0) | np.isnan(kept[system]), -np.inf, kept[system])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :KEPT]
        best[WAYS[system]] = (np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1))
    return [
        {
            way: [
                (int(place), float(score)) for place, score in zip(rows[n], scores[n], strict=True) if score > -np.inf
            ]
            for way, (rows, scores) in best.items()
        }
        for n in range(len(places))
    ]


def fit_on(lists: dict[str, list[Lists]], questions: list[dict[str, Any]]) -> FusionWeights:
    """Weights for banks of all sizes: every question is learned from in one of them, sets by the root of their size.

    Args:
        lists: size -> lists of every question.
    """
    known = _known(lists, questions)
    if not known[0]:
        log("no labeled question was left out of training to fit weights on: fused by reciprocal ranks")
        return FusionWeights(tuple(next(iter(lists.values()))[0]))
    return fit_fusion(*known)


def _known(
    lists: dict[str, list[Lists]], questions: list[dict[str, Any]]
) -> tuple[list[Lists], list[set[int]], list[str], list[float]]:
    """Lists, gold passages, texts and importance of the questions that weights are fitted on."""
    sizes = list(lists)
    counts = {kind: sum(item["set"] == kind for item in questions) for kind in {item["set"] for item in questions}}
    numbers = [number for number, item in enumerate(questions) if item["split"] == "fit"]
    return (
        [lists[sizes[place % len(sizes)]][number] for place, number in enumerate(numbers)],
        [{place for group in questions[number]["wanted"] for place in group} for number in numbers],
        [questions[number]["question"] for number in numbers],
        [counts[questions[number]["set"]] ** -0.5 for number in numbers],
    )


class CountedWords:
    """English words as a lexical index has them, and how rare they are in some of many texts.

    Args:
        texts: all of them.
        counted: about how many are looked at.
    """

    def __init__(self, texts: list[str], counted: int = 60_000) -> None:
        self._index = LexicalIndex("english")
        some = texts[:: max(len(texts) // counted, 1)]
        self.texts = len(some)
        self.counts: Counter[str] = Counter()
        for text in some:
            self.counts.update(set(self.terms(text)))

    def terms(self, text: str) -> list[str]:
        return self._index.terms(text)

    def rarity(self, term: str) -> float:
        return math.log((self.texts + 1) / (self.counts[term] + 0.5))


def with_wording(
    weights: FusionWeights,
    lists: dict[str, list[Lists]],
    questions: list[dict[str, Any]],
    texts: Sequence[str],
    words: CountedWords,
) -> FusionWeights:
    """The weights, and beside them those by which the best passages are read for their wording."""
    known, gold, asked, importance = _known(lists, questions)
    if not known:
        return weights
    ranked = [fuse(item, weights, question) for item, question in zip(known, asked, strict=True)]
    read = [[texts[place] for place, _ in ranking[:READ]] for ranking in ranked]
    fused = [{way: item[way] for way in weights.ways} for item in known]
    return replace(weights, wording=fit_wording(ranked, read, gold, asked, words, importance, fused))


def ranking_of(
    lists: Lists, weights: FusionWeights, question: str, texts: Sequence[str], words: CountedWords
) -> list[tuple[int, float]]:
    """The passages on all lists, fused, and read for their wording if the weights say so."""
    ranked = fuse(lists, weights, question)
    if not weights.wording:
        return ranked
    read, fused = [texts[place] for place, _ in ranked[:READ]], {way: lists[way] for way in weights.ways}
    return rank_by_wording(ranked, read, question, words, weights.wording, fused)
