"""Asking a memory: Memory Interleave (paper, 3.5), the protocol it speaks and the trace it leaves."""

from .custom_generate import memory_interleave
from .interleave import Answer, MemoryInterleave, Source
from .protocol import COMPACT, PUBLISHED, DocumentIds, Protocol, Segment
from .trace import Choice, Dropped, Round, Stage, Trace

__all__ = [
    "COMPACT",
    "PUBLISHED",
    "Answer",
    "Choice",
    "DocumentIds",
    "Dropped",
    "MemoryInterleave",
    "Protocol",
    "Round",
    "Segment",
    "Source",
    "Stage",
    "Trace",
    "memory_interleave",
]
