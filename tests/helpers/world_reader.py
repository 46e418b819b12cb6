"""The documents of invented worlds, taken apart by their sentences."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain
from typing import NamedTuple, Protocol

from msa_hf.synthetic.names import FORMS, KINDS
from msa_hf.synthetic.templates import ATTRIBUTES, LEADS

PRONOUNS = {"{S}": "(?:She|He)", "{s}": "(?:she|he)", "{o}": "(?:her|him)", "{P}": "(?:Her|His)"}
HEADING = re.compile(r"(?:(?:Edition|Version|Register of) (\d+)\. |As of (\d+): )")


class Documents(Protocol):
    def texts(self) -> list[str]: ...

    def names(self) -> list[str | None]: ...


class Reader:
    """The documents of a corpus, taken apart by their sentences, and nothing else of it."""

    def __init__(self, corpus: Documents) -> None:
        self.texts, self.names = corpus.texts(), corpus.names()
        self.used: Counter[str] = Counter()  # templates and leads
        self.records: list[dict[str, str]] = []  # attribute -> value, in the order of each document
        self.where = {name: position for position, name in enumerate(self.names) if name}
        for text, name in zip(self.texts, self.names, strict=True):
            self.records.append(self._read(text, name) if name else {})

    def _read(self, text: str, name: str) -> dict[str, str]:
        record: dict[str, str] = {}
        for sentence in sentences_of(HEADING.sub("", text, count=1)):
            lead = next((lead for lead in LEADS if sentence.startswith(lead)), "")
            rest = sentence.removeprefix(lead).replace(name, "§")
            found = {
                (attribute, match[1], template)
                for template, attribute, plain, led in STATEMENTS[kind_of(name)]
                if (match := (led if lead else plain).fullmatch(rest))
            }
            assert len(found) == 1, f"{sentence!r} of {name!r} says {found}"
            attribute, value, template = found.pop()
            assert attribute not in record, text
            record[attribute] = value
            self.used.update((lead, template))
        return record

    def answer(self, question: str) -> set[str]:
        """All answers that the documents hold, whichever way the question is understood."""
        return {
            record[attribute]
            for (kind, attribute), subject in readings_of(question, QUESTIONS)
            for name in self.called(subject, kind)
            for record in [self.records[self.where[name]]]
            if attribute in record
        }

    def called(self, subject: str, kind: str) -> set[str]:
        """The documented entities of a kind that a phrase can mean: by name, or over one link."""
        linked = {
            self.records[self.where[name]].get(attribute, "")
            for (first, attribute), inner in readings_of(subject, DESCRIPTIONS)
            for name in self.called(inner, first)
        }
        names = linked | {subject.removeprefix("the ")}
        return {name for name in names if name in self.where and kind_of(name) == kind}


Slot = tuple[str, str]  # kind, attribute

NOUNS = {form.replace("{}", "").strip(): kind for kind, forms in FORMS.items() for form in forms}


def kind_of(name: str) -> str:
    """By the form of the name alone."""
    first, second = name.split()
    return NOUNS.get(first) or NOUNS.get(second) or "person"


def sentences_of(text: str) -> list[str]:
    return re.split(r"(?<=\.) (?=[A-Z])", text)


def _statement(kind: str, template: str, after_lead: bool) -> re.Pattern[str]:
    """The template with § for the name."""
    article = "the " if kind in ("object", "work", "event") else ""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for place, words in PRONOUNS.items():
        pattern = pattern.replace(place, words)
    pattern = pattern.replace("{N}", article.capitalize() + "§").replace("{n}", article + "§")
    if after_lead:
        pattern = re.sub(r"^(\(\?:)?(\w)", lambda start: start[0].lower(), pattern).replace("(?:she|He)", "(?:she|he)")
        pattern = pattern.replace("(?:her|His)", "(?:her|his)")
    return re.compile(pattern.replace("{v}", "(.+)").replace("{a}", "an? (.+)"))


STATEMENTS = {
    kind: [
        (template, attribute.name, _statement(kind, template, False), _statement(kind, template, True))
        for attribute in attributes
        for template in chain(attribute.named, attribute.unnamed)
    ]
    for kind, attributes in zip(KINDS, ATTRIBUTES, strict=True)
}


class Phrase(NamedTuple):
    slot: Slot
    template: str
    pattern: re.Pattern[str]


def _phrases(of: str) -> list[Phrase]:
    return [
        Phrase((kind, attribute.name), template, re.compile(re.escape(template).replace(r"\{n\}", "(.+)")))
        for kind, attributes in zip(KINDS, ATTRIBUTES, strict=True)
        for attribute in attributes
        for template in getattr(attribute, of)
    ]


QUESTIONS, DESCRIPTIONS = _phrases("questions"), _phrases("descriptions")


def readings_of(text: str, phrases: list[Phrase]) -> set[tuple[Slot, str]]:
    return {(phrase.slot, found[1]) for phrase in phrases if (found := phrase.pattern.fullmatch(text))}
