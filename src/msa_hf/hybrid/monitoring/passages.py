"""The part of a long text that is read for a question: a model that finds a fact in a passage may miss it in pages."""

from __future__ import annotations

import re

from .coverage import sentences_of
from .names import names_of

WORDS = 100  # of a passage
_WORD = re.compile(r"\w+")
_SHORT = 3  # letters of words that say little, such as "the"


def passage_of(text: str, question: str, words: int = WORDS) -> str:
    """The sentences, one behind the other, that have the most of the question's names and words; short texts whole.

    A passage begins where a sentence has one of these words, and has at most `words` words; a longer sentence is one of
    its own.
    """
    sentences = sentences_of(text)
    found = [[word.lower() for word in _WORD.findall(sentence)] for sentence in sentences]
    if sum(map(len, found)) <= words:
        return text
    asked = {word.lower() for word in names_of(question)}
    asked = asked or {word for word in _WORD.findall(question.lower()) if len(word) > _SHORT}
    hits = [[word for word in sentence if word in asked] for sentence in found]
    best, chosen = (-1, -1), (0, 1)
    for start in range(len(sentences)):
        if start and not hits[start]:
            continue
        end, count = start + 1, len(found[start])
        while end < len(sentences) and count + len(found[end]) <= words:
            count, end = count + len(found[end]), end + 1
        here = [word for sentence in hits[start:end] for word in sentence]
        if (score := (len(set(here)), len(here))) > best:
            best, chosen = score, (start, end)
    return " ".join(sentences[slice(*chosen)])
