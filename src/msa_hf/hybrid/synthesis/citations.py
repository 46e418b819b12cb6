"""Citations: what a text cites, and whether it is there to be cited."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

# A bracket of one label or several; a label has no white space and no brackets.
_BRACKET = re.compile(r"\[([^\[\]\s,;]{1,80}(?:\s*[,;]\s*[^\[\]\s,;]{1,80})*)\]")
_BETWEEN = re.compile(r"\s*[,;]\s*")
UNKNOWN = "[unknown source: {}]"


class CitationError(ValueError):
    """A text that cites what is not among its sources."""


def cited_labels(text: str) -> list[str]:
    """The labels in brackets, in order, each once: every word in brackets counts as one."""
    labels = [label for found in _BRACKET.finditer(text) for label in _BETWEEN.split(found[1])]
    return list(dict.fromkeys(labels))


def without_labels(text: str) -> str:
    """A text in which words in brackets stand in parentheses: what a document says cannot pass for a citation."""
    return _BRACKET.sub(lambda found: f"({found[1]})", text)


def label_keys(keys: Sequence[str]) -> dict[str, str]:
    """Label -> key: `S1`, `S2`, ..., which a model can copy whatever the keys look like."""
    return {f"S{number}": key for number, key in enumerate(dict.fromkeys(keys), 1)}


def resolve(text: str, labels: Mapping[str, str]) -> tuple[str, list[str], list[str]]:
    """A text with keys in place of labels.

    Args:
        text: of a model.
        labels: label -> key, of the sources that it was shown. A key by itself will do as well.

    Returns:
        the text, in which what is not among the sources is marked; the keys that it cites, and the labels that are
        unknown, each once and in order.
    """
    keys, unknown = _sort(text, labels)

    def shown(label: str) -> str:
        key = _key_of(label, labels)
        return UNKNOWN.format(label) if key is None else f"[{key}]"

    return _replace(text, shown), keys, unknown


def _sort(text: str, labels: Mapping[str, str]) -> tuple[list[str], list[str]]:
    keys: list[str] = []
    unknown: list[str] = []
    for label in cited_labels(text):
        key = _key_of(label, labels)
        (unknown if key is None else keys).append(label if key is None else key)
    return list(dict.fromkeys(keys)), unknown


def _key_of(label: str, labels: Mapping[str, str]) -> str | None:
    return labels[label] if label in labels else label if label in labels.values() else None


def _replace(text: str, shown: Callable[[str], str]) -> str:
    return _BRACKET.sub(lambda found: "".join(shown(label) for label in _BETWEEN.split(found[1])), text)
