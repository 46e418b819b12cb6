"""The value that is made of a step's output, and tests of values."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..chat.json_schema import read_json
from .chain import Condition, Extract
from .template import JsonValue, as_text

_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,3}[.):]|\[\d{1,3}\])\s+")
_WORD = re.compile(r"\w(?:[\w'\u2019-]*\w)?")
# Between the capitalized words of a name.
_JOINING = frozenset(("of", "the", "de", "la", "von", "van", "der", "al"))
_PLAIN = """
A An The In On At By For From Of To With And But Or If It Its He His She Her They Their This That These Those There
When Where Which Who Whose Whom What Why How After Before During Since While As Is Are Was Were Be Not No One Also
Other Another Some Many Most Both Each All Although However I We You
"""
_PLAIN_WORDS = frozenset(_PLAIN.split())


def extract(output: str, form: Extract, question: str = "") -> JsonValue:
    """The value of an output.

    Raises:
        AnswerError: for an output that is not the JSON asked for.
    """
    if form.kind == "json":
        value: JsonValue = read_json(output, form.schema or {})
        return value
    if form.kind in ("list", "names"):
        found = _lines(output) if form.kind == "list" else names_in(output, question)
        return [*found[: form.at_most]]
    return output.strip()


def _lines(text: str) -> list[str]:
    """The lines of a text that are not empty, without bullets and numbers."""
    lines = [_BULLET.sub("", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def names_in(text: str, without: str = "") -> list[str]:
    """The capitalized names in a text, in order, each once, those left out of which `without` has every word.

    A rule, not a model: runs of capitalized words, also across "of", "the" and the like. Plain words that begin a
    sentence are none.
    """
    known = set(_WORD.findall(without.lower()))
    found: dict[str, None] = {}
    for run in _runs(text):
        words = _WORD.findall(run)
        if len(run) > 1 and not {word.lower() for word in words} <= known:
            found.setdefault(run)
    return list(found)


def _runs(text: str) -> Iterator[str]:
    """Runs of capitalized words, with joining words and small numbers between and behind them."""
    words = list(_WORD.finditer(text))
    place = 0
    while place < len(words):
        first = last = place
        place += 1
        if not words[first][0][0].isupper() or words[first][0] in _PLAIN_WORDS:
            continue
        for following in range(first + 1, len(words)):
            before, word = words[following - 1], words[following]
            gap = text[before.end() : word.start()]
            initial = len(before[0]) == 1 and gap.startswith(".")
            if (gap[1:] if initial else gap).strip() or not gap or following - last > 3:
                break
            if word[0][0].isupper() or (word[0].isdigit() and len(word[0]) < 5 and following == last + 1):
                last = following
            elif word[0] not in _JOINING:
                break
        place = last + 1
        yield text[words[first].start() : words[last].end()]


def holds(condition: Condition, value: JsonValue) -> bool:
    """Tell whether a value passes a test."""
    wanted = condition.value
    if condition.test == "is":
        empty = value is None or value is False or (isinstance(value, str | list | dict) and not value)
        blank = empty or (isinstance(value, str) and not value.strip())
        return blank == (wanted == "empty")
    if condition.test == "in":
        assert isinstance(wanted, list)
        return any(_same(value, item) for item in wanted)
    if condition.test == "contains":
        if isinstance(value, list):
            return any(_same(item, wanted) for item in value)
        return _plain(wanted) in _plain(value)
    return _same(value, wanted) == (condition.test == "equals")


def _plain(value: JsonValue) -> str:
    return " ".join(as_text(value).casefold().split())


def _same(one: JsonValue, other: JsonValue) -> bool:
    return _plain(one) == _plain(other)
