"""Putting questions: the one way in which asking, chatting, training and evaluation make tokens of a question.

The checkpoint's protocol says how, if it has one; else the tokenizer's chat template; else a question is put as the
collator trains it, by its text and a line break. `prompting_of` chooses, all others call what it returns.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from ..model.tokenizing_msa import tokenize, tokenize_texts
from .protocol import PromptProtocol

SEPARATOR = "\n"
ROLES = ("system", "user", "assistant")
RECENT = 4  # messages before a question that choose documents with it: two exchanges
# Of the chat template: answers are trained, measured and shown, not thoughts before them.
TEMPLATE_OPTIONS: Mapping[str, object] = {"enable_thinking": False}
# Stands for a message's content while a template is filled in; private characters, which no template looks for.
PLACE = "\ue0ffcontent{}\ue0fe"
PLACES = re.compile(PLACE.format("([0-9]+)"))

Said = str | Sequence[Mapping[str, object]]  # a question, or the messages of a conversation that ends with one
Rounds = Sequence[Sequence[tuple[int, str]]]  # per round the (id, text) pairs that were read


class Prompt(NamedTuple):
    """The tokens that a model is given, and which of them choose documents."""

    input_ids: list[int]
    routes: list[bool]


class Prompting(Protocol):
    """A way of putting questions.

    Attributes:
        name: in words, for users.
        ends: token ids that end an answer, besides those of the model.
    """

    name: str

    @property
    def ends(self) -> tuple[int, ...]: ...

    def prompt(self, said: Said, rounds: Rounds = (), closed: bool = False) -> Prompt:
        """A question in tokens.

        Args:
            said: a question, or messages with `role` and `content`, the last of the user.
            rounds: texts that were read for it. A protocol puts them behind the question, others before it.
            closed: the answer follows; without it a protocol may still name documents.

        Raises:
            ValueError: for what is no question.
        """

    def answer_ids(self, answer: str) -> list[int]:
        """An answer behind a prompt as it is trained, with the token that ends it."""

    def routing_rows(self, questions: Sequence[str]) -> tuple[int, list[list[int]]]:
        """The tokens of many questions up to the last that routes, and how many of each stand before the first."""


def prompting_of(tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol | None = None) -> Prompting:
    """The way of putting questions: the protocol's, else the tokenizer's chat template, else the training prompt."""
    if protocol is not None:
        return ProtocolPrompting(tokenizer, protocol)
    return ChatPrompting(tokenizer) if getattr(tokenizer, "chat_template", None) else PlainPrompting(tokenizer)


def messages_of(said: Said) -> list[dict[str, str]]:
    """Messages with `role` and `content`; a question becomes one of the user's.

    Contents that are lists of parts, as clients of chat endpoints send them, are joined where all parts are text.

    Raises:
        ValueError: for an empty question, another role or type, and messages whose last is not the user's.
    """
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, Sequence) or isinstance(said, bytes) or not said:
        raise ValueError(f"A question is a text, or a list of messages with `role` and `content`; got {said!r:.80}.")
    found = []
    for place, message in enumerate(said):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"Message {place} must be a mapping with `role` and `content`, got {message!r:.80}.")
        role, content = message["role"], _text_of(place, message["content"])
        if role not in ROLES:
            raise ValueError(f"Message {place}: `role` must be one of {ROLES}, got {role!r:.80}.")
        found.append({"role": str(role), "content": content})
    if found[-1]["role"] != "user":
        raise ValueError(f"The last message must be the user's question, got one of {found[-1]['role']!r}.")
    if not found[-1]["content"].strip():
        raise ValueError("The question is empty; a question is a text that is not empty.")
    return found


def asked_of(questions: Said | Sequence[Said]) -> tuple[list[Said], bool]:
    """The questions, and whether it is one alone: a text or a list of messages is, a list of either is several.

    Raises:
        ValueError: for one of several that is neither, by its number.
    """
    if isinstance(questions, str) or (questions and all(isinstance(item, Mapping) for item in questions)):
        return [questions], True  # type: ignore[list-item]
    found: list[Said] = list(questions)  # type: ignore[arg-type]
    for number, said in enumerate(found):
        if not isinstance(said, str):
            try:
                messages_of(said)
            except ValueError as error:
                raise ValueError(f"Question {number}: {error}") from error
    return found, False


def _text_of(place: int, content: object) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        parts = [part for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        texts = [text for part in parts if isinstance(text := part.get("text"), str)]
        if len(texts) == len(content):
            return SEPARATOR.join(texts)
    if not isinstance(content, str):
        raise ValueError(f"Message {place}: `content` must be a text or parts of type 'text', got {content!r:.80}.")
    return content


def recent_text(said: Said) -> str:
    """A question as one text: behind the messages that choose documents with it, a line for each.

    For protocols, whose prompt has one place for a question.
    """
    messages = messages_of(said)
    if len(messages) == 1:
        return messages[0]["content"]
    return SEPARATOR.join(messages[place]["content"].strip() for place in recent_places(messages))


def recent_places(messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The places of the messages whose tokens choose documents: the question, and the last ones before it that are not
    the system's."""
    before = [place for place, item in enumerate(messages[:-1]) if item["role"] != "system"]
    return [*before[-RECENT:], len(messages) - 1]


