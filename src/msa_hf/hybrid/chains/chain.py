"""Chains as data: steps, what each may retrieve, what it extracts, conditions, and loops with bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .template import JsonValue

MODES = ("router", "lexical", "dense", "hybrid")  # of `bank.search`
KINDS = ("text", "list", "json", "names")
TESTS = ("is", "equals", "differs", "contains", "in")
CHAT = "chat"  # the model that writes unless a step names another one
MEMORY = "memory"  # the memory model, which reads the bank
MOST_ROUNDS = 100
MOST_STEPS = 1000  # of a chain, those in loops as well
MOST_DONE = 100_000  # steps of a run, rounds multiplied
MOST_REPAIRS = 5
MOST_HITS = 1000


@dataclass(frozen=True)
class Retrieve:
    """Documents that a step gets, as `{sources}`.

    Attributes:
        query: template of what is searched for.
        mode: of `MODES`.
        k: documents at most.
        filters: field of the documents' metadata -> the value that it must have, or a list of values of which it must
            have one. Texts are templates. A document without the field does not pass.
        max_tokens: of all their texts in the prompt, as the step's model counts; sources that do not fit are left out,
            the worst first. None: no bound.
    """

    query: str = "{question}"
    mode: str = "hybrid"
    k: int = 4
    filters: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None


@dataclass(frozen=True)
class Extract:
    """The form of a step's value.

    Attributes:
        kind: `"text"`; `"list"`: a text per line, without bullets and numbers; `"json"`: a value of `schema`, by
            constrained decoding where the model can; `"names"`: the capitalized names in a text that do not stand in
            the question, in order, without a model.
        schema: of `"json"`: the subset of JSON Schema in `msa_hf.hybrid.chat.json_schema`.
        at_most: items of `"list"` and `"names"`; more are left out. None: all.
        repairs: times that an answer that is not the JSON asked for may be asked for again.
    """

    kind: str = "text"
    schema: Mapping[str, Any] | None = None
    at_most: int | None = None
    repairs: int = 1


@dataclass(frozen=True)
class Condition:
    """A test of one value.

    Attributes:
        field: `name`, or `name/field`.
        test: `"is"`: `value` is `"empty"` or `"filled"`; `"equals"`, `"differs"`: texts, without case and surplus
            white space; `"contains"`: so is part of the text, or of a list; `"in"`: is one of a list.
        value: what the test compares with.
    """

    field: str
    test: str
    value: JsonValue


@dataclass(frozen=True)
class Loop:
    """Steps that are done again and again, at most so many times.

    Attributes:
        steps: of a round.
        at_most: rounds; 1 to 100. There is no loop without a bound.
        over: the field of a list: a round per item, which is `{item}`. Items beyond `at_most` are left out, which the
            trace says.
        start: name -> template of its value in the first round.
        next: the same names -> template of their values in the round after; of the steps of the round.
        until: ends the loop behind a round for which it holds.
        result: template of what a round yields. The loop's value is an object of two fields, `last` and `all`, a list.
    """

    steps: tuple[Step, ...]
    at_most: int
    over: str | None = None
    start: Mapping[str, str] = field(default_factory=dict)
    next: Mapping[str, str] = field(default_factory=dict)
    until: Condition | None = None
    result: str = ""


@dataclass(frozen=True)
class Step:
    """A step of a chain. Its value is `{name}` in templates of others.

    Attributes:
        name: letters, digits and underscores; of this step alone.
        prompt: template over the question, values of other steps and `{sources}`. Default: `{sources}` where nobody
            writes, else needed.
        retrieve: what it gets from the bank; None: nothing.
        model: who writes: `"memory"`, a chat model by the name that the runner knows it by, or None: nobody, and the
            filled-in prompt is the output.
        system: template of a system message, for chat models.
        extract: what is made of the output.
        max_new_tokens: of the output.
        temperature: of a chat model; 0: greedy.
        seed: of sampling.
        when: the step is skipped where this does not hold; its value is then None, which templates show as nothing.
        loop: rounds of other steps in place of a prompt.
    """

    name: str
    prompt: str | None = None
    retrieve: Retrieve | None = None
    model: str | None = CHAT
    system: str | None = None
    extract: Extract = Extract()
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    when: Condition | None = None
    loop: Loop | None = None

    @property
    def template(self) -> str:
        """The prompt, or what stands for it."""
        return "{sources}" if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Chain:
    """A chain of steps. They run in an order in which each finds the values that it asks for; where that leaves a
    choice, as they are listed.

    Attributes:
        name: for traces.
        steps: at least one.
        answer: template of the answer. Default: the value of the step that is listed last.
    """

    name: str
    steps: tuple[Step, ...]
    answer: str | None = None

    @property
    def answer_template(self) -> str:
        """`answer`, or its default."""
        return f"{{{self.steps[-1].name}}}" if self.answer is None else self.answer
