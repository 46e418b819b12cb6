"""`SessionContext`: what of a session stands in the prompt of a question."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..chat.chat_model import Message
from .conversation import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LEFT_OUT = "(Earlier turns are left out.)"  # said by the user where an assistant's turn would be the first message


@dataclass(frozen=True, slots=True)
class RememberedTurn:
    """An older turn, or a part of it, that a search found.

    Attributes:
        number, role: of the turn.
        text: of the part.
        rank: from 1, in what the search found.
        score: as of `Hit`.
    """

    number: int
    role: str
    text: str
    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class SessionContext:
    """Everything that a model is told with a question.

    Attributes:
        question: of the user.
        pins: pinned texts by name, verbatim.
        state: values by name, verbatim.
        recent: the last turns, verbatim, in order.
        remembered: what the bank has for the question, in the order of turns.
        missing: numbers of turns that are neither among `recent` nor in the bank yet.
        tokens: of the whole prompt, as they were counted.
    """

    question: str
    pins: Mapping[str, str]
    state: Mapping[str, object]
    recent: Sequence[Turn]
    remembered: Sequence[RememberedTurn] = ()
    missing: Sequence[int] = ()
    tokens: int = 0

    def messages(self) -> list[Message]:
        """The prompt as messages: pinned texts and state as the system's, the recent turns, then the question.

        What was remembered stands in the message of the question, not in the system's: users wrote it. Roles alternate,
        as many chat templates ask for: what one says in several turns is one message.
        """
        messages: list[Message] = []
        said = [(turn.role, turn.text or "") for turn in self.recent]
        if self.recent and self.recent[0].role == "assistant" and self.recent[0].number > 1:
            said.insert(0, ("user", LEFT_OUT))
        head = self._head()
        for role, text in [*([("system", head)] if head else []), *said, ("user", self._remembered() + self.question)]:
            if messages and messages[-1].role == role:
                text = f"{messages.pop().content}\n\n{text}"
            messages.append(Message(role, text))
        return messages

    def text(self) -> str:
        """The prompt as plain text, ending with the question: for Memory Interleave, and models without a template."""
        parts = [self._head(), "\n".join(f"{turn.role}: {turn.text}" for turn in self.recent)]
        return "\n\n".join([part for part in parts if part] + [self._remembered() + self.question])

    def _head(self) -> str:
        parts = []
        if self.pins:
            parts.append("Facts:\n" + "\n".join(f"{name}: {text}" for name, text in self.pins.items()))
        if self.state:
            lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in self.state.items())
            parts.append("State:\n" + "\n".join(lines))
        return "\n\n".join(parts)

    def _remembered(self) -> str:
        if not self.remembered:
            return ""
        lines = (f"[turn {item.number}, {item.role}] {item.text}" for item in self.remembered)
        return "From earlier turns:\n" + "\n".join(lines) + "\n\n"


TokenCounter = Callable[[SessionContext], int]


def count_tokens(tokenizer: PreTrainedTokenizerBase) -> TokenCounter:
    """A counter of the tokens of a prompt: of its messages by the tokenizer's chat template, else of its plain text."""

    def count(context: SessionContext) -> int:
        if tokenizer.chat_template is None:
            return len(tokenizer(context.text())["input_ids"])
        messages = [message.to_dict() for message in context.messages()]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count
