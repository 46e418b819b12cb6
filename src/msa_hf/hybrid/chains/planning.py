"""Planning: a question of several hops, split into a chain of questions of one hop, by rules or by a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat.chat_model import ChatModel, messages_of
from ..chat.json_schema import AnswerError, read_json
from .chain import MEMORY, Chain, Retrieve, Step
from .checking import check_chain
from .errors import ChainError
from .template import literal, render

MOST_HOPS = 8
_CAPITAL = r"(?:[^\W\d_a-z][\w'\u2019-]*)"
# A name as descriptions have it: capitalized words behind "the" or nothing, or what an earlier hop found.
NAME = rf"(?:(?:the )?{_CAPITAL}(?: (?:of |the |and |de )?{_CAPITAL})*|\u27e8\d+\u27e9)"
# What asks for nothing but what was found.
_IDENTITY = re.compile(r"(?:who|what|which [a-z ]+) (?:is|are|was|were) \u27e8\d+\u27e9\s*\??", re.IGNORECASE)
_NOUN = r"[a-z][a-z-]*(?: [a-z][a-z-]*){0,2}"


@dataclass(frozen=True)
class Rule:
    """A description of something by its relation to something named, and the question that finds it.

    Attributes:
        description: such as `"the teacher of {n}"`; `{n}` is a name, `{x}` one to three words without capitals.
        question: such as `"Who taught {n}?"`, of the same fields.
    """

    description: str
    question: str

    def __post_init__(self) -> None:
        for text in (self.description, self.question):
            if "{n}" not in text:
                raise ValueError(f"A rule needs {{n}} in its description and in its question, got {text!r}.")
        if "{x}" in self.question and "{x}" not in self.description:
            raise ValueError(f"The rule's question asks for {{x}}, which {self.description!r} does not have.")

    def pattern(self) -> re.Pattern[str]:
        """A pattern of the description, inside of a longer text."""
        text = re.escape(self.description)
        text = text.replace(r"\{n\}", f"(?P<n>{NAME})", 1).replace(r"\{x\}", f"(?P<x>{_NOUN})", 1)
        return re.compile(rf"(?<!\w){text}(?!\w)")


# For English; more and better ones come with a collection's own way of asking.
RULES = (
    Rule("the person who {x} {n}", "Who {x} {n}?"),
    Rule("the place where {n} was {x}", "Where was {n} {x}?"),
    Rule("the {x} of {n}", "What is the {x} of {n}?"),
)


def plan_by_rules(
    question: str,
    rules: Sequence[Rule] = RULES,
    *,
    model: str | None = MEMORY,
    retrieve: Retrieve | None = None,
    prompt: str = "{question}",
    max_new_tokens: int = 32,
) -> Chain:
    """A chain that answers descriptions from the inside out: "Where was the teacher of the maker of X born?" asks for
    the maker of X, then for that one's teacher, then where that one was born.

    The longest description that fits is taken first, of equally long ones the one that stands first in the question,
    then the one of the first rule. A question that no rule fits is a chain of one step. If all that is left is to ask
    who or what the thing found is, that is not asked.

    Args:
        question: as it was asked.
        rules: of descriptions.
        model, retrieve, max_new_tokens: of every step; `{question}` in the query of `retrieve` is the step's question.
        prompt: of every step, of `{question}`, which is the step's question, and `{sources}`.

    Raises:
        ChainError: where the question needs more than 8 hops.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"`question` must be a text that is not empty, got {question!r}.")
    patterns = [(rule, rule.pattern()) for rule in rules]
    asked: list[str] = []
    left = question.replace("\u27e8", "(").replace("\u27e9", ")")
    while True:
        found = [(match, rule) for rule, pattern in patterns for match in pattern.finditer(left)]
        if not found:
            break
        if len(asked) == MOST_HOPS:
            raise ChainError(f"{question!r} needs more than {MOST_HOPS} hops")
        match, rule = min(found, key=lambda pair: (-len(pair[0][0]), pair[0].start()))
        groups = match.groupdict()
        inner = rule.question.replace("{x}", groups.get("x") or "").replace("{n}", groups["n"])
        left = f"{left[: match.start()]}\u27e8{len(asked) + 1}\u27e9{left[match.end() :]}"
        asked.append(inner)
    if not asked or not _IDENTITY.fullmatch(left.strip()):
        asked.append(left)
    if len(asked) > MOST_HOPS:
        raise ChainError(f"{question!r} needs more than {MOST_HOPS} hops")
    return _chain_of("planned by rules", asked, model, retrieve, prompt, max_new_tokens)


