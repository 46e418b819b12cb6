"""Chains in YAML and as plain data, read and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...json_object import JsonObject
from .chain import CHAT, KINDS, TESTS, Chain, Condition, Extract, Loop, Retrieve, Step
from .checking import check_chain
from .errors import ChainError

LARGEST_FILE = 2**20  # bytes


class _Loader(yaml.SafeLoader):
    """Plain data alone: no tags, no aliases (of which a short file makes a huge value), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not read; write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key!r} stands twice in one mapping")
        return super().construct_mapping(node, deep)


def load_chain(path: str | Path) -> Chain:
    """A chain from a YAML file, checked.

    Raises:
        OSError: where the file cannot be read.
        ChainError: naming the file, the place in it, the cause and the remedy.
    """
    path = Path(path)
    raw = path.read_bytes()
    if len(raw) > LARGEST_FILE:
        raise ChainError(f"{path}: more than {LARGEST_FILE} bytes; is it a chain?")
    try:
        data = yaml.load(raw.decode("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ChainError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return chain_from_dict(data)
    except ChainError as error:
        raise ChainError(f"{path}: {error}") from error


def chain_from_dict(data: object) -> Chain:
    """A chain from plain data, as YAML or JSON give it, checked.

    Raises:
        ChainError: naming the place, the cause and the remedy.
    """
    given = _mapping(data, "chain", {"name", "steps", "answer"}, {"name", "steps"})
    chain = Chain(_text(given["name"], "name"), _steps(given["steps"], "steps"), _optional(given, "answer", "answer"))
    check_chain(chain)
    digest_of(chain)  # a value that no trace could tell is one of YAML alone
    return chain


def chain_to_dict(chain: Chain) -> JsonObject:
    """A chain as plain data, without what has its default: the inverse of `chain_from_dict`."""
    record: JsonObject = {"name": chain.name, "steps": [_step_data(step) for step in chain.steps]}
    return record if chain.answer is None else {**record, "answer": chain.answer}


def digest_of(chain: Chain) -> str:
    """SHA-256 of a chain's data: equal for chains that do the same.

    Raises:
        ChainError: for a value that is no JSON, such as a date, or infinite.
    """
    try:
        text = json.dumps(chain_to_dict(chain), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChainError(f"chain {chain.name!r}: a value in it is no JSON ({error}); quote it in YAML") from error
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# From data ------------------------------------------------------------------------------------------------------------


def _mapping(data: object, place: str, known: set[str], needed: set[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ChainError(f"{place}: must be a mapping, got {_shown(data)}")
    for name in data:
        if name not in known:
            raise ChainError(f"{place}: there is no field {name!r}; there are {', '.join(sorted(known))}")
    if missing := sorted(needed - set(data)):
        raise ChainError(f"{place}: lacks `{missing[0]}`")
    return data


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ChainError(f"{place}: must be a text, got {_shown(value)} (quote it in YAML)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ChainError(f"{place}: is no Unicode ({error.reason}), got {_shown(value)}") from None
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _optional(data: Mapping[str, Any], name: str, place: str) -> str | None:
    return None if data.get(name) is None else _text(data[name], place)


def _steps(data: object, place: str) -> tuple[Step, ...]:
    if not isinstance(data, list):
        raise ChainError(f"{place}: must be a list of steps, got {_shown(data)}")
    return tuple(_step(item, f"{place}[{number}]") for number, item in enumerate(data))


_STEP = {field.name for field in dataclasses.fields(Step)}


def _step(data: object, place: str) -> Step:
    given = _mapping(data, place, _STEP, {"name"})
    name = _text(given["name"], f"{place}, name")
    place = f"step {name!r}"
    values: dict[str, Any] = {key: given[key] for key in ("max_new_tokens", "temperature", "seed") if key in given}
    model = given.get("model", CHAT)
    return Step(
        name,
        prompt=_optional(given, "prompt", f"{place}, prompt"),
        retrieve=None if given.get("retrieve") is None else _retrieve(given["retrieve"], f"{place}, retrieve"),
        model=model if model is None else _text(model, f"{place}, model"),
        system=_optional(given, "system", f"{place}, system"),
        extract=Extract() if given.get("extract") is None else _extract(given["extract"], f"{place}, extract"),
        when=None if given.get("when") is None else _condition(given["when"], f"{place}, when"),
        loop=None if given.get("loop") is None else _loop(given["loop"], place),
        **values,
    )


def _retrieve(data: object, place: str) -> Retrieve:
    given = _mapping(data, place, {field.name for field in dataclasses.fields(Retrieve)}, set())
    return Retrieve(**given)


def _extract(data: object, place: str) -> Extract:
    """A kind, or a mapping of one kind to its options: `text`, `{list: {at_most: 3}}`, `{json: SCHEMA, repairs: 2}`."""
    if isinstance(data, str):
        return Extract(data)
    known = {*KINDS, "repairs"}
    given = _mapping(data, place, known, set())
    kinds = [name for name in given if name in KINDS]
    if len(kinds) != 1:
        raise ChainError(f"{place}: names one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    kind, options = kinds[0], given[kinds[0]]
    repairs = given.get("repairs", Extract().repairs)
    if kind == "json":
        if not isinstance(options, Mapping):
            raise ChainError(f"{place}, json: must be a schema, a mapping, got {_shown(options)}")
        return Extract(kind, schema=options, repairs=repairs)
    found = _mapping(options or {}, f"{place}, {kind}", {"at_most"}, set())
    return Extract(kind, at_most=found.get("at_most"), repairs=repairs)


def _condition(data: object, place: str) -> Condition:
    """`{field: NAME, TEST: VALUE}`."""
    given = _mapping(data, place, {"field", *TESTS}, {"field"})
    tests = [name for name in given if name in TESTS]
    if len(tests) != 1:
        raise ChainError(f"{place}: has one test of {', '.join(TESTS)}, got {', '.join(tests) or 'none'}")
    return Condition(_text(given["field"], f"{place}, field"), tests[0], given[tests[0]])


def _loop(data: object, place: str) -> Loop:
    place = f"{place}, loop"
    known = {field.name for field in dataclasses.fields(Loop)}
    given = _mapping(data, place, known, {"steps"})
    if "at_most" not in given:
        raise ChainError(f"{place}: lacks `at_most`; a loop needs a bound of rounds")
    return Loop(
        _steps(given["steps"], f"{place}, steps"),
        given["at_most"],
        over=_optional(given, "over", f"{place}, over"),
        start=_templates(given.get("start"), f"{place}, start"),
        next=_templates(given.get("next"), f"{place}, next"),
        until=None if given.get("until") is None else _condition(given["until"], f"{place}, until"),
        result=_optional(given, "result", f"{place}, result") or "",
    )


def _templates(data: object, place: str) -> dict[str, str]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ChainError(f"{place}: must be a mapping of names to templates, got {_shown(data)}")
    return {_text(name, place): _text(text, f"{place}, {name}") for name, text in data.items()}


# To data --------------------------------------------------------------------------------------------------------------


def _step_data(step: Step) -> JsonObject:
    record: JsonObject = {"name": step.name}
    default = Step("_")
    for name in ("prompt", "model", "system", "max_new_tokens", "temperature", "seed"):
        if (value := getattr(step, name)) != getattr(default, name):
            record[name] = value
    if step.retrieve is not None:
        plain = Retrieve()
        found = {field.name: getattr(step.retrieve, field.name) for field in dataclasses.fields(Retrieve)}
        record["retrieve"] = {name: value for name, value in found.items() if value != getattr(plain, name)}
    if step.extract != Extract():
        record["extract"] = _extract_data(step.extract)
    if step.when is not None:
        record["when"] = {"field": step.when.field, step.when.test: step.when.value}
    if step.loop is not None:
        record["loop"] = _loop_data(step.loop)
    return record


def _extract_data(extract: Extract) -> Any:
    if extract.kind == "json":
        return {"json": dict(extract.schema or {}), "repairs": extract.repairs}
    options = {} if extract.at_most is None else {"at_most": extract.at_most}
    return {extract.kind: options, "repairs": extract.repairs}


def _loop_data(loop: Loop) -> JsonObject:
    record: JsonObject = {"steps": [_step_data(step) for step in loop.steps], "at_most": loop.at_most}
    if loop.over is not None:
        record["over"] = loop.over
    for name, value in (("start", dict(loop.start)), ("next", dict(loop.next)), ("result", loop.result)):
        if value:
            record[name] = value
    if loop.until is not None:
        record["until"] = {"field": loop.until.field, loop.until.test: loop.until.value}
    return record
