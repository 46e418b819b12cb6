"""Texts that name whom a benchmark invented: left out of what surrounds its documents, where they could answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

WORDS = re.compile(r"\w+")
ENTITY = re.compile(r"(?=\b([A-Z]\w+ [A-Z]\w+)\b)")  # as invented entities have, also behind an article


def without_names(texts: Iterable[str], names: Collection[str]) -> list[str]:
    """The texts in which none of these names stands, as they may in documents of an earlier run.

    Args:
        names: of one word or more; case counts.

    Raises:
        ValueError: where no text is left of some.
    """
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(WORDS.findall(name)[0], []).append(name)
    kept, left_out, named = list[str](), 0, ""
    for text in texts:
        found = by_word.keys() & set(WORDS.findall(text))
        if hit := next((name for word in found for name in by_word[word] if name in text), ""):
            left_out, named = left_out + 1, hit
        else:
            kept.append(text)
    if left_out and not kept:
        raise ValueError(
            f"All {left_out:,} texts name somebody or something that is asked about, such as {named!r}: they are of an "
            "earlier run. Name others, or take another seed."
        )
    return kept
