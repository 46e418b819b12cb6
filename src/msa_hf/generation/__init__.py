"""Asking a memory: Memory Interleave (paper, 3.5), the protocol it speaks and the trace it leaves."""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .asking import Asker, asker_of, protocol_beside
    from .direct import DirectAsker
    from .document_ids import DocumentIds
    from .generate_hook import memory_interleave
    from .interleave import Answer, MemoryInterleave, Source
    from .prompting import Prompt, Prompting, prompting_of
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
    "Asker",
    "DirectAsker",
    "DocumentIds",
    "Dropped",
    "MemoryInterleave",
    "Prompt",
    "PromptProtocol",
    "Prompting",
    "Round",
    "RoutedDocument",
    "Segment",
    "Selected",
    "SelectionRound",
    "Selector",
    "Source",
    "Stage",
    "Trace",
    "asker_of",
    "memory_interleave",
    "prompting_of",
    "protocol_beside",
]

__getattr__ = exports(
    __name__,
    {
        ".asking": ["Asker", "asker_of", "protocol_beside"],
        ".direct": ["DirectAsker"],
        ".document_ids": ["DocumentIds"],
        ".generate_hook": ["memory_interleave"],
        ".interleave": ["Answer", "MemoryInterleave", "Source"],
        ".prompting": ["Prompt", "Prompting", "prompting_of"],
        ".protocol": ["COMPACT", "PUBLISHED", "PromptProtocol", "Segment"],
        ".routed_document": ["RoutedDocument"],
        ".selectors": ["SELECTORS", "Asked", "Selected", "SelectionRound", "Selector"],
        ".trace": ["Dropped", "Round", "Stage", "Trace"],
    },
    old_names={"Choice": "RoutedDocument", "Protocol": "PromptProtocol"},
)
