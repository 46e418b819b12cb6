"""Filters of the documents that a search may find: those whose metadata have given values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..model.memory_msa import DocumentTable
from ..model.unicode_msa import check_unicode

Value = str | int | float | bool | None
Where = Mapping[str, Value | Sequence[Value]]  # names of metadata, each with the value that it has, or several
Wanted = dict[str, list[Value]]


def checked_where(where: Where | None) -> Wanted:
    """The values that each field may have; none where every document may be found.

    Raises:
        ValueError: for what is no mapping of names to values, naming the field.
    """
    if where is None:
        return {}
    if not isinstance(where, Mapping):
        raise ValueError(
            f"`where` must be a mapping of names of metadata to values, such as {{'year': 1889}}, got {where!r:.80}."
        )
    found: Wanted = {}
    for name, given in where.items():
        if not isinstance(name, str):
            raise ValueError(f"`where`: names of metadata are texts, got {name!r:.80}.")
        check_unicode(name, "`where`: a name")
        values: list[Value] = [*given] if isinstance(given, list | tuple | set | frozenset) else [given]  # type: ignore[list-item]
        if not values:
            raise ValueError(f"`where`: {name!r:.80} has no values; leave it out to find documents with any.")
        for value in values:
            if not isinstance(value, Value) or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(
                    f"`where`: {name!r:.80} must be a text, a finite number, True, False or None, or several of these "
                    f"in a list, got {value!r:.80}."
                )
        found[name] = values
    return found


def rows_where(documents: DocumentTable, wanted: Wanted) -> np.ndarray:
    """[R] bool, the rows of documents that have one of the wanted values in every field.

    1 and 1.0 are equal, 1 and True are not. A field that is a list has each of its values; one that is not there is
    null.
    """
    held = [
        spelled
        for name, values in wanted.items()
        for text in ([name] if None not in values else []) + [value for value in values[:1] if len(values) == 1]
        if isinstance(text, str) and (spelled := json.dumps(text))[1:-1] == text  # however it was written
    ]
    rows = np.zeros(documents.num_rows, bool)
    for row, metadata in documents.metadata(held):
        rows[row] = all(_fits((metadata or {}).get(name), values) for name, values in wanted.items())
    return rows


def _fits(found: object, values: Sequence[Value]) -> bool:
    there = found if isinstance(found, list) else [found]
    return any(
        item == value and isinstance(item, bool) == isinstance(value, bool) for item in there for value in values
    )
