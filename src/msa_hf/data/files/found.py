"""The findings of a reader of rows."""

from __future__ import annotations

from typing import NamedTuple

from ...json_object import JsonObject
from ..errors import DataError


class Found(NamedTuple):
    """A row of a file, or why it cannot be one; `number` tells it from the others, and grows."""

    number: int
    row: JsonObject | DataError
