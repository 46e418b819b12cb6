"""Conversations in a store, their older turns in a bank, and the prompt made of both (docs/hybrid.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import exports

if TYPE_CHECKING:
    from .context import RememberedTurn, SessionContext, count_tokens
    from .conversation import Conversation, Turn, sessions
    from .partition import select_partition
    from .remembering import forget_lost_turns, remember_turns
    from .session_memory import SessionMemory

__all__ = [
    "Conversation",
    "RememberedTurn",
    "SessionContext",
    "SessionMemory",
    "Turn",
    "count_tokens",
    "forget_lost_turns",
    "remember_turns",
    "select_partition",
    "sessions",
]

__getattr__ = exports(
    __name__,
    {
        ".context": ["RememberedTurn", "SessionContext", "count_tokens"],
        ".conversation": ["Conversation", "Turn", "sessions"],
        ".partition": ["select_partition"],
        ".remembering": ["forget_lost_turns", "remember_turns"],
        ".session_memory": ["SessionMemory"],
    },
)
