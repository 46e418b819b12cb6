"""Benchmarks that find what a memory cannot do: each a function that puts its questions and returns a `Result`."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .comparing import compare
    from .haystack import Haystack
    from .result import Cell, Result, Trial

__all__ = ["Cell", "Haystack", "Result", "Trial", "compare"]

__getattr__ = exports(
    __name__,
    {
        ".comparing": ["compare"],
        ".haystack": ["Haystack"],
        ".result": ["Cell", "Result", "Trial"],
    },
)
