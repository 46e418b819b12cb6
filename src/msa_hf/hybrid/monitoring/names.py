"""The names of a question that documents have, weighed by how rare they are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...retrieval import Searcher

LOOKED_AT = 10  # documents that were not read
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class KnownNames:
    """Shares of a question's names that one document has, 0 to 1.

    Attributes:
        other: the best document that was not read.
        read: the best of those that were.
    """

    other: float
    read: float


def known_names(
    searcher: Searcher, question: str, ranking: Sequence[tuple[int, float]], read: Collection[int]
) -> KnownNames:
    """Look for the names of a question in documents: an answer about a name that no document has is none.

    A name weighs what it scores by itself in the best document that has it; one that no document has, as much as it
    would by the formula of BM25. A question without names is taken for one whose names only others have.

    Args:
        searcher: of a bank with a lexical index.
        question: text.
        ranking: what the index has for it, positions with scores, best first.
        read: positions of the documents that were read.

    Raises:
        ValueError: where the bank has no lexical index.
    """
    index, weights = searcher.lexical(), dict[str, float]()
    for word in names_of(question):
        for term in index.terms(word):
            (hits,) = searcher.rankings("lexical", [word], 1)
            weights[term] = hits[0][1] if hits else math.log(1 + (len(searcher.bank) + 0.5) / 0.5)
    total = sum(weights.values())
    if not total:
        return KnownNames(1.0, 0.0)

    def share(position: int) -> float:
        there = set(index.terms(searcher.bank.documents[position].text or ""))
        return sum(weight for term, weight in weights.items() if term in there) / total

    others = [position for position, _ in ranking if position not in read][:LOOKED_AT]
    return KnownNames(max(map(share, others), default=0.0), max(map(share, read), default=0.0))


def names_of(question: str) -> list[str]:
    """The words behind the first one that have a capital letter."""
    return [word for word in _WORD.findall(question)[1:] if word != word.lower()]
