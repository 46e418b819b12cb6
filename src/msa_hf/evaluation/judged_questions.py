"""Questions with their answers and documents, as diagnoses take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.errors import DataError
from ..data.lines import json_rows
from ..data.questions import text_field
from ..model.memory_msa import MemoryBank
from .recall import JudgedFields, positions_of


@dataclass(frozen=True)
class JudgedQuestion:
    """A question whose documents were looked up.

    Attributes:
        rounds: positions of the documents that answer it, by the round of retrieval that should find them.
    """

    text: str
    answer: str | None
    kind: str
    rounds: tuple[tuple[int, ...], ...]

    @property
    def positives(self) -> list[int]:
        return [position for found in self.rounds for position in found]


def read_judged(path: str | Path, encoding: str | None = None) -> list[JudgedFields]:
    """The questions of a JSON Lines file for `diagnose`; fields that it does not know are passed over.

    Raises:
        DataError: as `read_asked`, and where no question says by what an answer could be judged.
    """
    questions = read_asked(path, encoding)
    if not any({"answer", "positives", "rounds"} & question.keys() for question in questions):
        raise DataError(f"{path}: no question has an 'answer' or 'positives', by which answers could be judged")
    return questions


def read_asked(path: str | Path, encoding: str | None = None) -> list[JudgedFields]:
    """The questions of a JSON Lines file, of which none need say what answers it, with what they say of it.

    Raises:
        DataError: for a file that is missing, undecodable or empty, and a field of another type, naming file and line.
    """
    questions: list[JudgedFields] = []
    for place, row in json_rows(Path(path), encoding):
        question: JudgedFields = {"question": text_field(place, row, "question")}
        if row.get("answer") is not None:
            question["answer"] = text_field(place, row, "answer")
        if row.get("kind") is not None:
            question["kind"] = text_field(place, row, "kind")
        if (keys := row.get("positives")) is not None:
            if not _are_keys(keys):
                raise DataError(f"{place}: 'positives' must be a list of document keys, got {json.dumps(keys)}")
            question["positives"] = keys
        if (rounds := row.get("rounds")) is not None:
            if not isinstance(rounds, list) or not all(map(_are_keys, rounds)):
                raise DataError(f"{place}: 'rounds' must be lists of document keys, got {json.dumps(rounds)}")
            question["rounds"] = rounds
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def _are_keys(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(key, str) for key in value)


def look_up(bank: MemoryBank, questions: Sequence[JudgedFields], refusal: str | None) -> list[JudgedQuestion]:
    """Find the documents of questions in a bank.

    Args:
        refusal: the answer of questions without positives that have none.

    Raises:
        ValueError: for a positive that the bank does not hold, and rounds that are not the positives.
    """
    made = []
    with_kinds = any(item.get("kind") for item in questions)
    for item in questions:
        keys = list(item.get("positives") or ())
        rounds = [positions_of(bank, group) for group in item.get("rounds") or [[key] for key in keys]]
        if sorted(position for group in rounds for position in group) != sorted(positions_of(bank, keys)):
            raise ValueError(f"`rounds` of {item['question'][:60]!r} are not its `positives`, each in one round.")
        answer = item.get("answer")
        if answer is None and not keys:
            answer = refusal
        unanswerable = not keys or (refusal is not None and answer == refusal)
        kind = item.get("kind") or ("other" if with_kinds else "unanswerable" if unanswerable else "answerable")
        made.append(JudgedQuestion(item["question"], answer, kind, tuple(map(tuple, rounds))))
    return made
