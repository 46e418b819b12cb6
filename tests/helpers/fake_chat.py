"""Chat models and banks for tests of what is built on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msa_hf.hybrid.chains import Reading, Source
from msa_hf.hybrid.chains.sources import Filters, passes
from msa_hf.hybrid.chat import Completion, Message, PromptTooLong

Reply = Callable[[str], str]


class FakeChat:
    """Answers by a function of the last message, or with listed texts one after the other; counts words as tokens.

    Attributes:
        asked: the messages of every call.
    """

    def __init__(
        self, reply: Reply | Sequence[str], name: str = "fake", context_tokens: int | None = None, cut: bool = False
    ) -> None:
        self.reply, self.name, self.context_tokens, self.cut = reply, name, context_tokens, cut
        self.asked: list[list[Message]] = []
        self.schemas: list[Mapping[str, Any] | None] = []

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message.content.split()) + 1 for message in messages)

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        *,
        schema: Mapping[str, Any] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        tokens = self.count_tokens(messages)
        if self.context_tokens is not None and tokens + max_new_tokens > self.context_tokens:
            raise PromptTooLong(f"{tokens} and {max_new_tokens} tokens are more than {self.context_tokens}")
        self.asked.append(list(messages))
        self.schemas.append(schema)
        if callable(self.reply):
            return Completion(self.reply(messages[-1].content), self.cut)
        return Completion(self.reply[len(self.asked) - 1], self.cut)


class FakeRetriever:
    """Finds the documents with most words of a query, the first two counting twice; ties go to the first."""

    name = "fake bank"

    def __init__(self, texts: Mapping[str, str], metadata: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.texts, self.metadata = texts, metadata or {}
        self.asked: list[tuple[str, str, int]] = []

    def retrieve(self, query: str, mode: str, k: int, filters: Filters) -> list[Source]:
        self.asked.append((query, mode, k))
        words = set(query.lower().replace("?", "").split())
        scored = [
            (
                -len(words & set(text.lower().replace(".", "").split())) - len(words & set(text.lower().split()[:2])),
                place,
                key,
            )
            for place, (key, text) in enumerate(self.texts.items())
            if passes(self.metadata.get(key), filters)
        ]
        best = [(key, -score, place) for score, place, key in sorted(scored)[:k] if score]
        return [
            Source(key, self.texts[key], float(score), place, place, self.metadata.get(key))
            for key, score, place in best
        ]


class FakeMemory:
    """Answers from a table of questions; reads the sources that it is given, or document "memory"."""

    name = "fake memory"

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def read(self, question: str, sources: Sequence[Source] | None, max_new_tokens: int) -> Reading:
        self.asked.append(question)
        found = tuple(sources) if sources is not None else (Source("memory", question),)
        return Reading(self.answers.get(question, "unknown"), found)