class ProtocolPrompting:
    """Questions put by a checkpoint's protocol.

    Args:
        tokenizer: of the model.
        protocol: what the model was trained with.
    """

    name = "the checkpoint's protocol"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol) -> None:
        self.tokenizer, self.protocol = tokenizer, protocol

    @property
    def ends(self) -> tuple[int, ...]:
        found = self.protocol.encode(self.tokenizer, self.protocol.answer_end.replace("{", "{{").replace("}", "}}"))
        return (found[0],) if len(found) == 1 else ()

    def prompt(self, said: Said, rounds: Rounds = (), closed: bool = False) -> Prompt:
        """See `Prompting.prompt`."""
        segments = self.protocol.transcript(self.tokenizer, recent_text(said), rounds, closed=closed)
        return Prompt(*PromptProtocol.join(segments))

    def answer_ids(self, answer: str) -> list[int]:
        """See `Prompting.answer_ids`."""
        return list(self.protocol.answer_segment(self.tokenizer, answer).input_ids)

    def routing_rows(self, questions: Sequence[str]) -> tuple[int, list[list[int]]]:
        """See `Prompting.routing_rows`.

        Raises:
            ValueError: for a prompt whose routing pieces do not follow one another, or come behind the question.
        """
        pieces = self.protocol.prompt
        places = [place for place, (_, routes) in enumerate(pieces) if routes]
        first, last = places[0], places[-1] + 1
        if last - first != len(places) or "{question}" in "".join(text for text, _ in pieces[:first]):
            raise ValueError(
                "the protocol's prompt has pieces that do not route before one that does, which routers are not "
                "trained with here"
            )
        rows, skipped = [], 0
        for text in questions:
            segments = self.protocol.prompt_segments(self.tokenizer, text)
            skipped = sum(len(segment.input_ids) for segment in segments[:first])
            rows.append([token for segment in segments[:last] for token in segment.input_ids])
        return skipped, rows


class PlainPrompting:
    """Questions put as `QuestionCollator` trains them where there is no chat template: the text and a line break.

    In a conversation every message is a line.
    """

    name = "the training prompt (the question and a line break)"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        end = self.tokenizer.eos_token_id
        return () if end is None else (end,)

    def prompt(self, said: Said, rounds: Rounds = (), closed: bool = False) -> Prompt:
        """See `Prompting.prompt`."""
        messages = messages_of(said)
        contents = [item["content"] for item in messages]
        contents[-1] = _with_texts(contents[-1], rounds)
        routing, prompt = recent_places(messages), Prompt([], [])
        for place, ids in enumerate(tokenize_texts(self.tokenizer, [text + SEPARATOR for text in contents])):
            prompt.input_ids.extend(ids)
            prompt.routes.extend([place in routing] * len(ids))
        return prompt

    def answer_ids(self, answer: str) -> list[int]:
        """See `Prompting.answer_ids`."""
        return [*tokenize(self.tokenizer, answer), *self.ends]

    def routing_rows(self, questions: Sequence[str]) -> tuple[int, list[list[int]]]:
        """See `Prompting.routing_rows`."""
        return 0, tokenize_texts(self.tokenizer, [text + SEPARATOR for text in questions])


