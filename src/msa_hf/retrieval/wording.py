"""Candidates read for their wording: how much of a question stands in a text, how close together, and where.

BM25 counts words wherever they stand, and routers and vectors compare what texts are about. Among the best few dozen of
any of them, what tells the right text is often that one of its sentences, with its title, says what the question says:
its rare words, its names and numbers, two words side by side. The score of a candidate is a weighted sum of

    fused        how far it stands below the best of the ranking that is read again
    coverage     the share of the question's words that the text or its title has, and `square`, that share squared
    title        the share that the title has, and `titled`, whether that is any
    entitled     the share of the title's words that the question has
    sentence     the share that the best sentence has; `two`, the best two in a row; `under`, the best with the title
    focus        the share of that best sentence's words, less its title, that the question has
    pairs        the share of its pairs of neighbors that stand at most `NEAR` words apart, in that order
    run          the longest run of its words that stand one behind the other, as a share of them
    names        the share of its capitalized words and numbers, but its first word, that stand in the text as they are
    wanted       whether the best sentence under its title has what the question asks for and does not say itself: a
                 number, a time, a place or a name (`WANTED`, English)
    rarest       whether the text or its title has the rarest of its words
    length       the logarithm of the text's words, less 4.5

and, for each way that was fused, how far the document stands above the mean of the way's list, in standard deviations;
where words count by how rare they are, and those that only ask (`ASKING`, English) do not. Each weight is itself a
weighted sum of `always` 1, the number of `words` of the question, whether it `asks` (a question mark) and whether it
begins with a `capital` letter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .rankings import Candidates, Ranking, standing

FEATURES = (
    *(
        "fused",
        "coverage",
        "square",
        "title",
        "titled",
        "entitled",
        "sentence",
        "two",
        "under",
        "focus",
        "pairs",
        "run",
    ),
    *("names", "wanted", "rarest", "length"),
)
ABOUT = ("always", "words", "asks", "capital")
READ = 50  # candidates that are read
NEAR = 3
LOWEST = -30.0  # below the best of a ranking; what is further down is as good as this
LONGEST_TITLE = 200  # characters of a first line
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[。！？])")
AS_WRITTEN = re.compile(r"\w+")
# Words that ask: no text is right for having them, and in texts that tell they are rare.
ASKING = frozenset(
    (
        *("who", "whom", "whose", "what", "which", "when", "where", "why", "how", "do", "does", "did", "has", "have"),
        *("had", "am", "is", "are", "was", "were", "be", "been", "can", "could", "would", "should", "may", "might"),
        *("will", "shall"),
    )
)
# What a question asks for, by its words, and how that is written, the first that fits. (The first word of a sentence is
# no name for its capital letter.)
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_NUMBERS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand|million"
)
WANTED = tuple(
    (re.compile(rf"\b(?:{asks})\b", re.IGNORECASE), re.compile(written))
    for asks, written in (
        (
            r"how (?:many|much|long|old|far|tall|big|large|high|deep|often|fast|wide)"
            r"|what (?:number|percent|percentage|size|amount|age|population)",
            rf"\b\d[\d,.]*\b|\b(?:(?i:{_NUMBERS}|billion|dozen|half|once|twice))\b",
        ),
        (
            r"when|(?:what|which) (?:year|date|day|month|century|decade|time)",
            rf"\b(?:1\d{{3}}|20\d{{2}})\b|{_MONTHS}|\b\d+(?:st|nd|rd|th) century\b",
        ),
        (
            r"where|(?:what|which) (?:country|city|state|town|place|county|continent|region|location)",
            r"\b(?:in|at|near|from|to|of|on|around|between)\s+(?:the\s+)?[A-Z]\w+",
        ),
        (
            r"who|whom|whose|(?:what|which) (?:person|actor|actress|singer|player|king|queen|president|name|company"
            r"|band|team|author)",
            r"(?<=.)\b[A-Z][\w'’.-]+",
        ),
    )
)
RIDGE = 1e-3
STEPS = 100
# Of the questions, every third judges whether reading helps; all of them make the weights that are kept.
JUDGES = 3
DEPTHS = (1, 10)

Weights: TypeAlias = Sequence[Sequence[float]]  # [FEATURES + ways][ABOUT]


class Words(Protocol):
    """The words of a language, as a lexical index has them."""

    def terms(self, text: str) -> list[str]:
        """The words of a text, in order."""
        ...

    def rarity(self, term: str) -> float:
        """The logarithm of one over the share of texts with a word, at least 0."""
        ...


class Wording:
    """The words of a question, to be looked for in texts.

    Args:
        question: its text.
        words: of the language.
    """

    def __init__(self, question: str, words: Words) -> None:
        self.words = words
        terms = words.terms(AS_WRITTEN.sub(lambda found: "" if found[0].lower() in ASKING else found[0], question))
        self.rarity = {term: words.rarity(term) for term in terms}
        self.total = sum(self.rarity.values()) or 1.0
        self.rarest = max(self.rarity, key=lambda term: self.rarity[term], default=None)
        self.pairs = {pair: min(map(self.rarity.__getitem__, pair)) for pair in pairwise(terms)}
        self.paired = sum(self.pairs.values()) or 1.0
        self.names = {word for word in AS_WRITTEN.findall(question)[1:] if word[0].isupper() or word[0].isdigit()}
        self.terms = terms
        self.places: dict[str, list[int]] = {}
        for place, term in enumerate(terms):
            self.places.setdefault(term, []).append(place)
        self.said = {word.lower() for word in AS_WRITTEN.findall(question)}
        self.wanted = next((written for asks, written in WANTED if asks.search(question)), None)
        self._rarities: dict[str, float] = {}

    def features(self, text: str) -> list[float]:
        """`FEATURES` of a text, but for the first."""
        first, line, rest = text.partition("\n")
        has_title = bool(line) and bool(rest.strip()) and len(first) <= LONGEST_TITLE
        title = set(self.words.terms(first)) if has_title else set()
        pieces = SENTENCE_END.split(rest if has_title else text)
        in_order = [self.words.terms(piece) for piece in pieces]
        sentences = [self.rarity.keys() & terms for terms in in_order]
        there: set[str] = set().union(*sentences)
        both = there | title
        coverage = self._share(both)
        in_title = self._share(title)
        following = [*sentences[1:], set()]
        under = [self._share(one | title) for one in sentences]
        best = max(range(len(pieces)), key=under.__getitem__)
        flat = [term for terms in in_order for term in terms]
        return [
            coverage,
            coverage**2,
            in_title,
            float(in_title > 0),
            self._focus(title),
            max(map(self._share, sentences), default=0.0),
            max((self._share(one | other) for one, other in zip(sentences, following, strict=True)), default=0.0),
            under[best],
            self._focus(set(in_order[best])),
            self._paired(flat, there),
            self._run(flat),
            self._named(text),
            self._answers(pieces[best]),
            float(self.rarest in both),
            math.log(1 + len(flat)) - 4.5,
        ]

    def _share(self, terms: AbstractSet[str]) -> float:
        return sum(value for term, value in self.rarity.items() if term in terms) / self.total

    def _paired(self, terms: Sequence[str], there: set[str]) -> float:
        if not any(map(there.issuperset, self.pairs)):
            return 0.0
        asked = [(place, term) for place, term in enumerate(terms) if term in self.rarity]
        found = {
            (one, other)
            for number, (place, one) in enumerate(asked)
            for later, other in asked[number + 1 : number + 1 + NEAR]
            if later - place <= NEAR
        }
        return sum(value for pair, value in self.pairs.items() if pair in found) / self.paired

    def _focus(self, terms: AbstractSet[str]) -> float:
        """The share of some words that the question has."""
        total = math.fsum(map(self._rarity, terms))  # the same in every order
        return math.fsum(self.rarity[term] for term in terms if term in self.rarity) / total if total else 0.0

    def _rarity(self, term: str) -> float:
        if term not in self._rarities:
            self._rarities[term] = self.words.rarity(term)
        return self._rarities[term]

    def _run(self, terms: Sequence[str]) -> float:
        longest = 0
        ending: dict[int, int] = {}  # place of a word in the question -> the length of the run that ends with it
        for term in terms:
            if term not in self.places:
                ending = {}
                continue
            ending = {place: ending.get(place - 1, 0) + 1 for place in self.places[term]}
            longest = max(longest, *ending.values())
        return longest / max(len(self.terms), 1)

    def _answers(self, sentence: str) -> float:
        if self.wanted is None:
            return 0.0
        found = (AS_WRITTEN.findall(match[0]) for match in self.wanted.finditer(sentence))
        return float(any(word.lower() not in self.said for words in found for word in words))

    def _named(self, text: str) -> float:
        return len(self.names & set(AS_WRITTEN.findall(text))) / len(self.names) if self.names else 0.0


def about(question: str) -> list[float]:
    """`ABOUT` of a question."""
    text = question.strip()
    return [1.0, min(len(text.split()), 40) / 10 - 1, float(text.endswith("?")), float(text[:1].isupper())]


def features_of(
    ranking: Ranking, texts: Sequence[str | None], question: str, words: Words, lists: Candidates | None = None
) -> Tensor:
    """[documents, FEATURES + ways] float64. A document whose text was not kept counts as the mean of the others."""
    wording = Wording(question, words)
    read = [None if text is None else wording.features(text) for text in texts]
    known = torch.tensor([row for row in read if row is not None], dtype=torch.float64)
    usual = known.mean(0) if len(known) else torch.zeros(len(FEATURES) - 1, dtype=torch.float64)
    rows = [usual if row is None else torch.tensor(row, dtype=torch.float64) for row in read]
    best = max((score for _, score in ranking), default=0.0)
    fused = torch.tensor([max(score - best, LOWEST) for _, score in ranking], dtype=torch.float64)
    documents = [document for document, _ in ranking]
    columns = [fused, *torch.stack(rows).T] if rows else [fused] * len(FEATURES)
    return torch.stack([*columns, *(standing(item, documents) for item in (lists or {}).values())], 1)


def rank_by_wording(
    ranking: Ranking,
    texts: Sequence[str | None],
    question: str,
    words: Words,
    weights: Weights,
    lists: Candidates | None = None,
) -> list[tuple[int, float]]:
    """The ranking by wording, best first; equal scores keep their order. What stands behind `READ` stays there.

    Args:
        ranking: documents and scores, best first.
        texts: of its first `READ` documents.
        question: its text.
        words: of the bank's lexical index.
        weights: as `fit_wording` made them.
        lists: what was fused, in the order of the ways that the weights are for; None where they are for none.
    """
    read, rest = ranking[:READ], ranking[READ:]
    if not read:
        return []
    by_feature = torch.tensor(weights, dtype=torch.float64) @ torch.tensor(about(question), dtype=torch.float64)
    scores = (features_of(read, texts, question, words, lists) @ by_feature).tolist()
    found = sorted(((document, score) for (document, _), score in zip(read, scores, strict=True)), key=lambda x: -x[1])
    down = found[-1][1] - read[-1][1]
    return [*found, *((document, score + down) for document, score in rest)]


def fit_wording(
    rankings: Sequence[Ranking],
    texts: Sequence[Sequence[str | None]],
    gold: Sequence[Collection[int]],
    questions: Sequence[str],
    words: Words,
    importance: Sequence[float] | None = None,
    lists: Sequence[Candidates] | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Learn the weights of `rank_by_wording` on questions whose documents are known; the same give the same weights.

    A softmax over the best `READ` of a ranking is fitted to the right ones (a convex loss, with a small ridge) on two
    thirds of the questions. Where recall at 1 and at 10 of the others, averaged, is higher than before, weights are
    fitted on all questions; else there are none.

    Args:
        rankings: of each question, best first.
        texts: of the first `READ` documents of each.
        gold: of each question, the documents that answer it. Questions with none among the best teach nothing.
        questions: their texts.
        words: of the bank's lexical index.
        importance: of each question, positive (default: all the same).
        lists: of each question what was fused, of the same ways in the same order; None: they do not count.

    Returns:
        [FEATURES + ways][ABOUT]; empty where reading for wording finds no more.

    Raises:
        ValueError: for lists of different lengths or ways.
    """
    shares = [1.0] * len(questions) if importance is None else [float(item) for item in importance]
    fused = [{} for _ in questions] if lists is None else lists
    if len({tuple(item) for item in fused}) > 1:
        raise ValueError("All questions need lists of the same ways in the same order.")
    known = [
        _Known(ranking[:READ], features_of(ranking[:READ], read, question, words, item), about(question), right, share)
        for ranking, read, right, question, share, item in zip(
            rankings, texts, gold, questions, shares, fused, strict=True
        )
    ]
    judges, taught = known[JUDGES - 1 :: JUDGES], [item for n, item in enumerate(known) if n % JUDGES != JUDGES - 1]
    weights = _fitted(taught)
    if weights is None or sum(item.gain(weights) for item in judges) <= 0:
        return ()
    weights = _fitted(known)
    return () if weights is None else tuple(tuple(row) for row in weights.tolist())


