"""Asking a memory: Memory Interleave (paper, 3.5), the protocol it speaks and the trace it leaves."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .document_ids import DocumentIds
    from .generate_hook import memory_interleave
    from .interleave import Answer, MemoryInterleave, Source
    from .protocol import COMPACT, PUBLISHED, PromptProtocol, Segment
    from .routed_document import RoutedDocument
    from .selectors import SELECTORS, Asked, Selected, SelectionRound, Selector
    from .trace import Dropped, Round, Stage, Trace

__all__ = [
    "COMPACT",
    "PUBLISHED",
    "SELECTORS",
    "Answer",
    "Asked",
    "DocumentIds",
    "Dropped",
    "MemoryInterleave",
    "PromptProtocol",
    "Round",
    "RoutedDocument",
    "Segment",
    "Selected",
    "SelectionRound",
    "Selector",
    "Source",
    "Stage",
    "Trace",
    "memory_interleave",
]

__getattr__ = exports(
    __name__,
    {
        ".document_ids": ["DocumentIds"],
        ".generate_hook": ["memory_interleave"],
        ".interleave": ["Answer", "MemoryInterleave", "Source"],
        ".protocol": ["COMPACT", "PUBLISHED", "PromptProtocol", "Segment"],
        ".routed_document": ["RoutedDocument"],
        ".selectors": ["SELECTORS", "Asked", "Selected", "SelectionRound", "Selector"],
        ".trace": ["Dropped", "Round", "Stage", "Trace"],
    },
    old_names={"Choice": "RoutedDocument", "Protocol": "PromptProtocol"},
)