class ChatPrompting:
    """Questions put by the tokenizer's chat template.

    Contents are tokenized apart from the template's words, so that a question that spells a marker stays text. The
    question's tokens choose documents, with those of recent messages; the template's words do not.

    Args:
        tokenizer: with a chat template.
        options: further arguments of the template.
        name: of the model, for errors.
    """

    name = "the tokenizer's chat template"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, object] = TEMPLATE_OPTIONS,
        name: str = "the tokenizer",
    ) -> None:
        self.tokenizer, self.options, self._owner = tokenizer, dict(options), name

    def pieces(self, messages: Sequence[Mapping[str, str]], generate: bool = True) -> list[tuple[str, int | None]]:
        """The template's words, and in their places the numbers of the messages whose contents stand there.

        Args:
            messages: with `role`; contents are not looked at.
            generate: with the words that open an answer.

        Raises:
            ValueError: for a template that refuses these messages, or does not show them.
        """
        marked = [{"role": item["role"], "content": PLACE.format(place)} for place, item in enumerate(messages)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=generate, **self.options
            )
        except Exception as error:  # a template is a program of somebody else's
            raise ValueError(
                f"The chat template of {self._owner} refuses these messages ({error}); leave out what it does not "
                "know, or set another `tokenizer.chat_template` (None: questions are put plainly)."
            ) from error
        found: list[tuple[str, int | None]] = []
        for place, part in enumerate(PLACES.split(rendered)):
            found.append((part, None) if place % 2 == 0 else ("", int(part)))
        shown = {number for _, number in found}
        if missing := [place for place in range(len(messages)) if place not in shown]:
            raise ValueError(
                f"The chat template of {self._owner} does not show message {missing[0]} "
                f"({messages[missing[0]]['role']}) in its place; leave the message out, or give the tokenizer another "
                "`chat_template`."
            )
        return found

    def message_ids(self, messages: Sequence[Mapping[str, str]], routing: Collection[int] = ()) -> Prompt:
        """Messages in tokens, with the words that open an answer; those numbered in `routing` route."""
        prompt = Prompt([], [])
        space = ""
        for words, number in self.pieces(messages):
            if number is None:
                # A space before a word belongs to the word's token.
                kept = words.rstrip(" ")
                ids, space, routes = self._template_ids(space + kept), words[len(kept) :], False
            else:
                ids = tokenize(self.tokenizer, space + messages[number]["content"])
                space, routes = "", number in routing
            prompt.input_ids.extend(ids)
            prompt.routes.extend([routes] * len(ids))
        rest = self._template_ids(space)
        return Prompt(prompt.input_ids + rest, prompt.routes + [False] * len(rest))

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The first marker that the template writes behind an answer, else the end of a text."""
        asked = [{"role": "user"}, {"role": "assistant"}]
        try:
            words = self.pieces(asked, generate=False)[-1][0]
        except ValueError:
            words = ""
        added = self.tokenizer.added_tokens_decoder
        marker = next((token for token in self._template_ids(words) if token in added), self.tokenizer.eos_token_id)
        return () if marker is None else (marker,)

    def prompt(self, said: Said, rounds: Rounds = (), closed: bool = False) -> Prompt:
        """See `Prompting.prompt`."""
        messages = [{**item, "content": item["content"].strip()} for item in messages_of(said)]
        messages[-1]["content"] = _with_texts(messages[-1]["content"], rounds)
        return self.message_ids(messages, recent_places(messages))

    def answer_ids(self, answer: str) -> list[int]:
        """See `Prompting.answer_ids`."""
        return [*tokenize(self.tokenizer, answer), *self.ends]

    def routing_rows(self, questions: Sequence[str]) -> tuple[int, list[list[int]]]:
        """See `Prompting.routing_rows`."""
        head, space = self.head
        return len(head), [
            head + ids for ids in tokenize_texts(self.tokenizer, [space + text.strip() for text in questions])
        ]

    @functools.cached_property
    def head(self) -> tuple[list[int], str]:
        """The tokens before a question that is the first message, and the space that belongs to its first word."""
        words = self.pieces([{"role": "user"}])[0][0]
        kept = words.rstrip(" ")
        return self._template_ids(kept), words[len(kept) :]

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _with_texts(question: str, rounds: Rounds) -> str:
    """A question behind texts that were read for it."""
    return SEPARATOR.join([*(text for found in rounds for _, text in found), question])
