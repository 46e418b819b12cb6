"""Second-stage synthesis: a memory model extracts, a dense model puts together (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .budget import Budget, BudgetError
    from .chunking import chunk_document, split_semantically
    from .citations import CitationError, cited_labels
    from .conflicts import Conflict, find_conflicts
    from .expanding import Section, expand_hits
    from .extracting import ChatExtractor, Extractor, MemoryExtractor, encoded_reader, extract_findings
    from .findings import DocumentGroup, Finding, group_documents
    from .summarizing import summarize
    from .synthesizing import Synthesis, Synthesizer

__all__ = [
    "Budget",
    "BudgetError",
    "ChatExtractor",
    "CitationError",
    "Conflict",
    "DocumentGroup",
    "Extractor",
    "Finding",
    "MemoryExtractor",
    "Section",
    "Synthesis",
    "Synthesizer",
    "chunk_document",
    "cited_labels",
    "encoded_reader",
    "expand_hits",
    "extract_findings",
    "find_conflicts",
    "group_documents",
    "split_semantically",
    "summarize",
]

__getattr__ = exports(
    __name__,
    {
        ".budget": ["Budget", "BudgetError"],
        ".chunking": ["chunk_document", "split_semantically"],
        ".citations": ["CitationError", "cited_labels"],
        ".conflicts": ["Conflict", "find_conflicts"],
        ".expanding": ["Section", "expand_hits"],
        ".extracting": ["ChatExtractor", "Extractor", "MemoryExtractor", "encoded_reader", "extract_findings"],
        ".findings": ["DocumentGroup", "Finding", "group_documents"],
        ".summarizing": ["summarize"],
        ".synthesizing": ["Synthesis", "Synthesizer"],
    },
)
