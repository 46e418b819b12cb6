"""Checking a chain before anything runs: every mistake that can be seen in the data is an error here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..chat.json_schema import SchemaError, check_schema
from .chain import (
    KINDS,
    MEMORY,
    MODES,
    MOST_DONE,
    MOST_HITS,
    MOST_REPAIRS,
    MOST_ROUNDS,
    MOST_STEPS,
    TESTS,
    Chain,
    Condition,
    Extract,
    Loop,
    Retrieve,
    Step,
)
from .errors import ChainError
from .template import NAME, Field, fields_of, parse_field

QUESTION, SOURCES, ITEM = "question", "sources", "item"
RESERVED = (QUESTION, SOURCES, ITEM)
LOOP_FIELDS = ("last", "all")
MOST_TOKENS = 1_000_000
DEEPEST = 4  # loops within loops

Fields = Mapping[str, tuple[str, ...] | None]  # name -> the fields of its value; None: it has none


def check_chain(chain: Chain) -> None:
    """Make sure that a chain can run.

    Raises:
        ChainError: naming the place, the cause and the remedy: a step that does not exist, a cycle, a field that no
            value has, an unknown mode, a loop without a bound, a name that stands twice, ...
    """
    if not isinstance(chain.name, str) or not chain.name.strip():
        raise ChainError(f"`name` must be a text that is not empty, got {chain.name!r}")
    if not chain.steps:
        raise ChainError(f"chain {chain.name!r}: `steps` is empty; a chain has at least one")
    names: set[str] = set()
    for number, step in enumerate(_all_steps(chain.steps)):
        if number == MOST_STEPS:
            raise ChainError(f"chain {chain.name!r}: it has more than {MOST_STEPS} steps; put what repeats in a loop")
        _check_name(step.name, names, "step")
    known: Fields = {QUESTION: None}
    fields = _check_steps(chain.steps, known, depth=0)
    _check_fields("answer", fields_of(chain.answer_template, "answer"), fields, chain.steps)
    if (most := _most_done(chain.steps)) > MOST_DONE:
        raise ChainError(
            f"chain {chain.name!r}: its loops within loops allow {most} steps, more than {MOST_DONE}; lower an "
            "`at_most`"
        )


def _most_done(steps: Sequence[Step]) -> int:
    """Steps of a run at most."""
    return sum(1 if step.loop is None else 1 + step.loop.at_most * _most_done(step.loop.steps) for step in steps)


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Steps in an order in which each comes behind those whose values it asks for.

    Raises:
        ChainError: for a cycle, naming its steps.
    """
    waits = {step.name: _asked_steps(step, steps) for step in steps}
    ordered: list[Step] = []
    done: set[str] = set()
    left = list(steps)
    while left:
        ready = next((step for step in left if waits[step.name] <= done), None)
        if ready is None:
            raise ChainError(
                f"steps wait for each other: {_cycle(waits, left)}. Each may ask only for values of steps that do not "
                "need its own; what goes round belongs into a loop with `at_most`"
            )
        ordered.append(ready)
        done.add(ready.name)
        left.remove(ready)
    return ordered


def _cycle(waits: Mapping[str, set[str]], left: Sequence[Step]) -> str:
    names = {step.name for step in left}
    path = [left[0].name]
    while path.count(path[-1]) == 1:
        path.append(min(waits[path[-1]] & names))
    return " -> ".join(path[path.index(path[-1]) :])


