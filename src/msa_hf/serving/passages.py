"""The passage of a text that has most of the words of a question and its answer, with these marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypedDict

WORD = re.compile(r"\w+")
LONGEST = 320  # characters of a passage
SHORT = 3  # words of so many letters and fewer are not looked for


class Part(TypedDict):
    """A piece of a passage."""

    text: str
    marked: bool


def passage_of(text: str, words: str, longest: int = LONGEST) -> list[Part]:
    """Pieces of a text that follow one another, those that are among `words` marked; "…" where it was cut."""
    wanted = {word.casefold() for word in WORD.findall(words) if len(word) > SHORT or word.isdigit()}
    found = [match for match in WORD.finditer(text) if match.group().casefold() in wanted]
    start = _best_start(text, [(match.start(), match.group().casefold()) for match in found], longest)
    end = min(start + longest, len(text))
    if end < len(text) and (space := text.rfind(" ", start, end)) > start:
        end = space
    pieces: list[tuple[int, int]] = []
    for match in found:
        if start <= match.start() and match.end() <= end:
            joined = pieces and match.start() - pieces[-1][1] <= 1  # words of one name, digits of one number
            pieces.append((pieces.pop()[0] if joined else match.start(), match.end()))
    parts = list(_parts(text, start, end, pieces))
    if start:
        parts.insert(0, {"text": "…", "marked": False})
    if end < len(text):
        parts.append({"text": "…", "marked": False})
    return parts


def _best_start(text: str, found: list[tuple[int, str]], longest: int) -> int:
    """The beginning of the passage that has the most distinct words; the first of them, and at the start of a word."""
    if len(text) <= longest or not found:
        return 0
    best, most, first = 0, 0, 0
    counts: dict[str, int] = {}
    for place, word in found:
        counts[word] = counts.get(word, 0) + 1
        while place - found[first][0] > longest * 3 // 4:
            gone = found[first][1]
            counts[gone] -= 1
            if not counts[gone]:
                del counts[gone]
            first += 1
        if len(counts) > most:
            most, best = len(counts), found[first][0]
    near = max(best - longest // 8, 0)
    return 0 if not near else text.find(" ", near, best) + 1 or best


def _parts(text: str, start: int, end: int, marked: list[tuple[int, int]]) -> Iterator[Part]:
    for begin, stop in marked:
        if begin > start:
            yield {"text": text[start:begin], "marked": False}
        yield {"text": text[begin:stop], "marked": True}
        start = stop
    if start < end:
        yield {"text": text[start:end], "marked": False}
