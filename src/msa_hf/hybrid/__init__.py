"""Systems around a memory, which catch what sparse attention misses (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .conversation import Conversation, SessionMemory
    from .store import DynamoDBStore, SQLiteStore

__all__ = [
    "Conversation",
    "DynamoDBStore",
    "SQLiteStore",
    "SessionMemory",
]

__getattr__ = exports(
    __name__,
    {
        ".conversation": ["Conversation", "SessionMemory"],
        ".store": ["DynamoDBStore", "SQLiteStore"],
    },
)
