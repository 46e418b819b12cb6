"""The names of a question that documents have, weighed by how rare they are."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
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


class QuestionNames:
    """The names of a question, and which of them documents have: an answer about a name that no document has is none.

    A name weighs what it scores by itself in the best document that has it; one that no document has, as much as it
    would by the formula of BM25.

    Args:
        searcher: of a bank with a lexical index.
        question: text.

    Raises:
        ValueError: where the bank has no lexical index.
    """

    def __init__(self, searcher: Searcher, question: str) -> None:
        self._documents, self._index = searcher.bank.documents, searcher.lexical()
        self.weights = dict[str, float]()
        for word in names_of(question):
            for term in self._index.terms(word):
                (hits,) = searcher.rankings("lexical", [word], 1)
                unknown = math.log(1 + (len(searcher.bank) + 0.5) / 0.5)
                self.weights[term] = hits[0][1] if hits else unknown

    def share(self, positions: Iterable[int]) -> float:
        """The share of the names that these documents have together; 1 for a question without names."""
        total = sum(self.weights.values())
        there = {term for position in positions for term in self._index.terms(self._documents[position].text or "")}
        return sum(weight for term, weight in self.weights.items() if term in there) / total if total else 1.0

    def known(self, ranking: Sequence[tuple[int, float]], read: Collection[int]) -> KnownNames:
        """The shares that single documents have. A question without names is taken for one whose names only others
        have.

        Args:
            ranking: what the index has for the question, positions with scores, best first.
            read: positions of the documents that were read.
        """
        if not self.weights:
            return KnownNames(1.0, 0.0)
        others = [position for position, _ in ranking if position not in read][:LOOKED_AT]
        best_other = max((self.share([position]) for position in others), default=0.0)
        return KnownNames(best_other, max((self.share([position]) for position in read), default=0.0))


def names_of(question: str) -> list[str]:
    """The words behind the first one that have a capital letter."""
    return [word for word in _WORD.findall(question)[1:] if word != word.lower()]