@dataclass(frozen=True)
class _Known:
    """A question whose documents are known.

    Attributes:
        ranking: its best. `features`: [documents, FEATURES + ways] float64. `kind`: `ABOUT` of it.
        gold: the documents that answer it. `share`: how much it counts.
    """

    ranking: Ranking
    features: Tensor
    kind: list[float]
    gold: Collection[int]
    share: float

    @property
    def right(self) -> Tensor:
        """[documents] float64, 1 for those that answer."""
        return torch.tensor([float(document in self.gold) for document, _ in self.ranking], dtype=torch.float64)

    def gain(self, weights: Tensor) -> float:
        """The gain in recall at `DEPTHS`, summed and weighed."""
        order = (self.features @ (weights @ torch.tensor(self.kind, dtype=torch.float64))).argsort(descending=True)
        before = self.right
        found = [float(item[:depth].any()) for depth in DEPTHS for item in (before[order], before)]
        return self.share * (sum(found[::2]) - sum(found[1::2]))


def _fitted(questions: Sequence[_Known]) -> Tensor | None:
    """The weights of least cross entropy; None where no question has one of its documents among its best."""
    told = [item for item in questions if len(item.ranking) and bool(item.right.any())]
    if not told:
        return None
    features = torch.nn.utils.rnn.pad_sequence([item.features for item in told], batch_first=True)
    there = torch.nn.utils.rnn.pad_sequence([torch.ones(len(item.ranking), dtype=torch.bool) for item in told], True)
    share = torch.tensor([item.share for item in told], dtype=torch.float64)
    right = torch.nn.utils.rnn.pad_sequence([item.right / item.right.sum() for item in told], batch_first=True)
    wanted = right * (share / share.sum())[:, None]
    kinds = torch.tensor([item.kind for item in told], dtype=torch.float64)
    weights = torch.zeros(features.shape[2], len(ABOUT), dtype=torch.float64)
    weights[FEATURES.index("fused"), 0] = 1.0  # the ranking as it is
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = torch.einsum("qcf,qf->qc", features, kinds @ weights.T).masked_fill(~there, float("-inf"))
        value = -(wanted * scores.log_softmax(1).masked_fill(~there, 0.0)).sum() + RIDGE * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weights.detach()
