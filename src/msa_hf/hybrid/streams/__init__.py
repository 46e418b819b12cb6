"""Banks made from streams of events, each event once (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .consumer import StreamConsumer
    from .errors import BadEvent, StreamError, StreamUnavailable
    from .event import MemoryEvent, decode_event, encode_event
    from .event_source import Delivery, EventSource
    from .in_memory_source import InMemorySource
    from .metrics import StreamMetrics
    from .redis_source import RedisSource
    from .standby import open_when_free

__all__ = [
    "BadEvent",
    "Delivery",
    "EventSource",
    "InMemorySource",
    "MemoryEvent",
    "RedisSource",
    "StreamConsumer",
    "StreamError",
    "StreamMetrics",
    "StreamUnavailable",
    "decode_event",
    "encode_event",
    "open_when_free",
]

__getattr__ = exports(
    __name__,
    {
        ".consumer": ["StreamConsumer"],
        ".errors": ["BadEvent", "StreamError", "StreamUnavailable"],
        ".event": ["MemoryEvent", "decode_event", "encode_event"],
        ".event_source": ["Delivery", "EventSource"],
        ".in_memory_source": ["InMemorySource"],
        ".metrics": ["StreamMetrics"],
        ".redis_source": ["RedisSource"],
        ".standby": ["open_when_free"],
    },
)
