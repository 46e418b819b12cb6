"""Limits of what clients may send and get."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of what clients may send and get; sizes in characters.

    Attributes:
        results: documents of a search at most.
        text: of a document to be remembered.
        query: of a query or a question.
        key: of a document.
        metadata: of a document's metadata as JSON.
        excerpt: of a document's text among the results of a search.
        part: of a document's text that is read at once.
        seconds: of a call, waiting for the model included.
        calls: at work or waiting at once; more are refused.
    """

    results: int = 50
    text: int = 1_000_000
    query: int = 8_000
    key: int = 1_000
    metadata: int = 65_536
    excerpt: int = 2_000
    part: int = 50_000
    seconds: float = 120.0
    calls: int = 32

    @property
    def body(self) -> int:
        """Bytes of a request over HTTP at most: every character may be an escape of two UTF-16 units."""
        return 65_536 + 12 * (self.text + self.metadata + self.key)
