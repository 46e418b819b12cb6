"""A subset of JSON Schema: what an answer may be held to, and whether it is that."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 400  # characters of an answer that errors show
DEEPEST = 16  # levels of a schema

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
# Keyword -> the types that it belongs to; none: any.
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "type": (),
    "enum": (),
    "description": (),
    "title": (),
    "properties": ("object",),
    "required": ("object",),
    "additionalProperties": ("object",),
    "items": ("array",),
    "minItems": ("array",),
    "maxItems": ("array",),
    "minLength": ("string",),
    "maxLength": ("string",),
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
}
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")


class SchemaError(ValueError):
    """A schema that says what this subset does not know, or contradicts itself."""


class AnswerError(ValueError):
    """An answer that is not what was asked for.

    Attributes:
        answer: as it was written.
        problem: in a few words.
    """

    def __init__(self, problem: str, answer: str) -> None:
        shown = answer if len(answer) <= SHOWN else f"{answer[:SHOWN]}... ({len(answer)} characters)"
        super().__init__(f"{problem}; the answer was {shown!r}")
        self.problem, self.answer = problem, answer


def check_schema(schema: object, place: str = "schema", depth: int = 0) -> None:
    """Make sure that a schema is one of this subset: every level names its `type`, one of seven, or an `enum`.

    Raises:
        SchemaError: naming the place.
    """
    if depth > DEEPEST:
        raise SchemaError(f"{place}: deeper than {DEEPEST} levels")
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{place}: a schema is a mapping, got {schema!r}")
    if unknown := sorted(str(name) for name in schema if name not in _KEYWORDS):
        raise SchemaError(f"{place}: unknown keyword {unknown[0]!r}; this subset has {', '.join(_KEYWORDS)}")
    kind = schema.get("type")
    if kind is None and "enum" not in schema:
        raise SchemaError(f"{place}: needs a `type`, one of {', '.join(_TYPES)}, or an `enum`")
    if kind is not None and (not isinstance(kind, str) or kind not in _TYPES):
        raise SchemaError(f"{place}: `type` must be one of {', '.join(_TYPES)}, got {kind!r}")
    for name, value in schema.items():
        _check_keyword(name, value, kind, place)
    for name, item in schema.get("properties", {}).items():
        check_schema(item, f"{place}.{name}", depth + 1)
    if "items" in schema:
        check_schema(schema["items"], f"{place}[]", depth + 1)
    for least, most in (("minItems", "maxItems"), ("minLength", "maxLength"), ("minimum", "maximum")):
        if least in schema and most in schema and schema[least] > schema[most]:
            raise SchemaError(f"{place}: `{least}` is above `{most}`")


def _check_keyword(name: str, value: Any, kind: str | None, place: str) -> None:
    if _KEYWORDS[name] and kind not in _KEYWORDS[name]:
        raise SchemaError(f"{place}: `{name}` belongs to {' or '.join(_KEYWORDS[name])}, not to {kind}")
    if name == "enum" and (not isinstance(value, list) or not value):
        raise SchemaError(f"{place}: `enum` is a list of values that is not empty")
    if name == "properties" and not (isinstance(value, Mapping) and all(isinstance(item, str) for item in value)):
        raise SchemaError(f"{place}: `properties` is a mapping of names")
    if name == "required" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise SchemaError(f"{place}: `required` is a list of names")
    if name == "additionalProperties" and not isinstance(value, bool):
        raise SchemaError(f"{place}: `additionalProperties` is true or false")
    if name in _COUNTS and not (type(value) is int and value >= 0):
        raise SchemaError(f"{place}: `{name}` is an integer of at least 0")
    if name in ("minimum", "maximum") and not _is("number", value):
        raise SchemaError(f"{place}: `{name}` is a number")


def strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema whose objects have their own properties alone, all of them, in order: what a decoder is held to, so that
    an answer always ends."""
    made = dict(schema)
    if schema.get("type") == "object":
        properties = {name: strict(item) for name, item in schema.get("properties", {}).items()}
        made |= {"properties": properties, "required": list(properties), "additionalProperties": False}
    if "items" in schema:
        made["items"] = strict(schema["items"])
    return made


def problems_of(value: object, schema: Mapping[str, Any], place: str = "it") -> Iterator[str]:
    """In which places a value is not what a schema says, in words."""
    if "enum" in schema and not any(type(value) is type(item) and value == item for item in schema["enum"]):
        yield f"{place} must be one of {json.dumps(schema['enum'], ensure_ascii=False)}"
        return
    kind = schema.get("type")
    if kind is not None and not _is(kind, value):
        yield f"{place} must be {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        return
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{place} lacks {name!r}"
        for name, item in value.items():
            if name in known:
                yield from problems_of(item, known[name], f"{place}.{name}")
            elif schema.get("additionalProperties") is False:
                yield f"{place} has {name!r}, which is not asked for"
    elif isinstance(value, list):
        yield from _outside(len(value), schema, "minItems", "maxItems", f"the length of {place}")
        if "items" in schema:
            for number, item in enumerate(value):
                yield from problems_of(item, schema["items"], f"{place}[{number}]")
    elif isinstance(value, str):
        yield from _outside(len(value), schema, "minLength", "maxLength", f"the length of {place}")
    elif isinstance(value, int | float):
        yield from _outside(value, schema, "minimum", "maximum", place)


def _outside(value: float, schema: Mapping[str, Any], least: str, most: str, place: str) -> Iterator[str]:
    if least in schema and value < schema[least]:
        yield f"{place} must be at least {schema[least]}"
    if most in schema and value > schema[most]:
        yield f"{place} must be at most {schema[most]}"


def _is(kind: str, value: object) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def read_json(text: str, schema: Mapping[str, Any]) -> Any:
    """The JSON value of an answer that a schema describes. Words around it, such as a fence of backticks, are passed
    over if what they enclose is JSON.

    Raises:
        AnswerError: for an answer that is not such a value, with the problem.
    """
    value, problem = None, "it is empty" if not text.strip() else ""
    for candidate in _candidates(text):
        try:
            value = json.loads(
                candidate, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_refuse_twice
            )
        except (ValueError, RecursionError) as error:
            problem = problem or f"it is not JSON ({error})"
            continue
        if found := list(problems_of(value, schema)):
            raise AnswerError("; ".join(found[:3]), text)
        return value
    raise AnswerError(problem, text)


def _candidates(text: str) -> Iterator[str]:
    if not text.strip():
        return
    yield text.strip()
    if fenced := re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL):
        yield fenced[1].strip()
    if opening := re.search(r"[{\[]", text):
        end = text.rfind("}" if opening[0] == "{" else "]")
        if end > opening.start():
            yield text[opening.start() : end + 1]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is larger than any number")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return made