PLAN_SCHEMA: Mapping[str, Any] = {
    "type": "array",
    "items": {"type": "string", "minLength": 1, "maxLength": 300},
    "minItems": 1,
    "maxItems": MOST_HOPS,
}
PLAN_PROMPT = """Split the question into simple questions that are answered one after the other. \
Each asks for one fact. Write #1 where the answer to the first question belongs, #2 for that of the second, and so on. \
The last one answers the question. A question that asks for one fact stays as it is. Answer with a JSON list of texts.

Question: Where was the teacher of Ada Byron born?
["Who was the teacher of Ada Byron?", "Where was #1 born?"]

Question: {question}"""


def plan_by_model(
    question: str,
    chat: ChatModel,
    *,
    model: str | None = MEMORY,
    retrieve: Retrieve | None = None,
    prompt: str = "{question}",
    max_new_tokens: int = 32,
    plan_tokens: int = 256,
    repairs: int = 1,
) -> Chain:
    """A chain of the questions that a chat model splits a question into.

    Args:
        question: as it was asked.
        chat: that plans.
        model, retrieve, prompt, max_new_tokens: as of `plan_by_rules`.
        plan_tokens: of the plan.
        repairs: times that the model may be asked again.

    Raises:
        ChainError: for a plan that is none, showing it.
    """
    messages = messages_of(render(PLAN_PROMPT, {"question": question}, "plan"))
    for attempt in range(repairs + 1):
        written = chat.complete(messages, plan_tokens, schema=PLAN_SCHEMA)
        try:
            asked: list[str] = read_json(written.text, PLAN_SCHEMA)
            return _chain_of(
                "planned by a model",
                [_places(asked, number) for number in range(len(asked))],
                model,
                retrieve,
                prompt,
                max_new_tokens,
            )
        except (AnswerError, ChainError) as error:
            if attempt == repairs:
                raise ChainError(f"{chat.name} made no plan: {error}; it wrote {written.text[:400]!r}") from error
    raise AssertionError("unreachable")


def _places(asked: Sequence[str], number: int) -> str:
    """A question of a plan with the places of earlier answers as rules write them.

    Raises:
        ChainError: for the place of an answer that does not come before it.
    """

    def place(found: re.Match[str]) -> str:
        if not 1 <= int(found[1]) <= number:
            raise ChainError(f"question {number + 1} of the plan asks for {found[0]}, which does not come before it")
        return f"\u27e8{found[1]}\u27e9"

    return re.sub(r"#(\d{1,3})\b", place, asked[number].replace("\u27e8", "(").replace("\u27e9", ")"))


def _chain_of(
    name: str, asked: Sequence[str], model: str | None, retrieve: Retrieve | None, prompt: str, max_new_tokens: int
) -> Chain:
    """A chain of one step per question; ⟨i⟩ stands for the answer of the i-th."""
    steps = []
    for number, text in enumerate(asked, 1):
        template = re.sub("\u27e8(\\d+)\u27e9", r"{hop\1}", literal(text))
        query = None if retrieve is None else retrieve.query.replace("{question}", template)
        steps.append(
            Step(
                f"hop{number}",
                prompt=prompt.replace("{question}", template),
                model=model,
                retrieve=None
                if retrieve is None
                else Retrieve(query or template, retrieve.mode, retrieve.k, retrieve.filters, retrieve.max_tokens),
                max_new_tokens=max_new_tokens,
            )
        )
    chain = Chain(name, tuple(steps))
    check_chain(chain)
    return chain
