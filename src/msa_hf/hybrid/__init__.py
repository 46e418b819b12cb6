"""Systems around a memory, which catch what sparse attention misses (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .chains import ChainRunner, load_chain
    from .chat import EndpointChat, TransformersChat
    from .conversation import Conversation, SessionMemory
    from .monitoring import Monitor, Watched
    from .store import DynamoDBStore, SQLiteStore
    from .streams import RedisSource, StreamConsumer
    from .synthesis import Synthesizer, summarize

__all__ = [
    "ChainRunner",
    "Conversation",
    "DynamoDBStore",
    "EndpointChat",
    "Monitor",
    "RedisSource",
    "SQLiteStore",
    "SessionMemory",
    "StreamConsumer",
    "Synthesizer",
    "TransformersChat",
    "Watched",
    "load_chain",
    "summarize",
]

__getattr__ = exports(
    __name__,
    {
        ".chains": ["ChainRunner", "load_chain"],
        ".chat": ["EndpointChat", "TransformersChat"],
        ".conversation": ["Conversation", "SessionMemory"],
        ".monitoring": ["Monitor", "Watched"],
        ".store": ["DynamoDBStore", "SQLiteStore"],
        ".streams": ["RedisSource", "StreamConsumer"],
        ".synthesis": ["Synthesizer", "summarize"],
    },
)
