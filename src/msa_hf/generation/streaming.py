"""Streaming of answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer


class AnswerStreamer(BaseStreamer):
    """Hands on the tokens of an answer, without the prompt, the opening and the end marker.

    Args:
        inner: the caller's.
        tokenizer: to compare the first tokens with the opening.
        opening: words that a model begins its answers with, which are left out.
        stops: tokens that end the answer.
    """

    def __init__(
        self, inner: BaseStreamer, tokenizer: PreTrainedTokenizerBase, opening: str, stops: Sequence[int]
    ) -> None:
        self.inner, self.tokenizer, self.stops = inner, tokenizer, set(stops)
        self.opening = opening.strip()
        self.held: list[Tensor] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            if getattr(self.inner, "skip_prompt", False) and getattr(self.inner, "next_tokens_are_prompt", True):
                self.inner.put(value)  # it waits for a prompt to leave out
            return
        if int(value.reshape(-1)[0]) in self.stops:
            return
        self.held.append(value)
        text = self.tokenizer.decode([int(item) for part in self.held for item in part.reshape(-1)]).lstrip()
        if self.opening and text.rstrip() == self.opening:
            self.held, self.opening = [], ""
        elif not self.opening or not self.opening.startswith(text.rstrip()):
            self._flush()

    def _flush(self) -> None:
        for value in self.held:
            self.inner.put(value)
        self.held, self.opening = [], ""

    def end(self) -> None:
        self._flush()
        self.inner.end()
