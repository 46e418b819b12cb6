"""A user's documents and questions: reading them, and batches for the training forward."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.tokenizing_msa import tokenize

IGNORED = -100
SEPARATOR = "\n"


class DataError(ValueError):
    """A file of the user's that cannot be trained on; the message names file and line."""


def read_documents(path: str | Path) -> dict[str, str]:
    """Key -> text of a JSON Lines file of objects with `key` and `text`.

    Raises:
        DataError: for a file that is missing, undecodable or empty, a field that is missing or no text, and a key that
            is used twice.
    """
    documents: dict[str, str] = {}
    for place, row in _rows(Path(path)):
        key, text = _text(place, row, "key"), _text(place, row, "text")
        if key in documents:
            raise DataError(f"{place}: an earlier line has the key {key!r} too")
        documents[key] = text
    if not documents:
        raise DataError(f"{path}: holds no documents")
    return documents


def read_questions(path: str | Path, documents: Mapping[str, str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file with `question`, `answer` and `positives`, a list of keys of `documents`.

    A question that no document answers has an empty list. A question whose documents lead to one another can have
    `rounds` beside it, the positives as a list of lists: those that the question leads to, those that these lead to,
    and so on.

    Raises:
        DataError: for a file that is missing, undecodable or empty, a field that is missing or of another type, a
            positive that no document has as its key, and rounds that do not hold the positives, each once.
    """
    questions = []
    for place, row in _rows(Path(path)):
        question, answer = _text(place, row, "question"), _text(place, row, "answer")
        if "positives" not in row:
            raise DataError(f"{place}: the field 'positives' is missing")
        positives = row["positives"]
        if not isinstance(positives, list) or not all(isinstance(key, str) for key in positives):
            raise DataError(f"{place}: 'positives' must be a list of document keys, got {json.dumps(positives)}")
        if unknown := [key for key in positives if key not in documents]:
            raise DataError(f"{place}: 'positives' names {unknown[0]!r}, which is the key of no document")
        made = {"question": question, "answer": answer, "positives": list(dict.fromkeys(positives))}
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


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with `file:line`; empty lines are passed over."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if not text.strip():
                        continue
                    row = json.loads(text)
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{place}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{place}: a line must be a JSON object, got {type(row).__name__}")
                yield place, row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _text(place: str, row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise DataError(f"{place}: the field {name!r} is missing")
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{place}: {name!r} must be text that is not empty, got {json.dumps(row[name])}")
    return row[name]


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """The prompt that the collator trains: the question and a line break, no special tokens."""
    return tokenize(tokenizer, question + SEPARATOR)


class QuestionCollator:
    """Batches of questions as a training step on a pool of documents that all of them share.

    A pool holds the positives of the batch's questions and, drawn at random, other documents; in random order. The
    draws depend on the seed and on how many batches there were before, `drawn`, so a run that goes on after an
    interruption sees the pools that it would have seen.

    Args:
        tokenizer: of the model; questions are padded on its `padding_side`.
        documents: key -> text, encoded as `encode_documents` does by default.
        pool: documents per step; fewer where there are no more, more where the positives alone are.
        seed: of the draws.
        max_length: longest document, and longest question with its answer, in tokens.

    Raises:
        ValueError: for no documents, an empty pool, and a document that is empty or too long, naming it; when called,
            for a positive that is no document and for a question that is too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Mapping[str, str],
        pool: int = 64,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        if pool < 1:
            raise ValueError(f"`pool` must be at least 1, got {pool}.")
        if not documents:
            raise ValueError("`documents` is empty: a training step needs at least one document.")
        self.tokenizer, self.pool, self.max_length = tokenizer, pool, max_length
        self.seed, self.drawn = seed, 0
        self.keys = list(documents)
        self.tokens = {key: tokenize(tokenizer, text) for key, text in documents.items()}
        for key, ids in self.tokens.items():
            if not ids:
                raise ValueError(f"Document {key!r} has no tokens; leave it out.")
            if max_length is not None and len(ids) > max_length:
                raise ValueError(f"Document {key!r} has {len(ids)} tokens, above the limit of {max_length}; split it.")

    def row(self, question: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a question with its answer, closed by the end-of-sequence token, and their labels."""
        asked = question_ids(self.tokenizer, question["question"])
        answer = tokenize(self.tokenizer, question["answer"])
        if self.tokenizer.eos_token_id is not None:
            answer.append(self.tokenizer.eos_token_id)
        if self.max_length is not None and len(asked) + len(answer) > self.max_length:
            raise ValueError(
                f"Question {question['question'][:60]!r} has {len(asked) + len(answer)} tokens with its answer, above "
                f"the limit of {self.max_length}."
            )
        return asked + answer, [IGNORED] * len(asked) + answer

    def draw(self, questions: Sequence[Mapping[str, Any]]) -> list[str]:
        """The keys of the documents of a step, in their order."""
        pick = random.Random(f"{self.seed}, batch {self.drawn}")
        self.drawn += 1
        return draw_pool(self.tokens, self.keys, questions, self.pool, pick)

    def __call__(self, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of the training forward."""
        rows = [self.row(question) for question in questions]
        keys = self.draw(questions)
        place = {key: number for number, key in enumerate(keys)}
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        documents = [self.tokens[key] for key in keys]
        positives = [[place[key] for key in dict.fromkeys(question["positives"])] for question in questions]
        return {
            "input_ids": _pad([ids for ids, _ in rows], 0, left),
            "attention_mask": _pad([[1] * len(ids) for ids, _ in rows], 0, left),
            "labels": _pad([labels for _, labels in rows], IGNORED, left),
            "positive_docs": _pad(positives, -1),
            "documents": {
                "input_ids": _pad(documents, 0),
                "attention_mask": _pad([[1] * len(ids) for ids in documents], 0),
            },
        }


def draw_pool(
    known: Mapping[str, Any],
    keys: Sequence[str],
    questions: Sequence[Mapping[str, Any]],
    size: int,
    pick: random.Random,
) -> list[str]:
    """The keys of a pool: the positives of `questions`, and others up to `size`, in random order.

    Raises:
        ValueError: for a positive that is not among the `known`, which are `keys`.
    """
    wanted = list(dict.fromkeys(key for question in questions for key in question["positives"]))
    if unknown := [key for key in wanted if key not in known]:
        raise ValueError(f"`positives` names {unknown[0]!r}, which is the key of no document.")
    taken = set(wanted)
    missing = min(size, len(keys)) - len(wanted)
    # As many too many as the positives can take away, so that nothing of the size of the corpus is built.
    for key in pick.sample(keys, min(size + len(wanted), len(keys))):
        if missing > 0 and key not in taken:
            wanted.append(key)
            missing -= 1
    pick.shuffle(wanted)
    return wanted


def rounds_of(question: Mapping[str, Any]) -> list[list[str]]:
    """A question's positives by the round in which they can be found; in one round where it does not say."""
    rounds = question.get("rounds") or [question["positives"]]
    return [list(dict.fromkeys(found)) for found in rounds if found]


def _pad(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(1, *map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, padding, strict=True)])
