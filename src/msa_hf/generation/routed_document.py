"""A document as a router chose it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoutedDocument:
    """A document, with the router's score where a router chose it."""

    position: int
    id: int
    key: str
    score: float | None = None
