"""Control over the rows of a batch while it is generated: each is handed out as it grows, and ends for itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .waiting import Question

UNFINISHED = "\ufffd"  # what half a character decodes to


class RowControl(StoppingCriteria):
    """Ends rows where their question says so, and hands out what they have become.

    Args:
        questions: of the rows, in their order.
        text_of: the text of the tokens of an answer, its end marker left out.
        ends: tokens that end an answer.
        opening: what an answer may begin with and that is no part of it.
        end: the text that ends an answer.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        text_of: Callable[[list[int]], str],
        ends: Collection[int],
        opening: str = "",
        end: str = "",
    ) -> None:
        self.questions, self.text_of, self.ends = questions, text_of, set(ends)
        self.opening, self.end = opening.strip(), end
        self.ended = [False] * len(questions)
        self.tokens: list[list[int]] = [[] for _ in questions]  # of each answer, its end included
        self._width: int | None = None

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """[B] bool, the rows that are to end; `input_ids` is [B, T + A], the prompts and what was generated."""
        if self._width is None:
            self._width = input_ids.shape[1] - 1
        for row, tokens in enumerate(input_ids[:, self._width :].tolist()):
            if not self.ended[row]:
                self.tokens[row] = tokens
                self.ended[row] = self._look(self.questions[row], tokens)
        return torch.tensor(self.ended, dtype=torch.bool, device=input_ids.device)

    def written(self, row: int) -> tuple[str, str]:
        """The text of an answer, and why it ended: `"stop"` or `"length"`."""
        text, stops = self.text_of(self.tokens[row]), self.questions[row].options.stop
        if (place := first_stop(text, stops)) is not None:
            return text[:place].rstrip(), "stop"
        ended = bool(self.tokens[row]) and self.tokens[row][-1] in self.ends
        return text, "stop" if ended or self._ended_by_text(row) else "length"

    def _ended_by_text(self, row: int) -> bool:
        return len(self.tokens[row]) < self.questions[row].options.new_tokens

    def _look(self, question: Question, tokens: list[int]) -> bool:
        """Hand out what is certain of a row; returns whether it ends here."""
        if question.cancelled or tokens[-1] in self.ends:
            return True
        text = self.text_of(tokens)
        if first_stop(text, question.options.stop) is not None:
            return True
        if self.opening and self.opening.startswith(text):
            return False
        question.extend(certain(text, (*question.options.stop, self.end)))
        return False


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """The place of the first of these texts."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def certain(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that stays, whatever follows: without half characters, and without what one of these
    texts may begin with."""
    text = text.rstrip(UNFINISHED)
    held = 0
    for stop in stops:
        most = min(len(stop) - 1, len(text))
        held = max(held, next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0))
    return text[: len(text) - held].rstrip()
