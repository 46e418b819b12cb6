"""Sentences that each carry their sources: asked for as JSON, so that decoding can be held to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...evaluation.metrics import normalize_answer
from ..chat.chat_model import Completion, Message
from ..chat.json_schema import AnswerError, problems_of, read_json
from .budget import BudgetError, Spending
from .citations import without_labels
from .extracting import sentences_of

MOST_SENTENCES = 8
LONGEST_SENTENCE = 240  # characters
REPAIRS = 1  # times that an answer which is not the JSON asked for is asked for again
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class CitedSentence:
    """A sentence and the labels of its sources."""

    text: str
    labels: tuple[str, ...]

    def cited(self) -> str:
        """The sentence with its labels in brackets behind it."""
        return f"{self.text} {''.join(f'[{label}]' for label in self.labels)}"


def schema_of(labels: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of cited sentences: no sentence without a source, and none but these. The sources come first, so
    that a model writes its sentence from them."""
    sources = {"type": "array", "items": {"type": "string", "enum": list(labels)}, "minItems": 1, "maxItems": 4}
    sentence = {"type": "string", "minLength": 1, "maxLength": LONGEST_SENTENCE}
    properties = {"sources": sources, "sentence": sentence}
    item = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "array", "items": item, "minItems": 1, "maxItems": MOST_SENTENCES}


def write_sentences(
    spending: Spending, messages: Sequence[Message], labels: Sequence[str]
) -> tuple[list[CitedSentence], bool]:
    """Have a chat model write sentences with their sources; also tells whether it ended for lack of tokens.

    An answer that ended for lack of tokens keeps the sentences that are whole.

    Raises:
        AnswerError: for an answer that is not the JSON asked for, after a repair.
        BudgetError: where the budget has no room for a sentence.
    """
    schema, asked = schema_of(labels), list(messages)
    for attempt in range(REPAIRS + 1):
        written = spending.complete(asked, schema)
        try:
            return _sentences(_records(written, schema, spending)), written.cut
        except AnswerError as error:
            if attempt == REPAIRS:
                raise
            again = [
                *messages,
                Message("assistant", written.text),
                Message("user", f"That is not the JSON asked for: {error.problem}. Answer with the JSON alone."),
            ]
            asked = again if spending.fits(again) else list(messages)
    raise AssertionError("unreachable")


def _records(written: Completion, schema: Mapping[str, Any], spending: Spending) -> Sequence[Mapping[str, Any]]:
    try:
        records: list[Mapping[str, Any]] = read_json(written.text, schema)
        return records
    except AnswerError:
        if not written.cut:
            raise
    found = [record for record in _whole(written.text) if not list(problems_of(record, schema["items"]))]
    if not found:
        raise BudgetError(
            f"`answer_tokens={spending.budget.answer_tokens}` has no room for a sentence with its sources; raise it. "
            f"The answer began with {written.text[:200]!r}."
        )
    return found[:MOST_SENTENCES]


def _whole(text: str) -> list[Mapping[str, Any]]:
    """The entries of a list that was cut short, as far as they are whole."""
    found: list[Mapping[str, Any]] = []
    place = text.find("{")
    while place >= 0:
        try:
            record, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            break
        found.append(record)
        place = text.find("{", end)
    return found


def _sentences(records: Sequence[Mapping[str, Any]]) -> list[CitedSentence]:
    """The sentences of all entries, each once: a weak model writes several into one entry, and repeats itself."""
    found: dict[str, tuple[str, ...]] = {}
    for record in records:
        text = " ".join(without_labels(record["sentence"]).split())
        for sentence in sentences_of(text):
            found[sentence] = (*found.get(sentence, ()), *record["sources"])
    return [CitedSentence(text, tuple(dict.fromkeys(labels))) for text, labels in found.items()]


def attributed(sentence: CitedSentence, answers: Mapping[str, Sequence[str]]) -> tuple[CitedSentence, bool]:
    """A sentence with the sources that it can have, and whether it is backed by one of them.

    A model that is held to cite may cite anything. A sentence is backed where it has an answer that a source gives, up
    to case, articles and punctuation. One that is backed by none of the sources that it cites also cites those shown
    that back it.

    Args:
        answers: label -> answers of its document, of all that were shown.
    """
    said = f" {normalize_answer(sentence.text)} "

    def backs(label: str) -> bool:
        plain = [normalize_answer(answer) for answer in answers.get(label, ())]
        return any(answer and f" {answer} " in said for answer in plain)

    if any(backs(label) for label in sentence.labels):
        return sentence, True
    others = tuple(label for label in answers if backs(label))
    return CitedSentence(sentence.text, (*sentence.labels, *others)), bool(others)
