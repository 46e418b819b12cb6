"""The interface of chat models: messages in, one text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ...json_object import JsonObject

ROLES = ("system", "user", "assistant")


class PromptTooLong(ValueError):
    """A prompt that leaves no room for the answer that was asked for."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: of `ROLES`.
        content: plain text; none of it becomes a marker of a chat template.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, got {self.role!r}.")

    def to_dict(self) -> dict[str, str]:
        """`role` and `content`."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that a chat model wrote.

    Attributes:
        text: without what ends it.
        cut: whether it ended for lack of tokens.
        prompt_tokens, new_tokens: as counted by the model; None where an endpoint does not say.
    """

    text: str
    cut: bool = False
    prompt_tokens: int | None = None
    new_tokens: int | None = None


class ChatModel(Protocol):
    """A model that answers messages.

    Attributes:
        name: by which traces know it.
        context_tokens: of prompt and answer together; None where nothing bounds them.
    """

    name: str
    context_tokens: int | None

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the whole prompt that these messages become, or an upper bound of them."""
        ...

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        *,
        schema: Mapping[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        """Write the next turn.

        Args:
            messages: at least one, the last of a user.
            max_new_tokens: of the answer.
            schema: JSON schema of the answer, for models that can be held to one. Others may ignore it: whoever asks
                checks the answer.
            temperature: 0: greedy, the same answer every time.
            seed: of sampling.

        Raises:
            PromptTooLong: where prompt and answer exceed `context_tokens`.
        """
        ...


def require_room(model: ChatModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Make sure that a prompt leaves room for an answer.

    Raises:
        PromptTooLong: with the numbers and the remedy.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if model.context_tokens is not None and prompt_tokens + max_new_tokens > model.context_tokens:
        raise PromptTooLong(
            f"The prompt has {prompt_tokens} tokens; with {max_new_tokens} of an answer that is more than the "
            f"{model.context_tokens} that {model.name} holds. Give it fewer or shorter texts, or a shorter answer."
        )


def messages_of(user: str, system: str | None = None) -> list[Message]:
    """A user's message, behind a system's where there is one."""
    return [*([Message("system", system)] if system else []), Message("user", user)]


def as_json(messages: Sequence[Message]) -> list[JsonObject]:
    """Messages as JSON values."""
    return [dict(message.to_dict()) for message in messages]
