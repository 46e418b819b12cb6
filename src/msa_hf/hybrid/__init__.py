"""Systems around a memory, which catch what sparse attention misses (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    pass

__all__: list[str] = []

__getattr__ = exports(__name__, {})
