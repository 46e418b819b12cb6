"""Questions as users keep them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

from ..json_object import JsonObject
from ..model.unicode_msa import check_unicode
from ..moved import renamed
from .errors import DataError
from .lines import json_rows

IGNORED = -100


class Question(TypedDict):
    """A question to train on.

    Attributes:
        question, answer: texts.
        positives: keys of the documents that answer it; none where nothing does.
        rounds: the same keys, by the round of retrieval in which they can be found.
    """

    question: str
    answer: str
    positives: list[str]
    rounds: NotRequired[list[list[str]]]


def read_questions(path: str | Path, documents: Mapping[str, str], encoding: str | None = None) -> list[Question]:
    """The objects of a JSON Lines file with `question`, `answer` and `positives`, a list of keys of `documents`.

    A question that no document answers has an empty list. A question whose documents lead to one another can have
    `rounds` beside it, the positives as a list of lists: those that the question leads to, those that these lead to,
    and so on.

    Raises:
        DataError: for a file that is missing, undecodable or empty, a field that is missing or of another type, a
            positive that no document has as its key, and rounds that do not hold the positives, each once.
    """
    questions: list[Question] = []
    for place, row in json_rows(Path(path), encoding):
        question, answer = text_field(place, row, "question"), text_field(place, row, "answer")
        if "positives" not in row:
            raise DataError(f"{place}: the field 'positives' is missing")
        positives = row["positives"]
        if not isinstance(positives, list) or not all(isinstance(key, str) for key in positives):
            raise DataError(f"{place}: 'positives' must be a list of document keys, got {json.dumps(positives)}")
        if unknown := [key for key in positives if key not in documents]:
            raise DataError(f"{place}: 'positives' names {unknown[0]!r}, which is the key of no document")
        made: Question = {"question": question, "answer": answer, "positives": list(dict.fromkeys(positives))}
        if (rounds := row.get("rounds")) is not None:
            if not isinstance(rounds, list) or not all(isinstance(found, list) and found for found in rounds):
                raise DataError(f"{place}: 'rounds' must be a list of lists of document keys, got {json.dumps(rounds)}")
            read = [key for found in rounds for key in found]
            if not all(isinstance(key, str) for key in read) or sorted(read) != sorted(made["positives"]):
                raise DataError(f"{place}: 'rounds' must hold the 'positives', each once, got {json.dumps(rounds)}")
            made["rounds"] = rounds
        questions.append(made)
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def text_field(place: str, row: JsonObject, name: str) -> str:
    """A field that must be text.

    Raises:
        DataError: where it is missing, no text, empty or not Unicode.
    """
    if name not in row:
        raise DataError(f"{place}: the field {name!r} is missing")
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{place}: {name!r} must be text that is not empty, got {json.dumps(row[name])}")
    try:
        check_unicode(row[name], f"{place}: {name!r}")
    except ValueError as error:
        raise DataError(str(error)) from error
    return str(row[name])


def rounds_of(question: Question) -> list[list[str]]:
    """A question's positives by the round in which they can be found; in one round where it does not say."""
    rounds = question.get("rounds") or [question["positives"]]
    return [list(dict.fromkeys(found)) for found in rounds if found]


__getattr__ = renamed(__name__, {"QuestionCollator": "training.collators.QuestionCollator"})