def _all_steps(steps: Sequence[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        if step.loop is not None:
            yield from _all_steps(step.loop.steps)


def _check_name(name: object, names: set[str], kind: str) -> None:
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ChainError(f"{kind} {name!r}: a name has letters, digits and underscores, and begins with no digit")
    if name in RESERVED:
        raise ChainError(f"{kind} {name!r}: this name is taken; {', '.join(RESERVED)} mean something else")
    if name in names:
        raise ChainError(f"{kind} {name!r}: there are two of this name; each has its own")
    names.add(name)


# Which values are asked for ------------------------------------------------------------------------------------------


def _condition_fields(condition: Condition | None, place: str) -> list[Field]:
    return [] if condition is None else [parse_field(condition.field, place)]


def _own_fields(step: Step) -> list[tuple[str, Field]]:
    """The fields that a step itself asks for, each with the place."""
    found: list[tuple[str, Field]] = []

    def add(place: str, template: str | None) -> None:
        if template is not None:
            found.extend((place, item) for item in fields_of(template, place))

    place = f"step {step.name!r}"
    found += [(f"{place}, when", item) for item in _condition_fields(step.when, f"{place}, when")]
    if step.loop is not None:
        if step.loop.over is not None:
            found.append((f"{place}, over", parse_field(step.loop.over, f"{place}, over")))
        for name, template in step.loop.start.items():
            add(f"{place}, start {name!r}", template)
        return found
    add(f"{place}, prompt", step.template)
    add(f"{place}, system", step.system)
    if step.retrieve is not None:
        add(f"{place}, retrieve, query", step.retrieve.query)
        for name, value in step.retrieve.filters.items():
            for item in value if isinstance(value, list | tuple) else [value]:
                add(f"{place}, retrieve, filters {name!r}", item if isinstance(item, str) else None)
    return found


def _loop_fields(name: str, loop: Loop) -> list[tuple[str, Field]]:
    """The fields that a loop asks for behind its rounds."""
    place = f"step {name!r}"
    found = [(f"{place}, until", item) for item in _condition_fields(loop.until, f"{place}, until")]
    found += [(f"{place}, result", item) for item in fields_of(loop.result, f"{place}, result")]
    for key, template in loop.next.items():
        found += [(f"{place}, next {key!r}", item) for item in fields_of(template, f"{place}, next {key!r}")]
    return found


def _asked_steps(step: Step, siblings: Sequence[Step]) -> set[str]:
    """The steps beside this one whose values it, or a step in its loop, asks for."""
    names = {item.name for item in siblings}
    asked = {item.name for _, item in _own_fields(step)}
    if step.loop is not None:
        asked |= {item.name for _, item in _loop_fields(step.name, step.loop)}
        for inner in step.loop.steps:
            asked |= {item.name for _, item in _own_fields(inner)}
            if inner.loop is not None:
                asked |= _asked_steps(inner, siblings)
    return asked & names


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_steps(steps: Sequence[Step], known: Fields, depth: int) -> dict[str, tuple[str, ...] | None]:
    """Check steps that run together; returns what is known behind them."""
    siblings = {step.name: _value_fields(step) for step in steps}
    every = {**known, **siblings}
    for step in steps:
        _check_step(step)
        for place, item in _own_fields(step):
            allowed = {**every, SOURCES: None} if step.retrieve is not None and place.endswith("prompt") else every
            if item.name == SOURCES and SOURCES not in allowed:
                raise ChainError(
                    f"{place}: {{sources}} are what this step retrieves, but it has no `retrieve`"
                    if place.endswith("prompt")
                    else f"{place}: {{sources}} can stand in a prompt alone"
                )
            _check_fields(place, [item], allowed, steps)
        if step.loop is not None:
            _check_loop(step, step.loop, every, depth)
    in_order(steps)
    return every


def _value_fields(step: Step) -> tuple[str, ...] | None:
    if step.loop is not None:
        return LOOP_FIELDS
    schema = step.extract.schema if step.extract.kind == "json" else None
    if isinstance(schema, Mapping) and isinstance(schema.get("properties"), Mapping):
        return tuple(str(name) for name in schema["properties"])
    return None


def _check_fields(place: str, asked: Sequence[Field], known: Fields, steps: Sequence[Step]) -> None:
    for item in asked:
        if item.name not in known:
            inner = {step.name for step in _all_steps(steps)} - {step.name for step in steps}
            if item.name in inner:
                raise ChainError(
                    f"{place}: step {item.name!r} stands in a loop; outside of it ask for the loop's own value"
                )
            raise ChainError(f"{place}: there is no step or value {item.name!r}; there are {', '.join(sorted(known))}")
        fields = known[item.name]
        if item.key and fields is None:
            raise ChainError(f"{place}: {{{item}}} asks for a field, but the value of {item.name!r} is no object")
        if item.key and fields is not None and item.key not in fields:
            raise ChainError(f"{place}: {item.name!r} has no field {item.key!r}; it has {', '.join(fields)}")


def _check_step(step: Step) -> None:
    place = f"step {step.name!r}"
    for name, text in (("prompt", step.prompt), ("system", step.system)):
        if text is not None and not isinstance(text, str):
            raise ChainError(f"{place}: `{name}` must be a text, got {text!r}")
    if step.loop is not None:
        others = [
            name
            for name, given in (
                ("prompt", step.prompt is not None),
                ("retrieve", step.retrieve is not None),
                ("system", step.system is not None),
            )
            if given
        ]
        if others:
            raise ChainError(f"{place}: a loop has no `{others[0]}` of its own; its steps have")
    elif step.prompt is None and (step.model is not None or step.retrieve is None):
        raise ChainError(
            f"{place}: it has no `prompt`. Give it one, or `loop`; a step that only retrieves has `model: null`"
        )
    if step.model is not None and not (isinstance(step.model, str) and step.model.strip()):
        raise ChainError(f"{place}: `model` is a name, 'memory', or null for none, got {step.model!r}")
    if step.system is not None and step.model in (None, MEMORY):
        raise ChainError(f"{place}: `system` is for chat models; the memory model has its own prompt")
    _check_count(place, "max_new_tokens", step.max_new_tokens, MOST_TOKENS)
    if type(step.seed) is not int or step.seed < 0:
        raise ChainError(f"{place}: `seed` must be an integer of at least 0, got {step.seed!r}")
    warm = step.temperature
    if isinstance(warm, bool) or not isinstance(warm, int | float) or not 0 <= warm <= 10 or math.isnan(warm):
        raise ChainError(f"{place}: `temperature` must be a number from 0 to 10, got {warm!r}")
    if warm > 0 and step.model in (None, MEMORY):
        raise ChainError(f"{place}: `temperature` is for chat models; the memory model answers greedily")
    if step.when is not None:
        _check_condition(f"{place}, when", step.when)
    if step.retrieve is not None:
        _check_retrieve(f"{place}, retrieve", step.retrieve)
        if step.retrieve.max_tokens is not None and step.model in (None, MEMORY):
            raise ChainError(
                f"{place}, retrieve: `max_tokens` is counted by a chat model, which this step does not ask"
            )
    _check_extract(f"{place}, extract", step)


def _check_count(place: str, name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ChainError(f"{place}: `{name}` must be an integer from 1 to {most}, got {value!r}")


def _check_retrieve(place: str, retrieve: Retrieve) -> None:
    if retrieve.mode not in MODES:
        raise ChainError(f"{place}: `mode` must be one of {', '.join(MODES)}, got {retrieve.mode!r}")
    _check_count(place, "k", retrieve.k, MOST_HITS)
    if retrieve.max_tokens is not None:
        _check_count(place, "max_tokens", retrieve.max_tokens, MOST_TOKENS)
    if not isinstance(retrieve.query, str) or not retrieve.query.strip():
        raise ChainError(f"{place}: `query` must be a template that is not empty, got {retrieve.query!r}")
    if not isinstance(retrieve.filters, Mapping):
        raise ChainError(f"{place}: `filters` is a mapping of metadata fields to values, got {retrieve.filters!r}")
    for name, value in retrieve.filters.items():
        values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        if not isinstance(name, str) or not values or not all(_is_plain(item) for item in values):
            raise ChainError(
                f"{place}: `filters` {name!r} must be a text, a number, true or false, or a list of these that is not "
                f"empty, got {value!r}"
            )


def _is_plain(value: object) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _check_extract(place: str, step: Step) -> None:
    extract: Extract = step.extract
    if extract.kind not in KINDS:
        raise ChainError(f"{place}: must be one of {', '.join(KINDS)}, got {extract.kind!r}")
    if (extract.kind == "json") != (extract.schema is not None):
        raise ChainError(f"{place}: `schema` belongs to json, which needs one")
    if extract.kind == "json":
        if step.model in (None, MEMORY):
            raise ChainError(f"{place}: JSON is written by a chat model; `model` is {step.model!r}")
        try:
            check_schema(extract.schema, f"{place}, schema")
        except SchemaError as error:
            raise ChainError(str(error)) from error
        for name in (extract.schema or {}).get("properties", {}):
            if NAME.fullmatch(name) is None:
                raise ChainError(f"{place}, schema: {name!r}: names here have letters, digits and underscores")
    if extract.at_most is not None:
        if extract.kind not in ("list", "names"):
            raise ChainError(f"{place}: `at_most` belongs to list and names; bound JSON by its schema")
        _check_count(place, "at_most", extract.at_most, MOST_HITS)
    if type(extract.repairs) is not int or not 0 <= extract.repairs <= MOST_REPAIRS:
        raise ChainError(f"{place}: `repairs` must be an integer from 0 to {MOST_REPAIRS}, got {extract.repairs!r}")


def _check_condition(place: str, condition: Condition) -> None:
    if condition.test not in TESTS:
        raise ChainError(f"{place}: the test must be one of {', '.join(TESTS)}, got {condition.test!r}")
    if condition.test == "is" and condition.value not in ("empty", "filled"):
        raise ChainError(f"{place}: a value is 'empty' or 'filled', not {condition.value!r}")
    if condition.test == "in" and not (isinstance(condition.value, list) and condition.value):
        raise ChainError(f"{place}: `in` needs a list of values, got {condition.value!r}")
    if condition.test in ("equals", "differs", "contains") and not _is_plain(condition.value):
        raise ChainError(f"{place}: `{condition.test}` needs a text or number, got {condition.value!r}")


def _check_loop(step: Step, loop: Loop, known: Fields, depth: int) -> None:
    place = f"step {step.name!r}"
    if depth + 1 > DEEPEST:
        raise ChainError(f"{place}: loops within loops, more than {DEEPEST} of them")
    if type(loop.at_most) is not int or not 1 <= loop.at_most <= MOST_ROUNDS:
        raise ChainError(
            f"{place}: a loop needs a bound: `at_most` must be an integer from 1 to {MOST_ROUNDS}, got {loop.at_most!r}"
        )
    if not loop.steps:
        raise ChainError(f"{place}: its loop has no steps")
    names = {inner.name for inner in _all_steps(loop.steps)}
    for name in loop.start:
        _check_name(name, names, f"{place}, start")
        if name in known:
            raise ChainError(f"{place}, start: {name!r} is a step or value outside of the loop; name it otherwise")
    if loop.over is None and loop.until is None and not loop.start and loop.at_most > 1:
        raise ChainError(
            f"{place}: every round of this loop would be the same. Give it `over`, `until`, or `start` and `next`"
        )
    if set(loop.next) != set(loop.start):
        wrong = sorted(set(loop.next) ^ set(loop.start))[0]
        raise ChainError(f"{place}: `start` and `next` give values to the same names; {wrong!r} stands in one of them")
    inside: dict[str, tuple[str, ...] | None] = {name: item for name, item in known.items() if name != step.name}
    inside |= {name: None for name in loop.start}
    if loop.over is not None:
        inside[ITEM] = None
    behind = _check_steps(loop.steps, inside, depth + 1)
    if loop.until is not None:
        _check_condition(f"{place}, until", loop.until)
    for where, item in _loop_fields(step.name, loop):
        _check_fields(where, [item], behind, loop.steps)
