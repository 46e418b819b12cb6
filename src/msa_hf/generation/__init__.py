"""Asking a memory: Memory Interleave (paper, 3.5), the protocol it speaks and the trace it leaves."""

from ..moved import renamed
from .generate_hook import memory_interleave
from .interleave import Answer, MemoryInterleave, Source
from .protocol import COMPACT, PUBLISHED, DocumentIds, PromptProtocol, Segment
from .trace import Dropped, Round, RoutedDocument, Stage, Trace

__all__ = [
    "COMPACT",
    "PUBLISHED",
    "Answer",
    "DocumentIds",
    "Dropped",
    "MemoryInterleave",
    "PromptProtocol",
    "Round",
    "RoutedDocument",
    "Segment",
    "Source",
    "Stage",
    "Trace",
    "memory_interleave",
]

__getattr__ = renamed(__name__, {"Choice": "RoutedDocument", "Protocol": "PromptProtocol"})
