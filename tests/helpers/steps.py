"""Training steps on tiny models: the same documents and questions as a pool and as packed rows."""

from dataclasses import dataclass
from typing import Any

import torch
from setups import CHUNK, PREFIX, assert_same, tokens
from torch import Tensor

# Around the edges of a chunk: one token, less than a chunk, whole chunks, one more.
DOCUMENTS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 4 * CHUNK + 1)


@dataclass
class Question:
    """A question with its tail (which does not route) and its answer (whose tokens are labeled)."""

    text: list[int]
    tail: list[int]
    answer: list[int]
    positives: list[int]

    @property
    def ids(self) -> list[int]:
        return self.text + self.tail + self.answer

    @property
    def labels(self) -> list[int]:
        return [-100] * (len(self.text) + len(self.tail)) + self.answer


@dataclass
class Step:
    """Questions and, for each of them, the numbers of its documents.

    Attributes:
        documents: token ids.
        questions: their positives are numbers of `documents`.
    """

    documents: list[list[int]]
    questions: list[Question]

    def only(self, *questions: int) -> "Step":
        """The same step with some of the questions."""
        return Step(self.documents, [self.questions[number] for number in questions])

    def pool(self, side: str = "right") -> dict[str, Any]:
        """The arguments of the forward on a pool."""
        return {
            "input_ids": pad([question.ids for question in self.questions], 0, side),
            "attention_mask": pad([[1] * len(question.ids) for question in self.questions], 0, side),
            "routing_mask": self._marked("text", side),
            "labels": pad([question.labels for question in self.questions], -100, side),
            "answer_mask": self._marked("answer", side),
            "positive_docs": pad([question.positives for question in self.questions], -1),
            "documents": self.documents,
        }

    def packed(self, prefix: tuple[int, ...] = PREFIX) -> dict[str, Any]:
        """The arguments of the forward on rows that each hold all documents."""
        rows, owners, labels, answers = [], [], [], []
        for question in self.questions:
            row, owner = list(prefix), [-2] * len(prefix)
            for number, document in enumerate(self.documents):
                row += document
                owner += [number + 1] * len(document)
            before = len(row)
            rows.append(row + question.ids)
            owners.append(owner + [0] * len(question.text) + [-1] * (len(question.tail) + len(question.answer)))
            labels.append([-100] * before + question.labels)
            answers.append([label != -100 for label in labels[-1]])
        return {
            "input_ids": pad(rows, 0),
            "attention_mask": pad([[1] * len(row) for row in rows], 0),
            "doc_ids": pad(owners, -1),
            "labels": pad(labels, -100),
            "answer_mask": pad(answers, False),
            "positive_docs": pad([question.positives for question in self.questions], -1),
        }

    def form(self, name: str) -> dict[str, Any]:
        return {"pool": self.pool, "packed": self.packed}[name]()

    def _marked(self, part: str, side: str) -> Tensor:
        rows = []
        for question in self.questions:
            parts = ("text", "tail", "answer")
            rows.append([name == part for name in parts for _ in getattr(question, name)])
        return pad(rows, False, side)


def pad(rows: list[list[Any]], value: Any, side: str = "right") -> Tensor:
    width = max(1, *map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    joined = [(row + more) if side == "right" else (more + row) for row, more in zip(rows, padding, strict=True)]
    return torch.tensor(joined)


def step(questions: int = 3, seed: int = 0) -> Step:
    """Documents of `DOCUMENTS` tokens, and questions of unequal length with two, no, one and three positives."""
    documents = tokens(*DOCUMENTS, seed=seed)
    made = []
    for number in range(questions):
        text, tail, answer = tokens(4 + 2 * number, 2, 3 + (number * 2) % 3, seed=seed + 100 + number)
        positives = [[4, 1], [], [2], [0, 3, 5]][number % 4]
        made.append(Question(text, tail, answer, positives))
    return Step(documents, made)


def four() -> Step:
    """Four questions with 2 to 5 labels, one of them without positives."""
    made = step(4)
    for question, length in zip(made.questions, (5, 2, 4, 3), strict=True):
        question.answer = tokens(length, seed=length)[0]
    return made


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of `loss`, by parameter; only of those that got one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal parameter by parameter, up to `tolerance` of each one's largest number.

    Sums of terms that cancel (a bias that a softmax ignores, the scalar of a score bias) are as inexact as their terms,
    so below a thousandth of the largest gradient of all it is that one which counts.
    """
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in theirs:
        scale = max(float(theirs[name].abs().max()), 1e-2 * largest)
        worst = float((ours[name] - theirs[name]).abs().max())
        assert worst <= tolerance * scale, f"{name}: {worst:.2e} of {scale:.2e}"


def assert_same_scores(ours: Any, theirs: Any) -> None:
    """Layer by layer the same document scores, and the same documents chosen."""
    assert ours.keys() == theirs.keys()
    for layer in theirs:
        seen = theirs[layer].document_scores > float("-inf")
        assert torch.equal(ours[layer].document_scores > float("-inf"), seen)
        assert_same(ours[layer].document_scores[seen], theirs[layer].document_scores[seen])
        assert torch.equal(ours[layer].documents, theirs[layer].documents)
