"""Metadata of documents, looked at before anything is encoded: what comes back is JSON and nothing else."""

import json
import math
from collections.abc import Mapping
from datetime import date, time

import numpy as np

from .bounds_msa import check_json
from .unicode_msa import check_unicode

DEEPEST = 64  # levels of lists and objects; a reader decodes them by recursion


def checked_metadata(fields: Mapping[str, object], what: str) -> dict[str, object]:
    """Metadata as JSON values: text, finite numbers, booleans, None, and lists and objects of these.

    Dates and times become ISO 8601 text, NumPy's scalars Python's, tuples and arrays lists.

    Args:
        what: the document, which a message begins with.

    Raises:
        TypeError: for fields that are no mapping.
        ValueError: for any other value, such as NaN, bytes, an image or a name that is no text, naming its field.
    """
    if not isinstance(fields, Mapping):
        raise TypeError(f"{what}: its metadata must be a dict of values by name, got {type(fields).__name__}.")
    try:
        made = {_name(name, ""): _value(value, repr(name), 1) for name, value in fields.items()}
        if made:
            check_json(json.dumps(made, ensure_ascii=False))  # else no reader would take it
    except ValueError as error:
        raise ValueError(f"{what}: its metadata cannot be written as JSON: {error}") from error
    return made


def _name(name: object, field: str) -> str:
    if not isinstance(name, str):
        inside = f" in {field}" if field else ""
        raise ValueError(f"the name {name!r:.80}{inside} is no text but {type(name).__name__}.")
    check_unicode(name, f"the name {name!r:.80}")
    return str(name)


def _value(value: object, field: str, depth: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_unicode(value, field)
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{field} is {float(value)}, which JSON does not have; leave it out or give None.")
        return float(value)
    if depth > DEEPEST:
        raise ValueError(f"{field[:60]} is nested more than {DEEPEST} levels deep.")
    if isinstance(value, list | tuple):
        return [_value(item, f"{field}[{place}]", depth + 1) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_name(name, field): _value(item, f"{field}[{name!r}]", depth + 1) for name, item in value.items()}
    return _other(value, field, depth)


def _other(value: object, field: str, depth: int) -> object:
    """The JSON value of what is not JSON's own but has one meaning there."""
    if isinstance(value, np.ndarray | np.integer | np.floating | np.bool_):
        return _value(value.tolist(), field, depth + 1)
    if isinstance(value, date | time | np.datetime64):
        if value != value:
            raise ValueError(f"{field} is NaT, a missing date; leave it out or give None.")
        return str(value) if isinstance(value, np.datetime64) else value.isoformat()
    raise ValueError(
        f"{field} is an object of type {type(value).__name__}; metadata holds text, numbers, dates, booleans, None, "
        "and lists and objects of these. Convert the field or leave it out."
    )


def is_missing(value: object) -> bool:
    """Tell whether a value is what pandas puts where there is none: None, NaN, NaT or NA."""
    if isinstance(value, float | date):
        return bool(value != value)
    return value is None or type(value).__name__ == "NAType"
