"""Hits on chunks, expanded to the sections that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...model.memory_msa import Document, Memory, MemoryBank, Snapshots
from ...retrieval.hits import Hit
from .chunking import PARENT, SECTION, SPAN


@dataclass(frozen=True, slots=True)
class Section:
    """A section that hits stand in.

    Attributes:
        parent: key of its document; of a hit that is no chunk, its own.
        title: its headings.
        text: of all its chunks that are there, in order.
        keys: of these.
        hits: keys of those that were found, best first.
        score: of the best of them.
        missing: keys of chunks that the bank does not have any more, or has no text of.
    """

    parent: str
    title: str
    text: str
    keys: tuple[str, ...]
    hits: tuple[str, ...]
    score: float
    missing: tuple[str, ...] = ()


def expand_hits(hits: Sequence[Hit], bank: MemoryBank | Snapshots) -> list[Section]:
    """The sections of hits, each once, in the order of their best hits.

    Args:
        hits: of `bank.search`, best first; chunks of `chunk_document`. Another document is a section by itself.
        bank: that has them.
    """
    memory = bank.snapshot()
    found: dict[tuple[str, int], list[Hit]] = {}
    for hit in hits:
        found.setdefault(_place(hit), []).append(hit)
    return [_section(group, memory) for group in found.values()]


def _place(hit: Hit) -> tuple[str, int]:
    span = _span(hit)
    return (hit.key, -1) if span is None else (str((hit.metadata or {})[PARENT]), span[0])


def _span(hit: Hit) -> tuple[int, int] | None:
    """The first and last part of a hit's section; None for what is no chunk."""
    metadata = hit.metadata or {}
    span = metadata.get(SPAN)
    if not isinstance(metadata.get(PARENT), str) or not isinstance(span, Sequence) or len(span) != 2:
        return None
    first, last = span
    return (first, last) if type(first) is int and type(last) is int else None


def _section(hits: Sequence[Hit], memory: Memory) -> Section:
    best = hits[0]
    names, span = tuple(hit.key for hit in hits), _span(best)
    if span is None:
        return Section(best.key, "", best.text or "", (best.key,), names, best.score)
    parent = str((best.metadata or {})[PARENT])
    texts: list[str] = []
    keys: list[str] = []
    missing: list[str] = []
    for part in range(span[0], span[1] + 1):
        key = f"{parent}#{part}"
        document = _document(memory, key)
        if document is None or document.text is None:
            missing.append(key)
        else:
            keys.append(key)
            texts.append(document.text)
    title = str((best.metadata or {}).get(SECTION) or "")
    return Section(parent, title, "".join(texts), tuple(keys), names, best.score, tuple(missing))


def _document(memory: Memory, key: str) -> Document | None:
    try:
        return memory.documents[memory.documents.position(key)]
    except KeyError:
        return None
