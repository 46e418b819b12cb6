"""Facts about invented entities that lead from one to the next, and the questions that follow them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..synthetic.hashing import derive_key
from ..synthetic.names import ARTICLES, FORMS, KINDS, PERSON
from ..synthetic.templates import ATTRIBUTES, Attribute
from ..synthetic.words import Words

MOST_HOPS = 4
CHAINS = 4096  # of one seed


@dataclass(frozen=True)
class Chain:
    """Facts, each about what the one before it names.

    Attributes:
        sentences: one for each hop.
        question: names the first entity and describes the others.
        answer: the last fact's value.
        twin: the same question for something that no sentence states.
        names: of its entities, without articles.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    twin: str
    names: tuple[str, ...]


class Chains:
    """Chains by number, about entities whose names no training text has; no two of them share a name.

    Args:
        seed: another seed gives other entities.
    """

    def __init__(self, seed: int = 0) -> None:
        self._key = derive_key("planted chains", seed)

    @cached_property
    def _words(self) -> Words:
        return Words(2 * CHAINS * (MOST_HOPS + 1), derive_key(self._key, "words"), "test")

    def chain(self, number: int, hops: int) -> Chain:
        """A chain of so many facts, 1 to `MOST_HOPS`.

        Raises:
            IndexError, ValueError: for a number or hops out of range.
        """
        if not 0 <= number < CHAINS:
            raise IndexError(f"chain {number} of {CHAINS}")
        if not 1 <= hops <= MOST_HOPS:
            raise ValueError(f"a chain has 1 to {MOST_HOPS} hops, not {hops}")
        kind = self._below(len(KINDS), number, "kind")
        name = self._name(number, 0, kind)
        called = _subject(kind, name)
        sentences, names = [], [name]
        for hop in range(hops):
            last = hop == hops - 1
            fitting = [item for item in ATTRIBUTES[kind] if (item.link < 0) == last]
            attribute = fitting[self._below(len(fitting), number, "attribute", hop)]
            if last:
                value = attribute.values[self._below(len(attribute.values), number, "value")]
                others = [item for item in fitting if item is not attribute]
                other = others[self._below(len(others), number, "other")]
                sentences.append(self._sentence(attribute, _subject(kind, name), value, number, hop))
                question, twin = (self._pick(item.questions, number, "question") for item in (attribute, other))
                return Chain(tuple(sentences), question.format(n=called), value, twin.format(n=called), tuple(names))
            value = self._name(number, hop + 1, attribute.link)
            names.append(value)
            sentences.append(self._sentence(attribute, _subject(kind, name), value, number, hop))
            called = self._pick(attribute.descriptions, number, "description", hop).format(n=called)
            name, kind = value, attribute.link
        raise AssertionError("a chain ends with its last hop")

    def _sentence(self, attribute: Attribute, name: str, value: str, number: int, hop: int) -> str:
        template = self._pick(attribute.named, number, "sentence", hop)
        article = "an" if value[0].lower() in "aeiou" else "a"
        opening = name[0].upper() + name[1:]
        text = template.format(N=opening, n=name, v=value, a=f"{article} {value}")
        return text[0].upper() + text[1:]

    def _name(self, number: int, place: int, kind: int) -> str:
        first = 2 * (number * (MOST_HOPS + 1) + place)
        one, other = self._words.spell(np.array([first, first + 1]))
        if kind == PERSON:
            return f"{one} {other}"
        forms = FORMS[KINDS[kind]]
        form = forms[self._below(len(forms), number, "form", place)]
        return form.replace("{}", one)

    def _pick(self, alternatives: list[str], *parts: int | str) -> str:
        return alternatives[self._below(len(alternatives), *parts)]

    def _below(self, bound: int, *parts: int | str) -> int:
        return derive_key(self._key, *parts) % bound


def _subject(kind: int, name: str) -> str:
    """A name as sentences have it, with the article that is no part of it."""
    return ARTICLES.get(KINDS[kind], "") + name
