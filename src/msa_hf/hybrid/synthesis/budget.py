"""Budgets of tokens: how much fits into a prompt, and how much a synthesis may cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..chat.chat_model import ChatModel, Completion, Message

Item = TypeVar("Item")
CUT = " [...]"  # what stands for words that were left out


class BudgetError(ValueError):
    """A budget that is too small for what is to be done."""


@dataclass(frozen=True)
class Budget:
    """Bounds of what is asked of a chat model, in its own tokens.

    Attributes:
        prompt_tokens: of a prompt.
        answer_tokens: of an answer.
        total_tokens: of all prompts and answers of a run together; None: no bound.
        calls: of the model in a run.
    """

    prompt_tokens: int = 2048
    answer_tokens: int = 256
    total_tokens: int | None = None
    calls: int = 64

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "answer_tokens", "total_tokens", "calls"):
            value = getattr(self, name)
            if not (value is None and name == "total_tokens") and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


@dataclass
class Spending:
    """A chat model within a budget.

    Attributes:
        calls: that were made.
        tokens: of prompts and answers, as bounded before each call: the whole room of the answer counts.
    """

    chat: ChatModel
    budget: Budget
    calls: int = 0
    tokens: int = 0
    longest: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        room, wanted = self.chat.context_tokens, self.budget.prompt_tokens + self.budget.answer_tokens
        if room is not None and wanted > room:
            raise BudgetError(
                f"A prompt of {self.budget.prompt_tokens} and an answer of {self.budget.answer_tokens} tokens are more "
                f"than the {room} that {self.chat.name} holds; lower `prompt_tokens` or `answer_tokens`."
            )

    def fits(self, messages: Sequence[Message]) -> bool:
        """Tell whether a prompt is within the budget."""
        return self.chat.count_tokens(messages) <= self.budget.prompt_tokens

    def complete(self, messages: Sequence[Message], schema: Mapping[str, Any] | None = None) -> Completion:
        """Ask the model, greedily.

        Raises:
            BudgetError: before the call that would exceed the budget.
        """
        tokens = self.chat.count_tokens(messages)
        if tokens > self.budget.prompt_tokens:
            raise BudgetError(f"A prompt has {tokens} tokens, more than `prompt_tokens={self.budget.prompt_tokens}`.")
        if self.calls == self.budget.calls:
            raise BudgetError(f"This takes more than `calls={self.budget.calls}` of {self.chat.name}; raise it.")
        after = self.tokens + tokens + self.budget.answer_tokens
        if self.budget.total_tokens is not None and after > self.budget.total_tokens:
            raise BudgetError(
                f"The next call would make {after} tokens in all, more than `total_tokens={self.budget.total_tokens}`; "
                f"{self.calls} calls were made."
            )
        self.calls, self.tokens, self.longest = self.calls + 1, after, max(self.longest, tokens)
        return self.chat.complete(messages, self.budget.answer_tokens, schema=schema)


def pack(items: Sequence[Item], fits: Callable[[Sequence[Item]], bool]) -> list[list[Item]]:
    """Items in runs that fit, in order, each as long as it can be.

    Raises:
        BudgetError: where an item does not fit alone.
    """
    runs: list[list[Item]] = []
    for item in items:
        if runs and fits([*runs[-1], item]):
            runs[-1].append(item)
        elif fits([item]):
            runs.append([item])
        else:
            raise BudgetError(f"It does not fit into a prompt by itself; raise `prompt_tokens`: {str(item)[:200]}")
    return runs


def shorten(text: str, fits: Callable[[str], bool]) -> str | None:
    """A text cut behind a word so that it fits, with `[...]` for the rest; the text itself where that fits, None where
    nothing does."""
    if fits(text):
        return text
    words = text.split(" ")
    least, most = -1, len(words) - 1  # so many words fit; so many were not tried or do not
    while least < most:
        middle = (least + most + 1) // 2
        if fits(" ".join(words[:middle]) + CUT):
            least = middle
        else:
            most = middle - 1
    return None if least < 0 else (" ".join(words[:least]) + CUT).strip()
