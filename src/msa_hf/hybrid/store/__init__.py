"""Stores of sessions, conversations and application state: one table, by partition and sort key (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .dynamodb import DynamoDBStore
    from .errors import ItemTooLarge, StoreError, StoreFormatError, StoreUnavailable, VersionConflict
    from .item import Item, expiry
    from .memory_store import MemoryStore
    from .optimistic import update
    from .sqlite import SQLiteStore

__all__ = [
    "DynamoDBStore",
    "Item",
    "ItemTooLarge",
    "MemoryStore",
    "SQLiteStore",
    "StoreError",
    "StoreFormatError",
    "StoreUnavailable",
    "VersionConflict",
    "expiry",
    "update",
]

__getattr__ = exports(
    __name__,
    {
        ".dynamodb": ["DynamoDBStore"],
        ".errors": ["ItemTooLarge", "StoreError", "StoreFormatError", "StoreUnavailable", "VersionConflict"],
        ".item": ["Item", "expiry"],
        ".memory_store": ["MemoryStore"],
        ".sqlite": ["SQLiteStore"],
        ".optimistic": ["update"],
    },
)
