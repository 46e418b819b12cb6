"""Long conversations of many sessions, with facts that change, and questions about them."""

from .conversation import LongConversation, TalkSession, TalkTurn, make_conversation
from .questions import KINDS, NEVER_SAID, TalkQuestion
from .statements import Act, Statement

__all__ = [
    "KINDS",
    "NEVER_SAID",
    "Act",
    "LongConversation",
    "Statement",
    "TalkQuestion",
    "TalkSession",
    "TalkTurn",
    "make_conversation",
]
