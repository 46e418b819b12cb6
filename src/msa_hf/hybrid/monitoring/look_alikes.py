"""Documents that differ from each other in a few words: routers can hardly tell them apart, and one may answer."""

from __future__ import annotations

import re
from collections.abc import Iterable

ALIKE = 0.7  # of the words that either text has, both have
_WORD = re.compile(r"\w+")


def words_of(text: str) -> frozenset[str]:
    """The words of a text, in lower case."""
    return frozenset(_WORD.findall(text.lower()))


def look_alikes(read: Iterable[str], others: Iterable[str]) -> int:
    """The number of texts that are nearly one of those that were read, and not the same words."""
    known = [words for text in read if (words := words_of(text))]
    return sum(any(_alike(words_of(other), words) for words in known) for other in others)


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    return one != other and len(one & other) >= ALIKE * len(one | other)
