"""Templates: texts with named fields in braces, and nothing else.

`{name}` is a value, `{name/field}` a field of a value that is an object; a literal brace is doubled. There are no
attributes, indices, calls or format specifications, and a value is put in as it is: braces in it mean nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ChainError

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FIELD = re.compile(rf"({NAME.pattern})(?:/({NAME.pattern}))?")
MOST_CHARACTERS = 2**23  # of a template filled in
_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, order=True)
class Field:
    """A value that a template asks for.

    Attributes:
        name: of the value.
        key: of a field of it; empty for all of it.
    """

    name: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.key}" if self.key else self.name


def parse_field(text: str, place: str) -> Field:
    """A field as data names it, without braces.

    Raises:
        ChainError: for anything but `name` or `name/field`.
    """
    found = FIELD.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ChainError(
            f"{place}: {text!r} is no field; a field is a name, or name/field for a field of an object: letters, "
            "digits and underscores"
        )
    return Field(found[1], found[2] or "")


def parse_template(text: str, place: str) -> list[str | Field]:
    """Literal texts and fields, in order.

    Raises:
        ChainError: for a brace without its like, or what is no field.
    """
    parts: list[str | Field] = []
    start = 0
    for found in _PART.finditer(text):
        if start < found.start():
            parts.append(text[start : found.start()])
        start = found.end()
        if found[0] in ("{{", "}}"):
            parts.append(found[0][0])
        elif found[1] is None:
            raise ChainError(f"{place}: a single {found[0]!r} in {text!r}; write a literal brace twice")
        else:
            parts.append(parse_field(found[1], place))
    return [*parts, text[start:]] if start < len(text) else parts


def fields_of(text: str, place: str) -> list[Field]:
    """The fields that a template asks for, in order."""
    return [part for part in parse_template(text, place) if isinstance(part, Field)]


def literal(text: str) -> str:
    """A template that says `text`."""
    return text.replace("{", "{{").replace("}", "}}")


def render(text: str, values: Mapping[str, JsonValue], place: str) -> str:
    """A template filled in.

    Raises:
        ChainError: for a field that has no value, and a text that grows beyond all use.
    """
    made, size = [], 0
    for part in parse_template(text, place):
        made.append(part if isinstance(part, str) else as_text(look_up(part, values, place)))
        size += len(made[-1])
        if size > MOST_CHARACTERS:
            raise ChainError(
                f"{place}: filled in, it has more than {MOST_CHARACTERS} characters; what goes round a loop must not "
                "grow without end"
            )
    return "".join(made)


def look_up(field: Field, values: Mapping[str, JsonValue], place: str) -> JsonValue:
    """The value of a field; of a step that was skipped, None."""
    if field.name not in values:
        raise ChainError(f"{place}: there is no value {field.name!r}; there are {', '.join(sorted(values))}")
    value = values[field.name]
    if not field.key or value is None:
        return value
    if not isinstance(value, dict):
        raise ChainError(f"{place}: {{{field}}} asks for a field of {field.name!r}, which is no object")
    return value.get(field.key)


def as_text(value: JsonValue) -> str:
    """A value as a template shows it: texts as they are, nothing for None, lists of texts a line each, all else as
    JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(map(str, value))
    return json.dumps(value, ensure_ascii=False)
