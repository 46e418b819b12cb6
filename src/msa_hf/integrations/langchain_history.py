"""The history of a chat as LangChain keeps it, in a `MemoryStore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..hybrid.store import Item, MemoryStore, StoreFormatError, VersionConflict, expiry
from ..hybrid.store.item import MAX_ITEM, encode_item

try:
    from langchain_core.chat_history import BaseChatMessageHistory
    from langchain_core.messages import BaseMessage, message_to_dict, messages_from_dict
except ImportError as error:
    raise ImportError("LangChain is not installed: `pip install 'msa-hf[langchain]'`.") from error

MESSAGE = "message#"
DIGITS = 12  # of a message's number, so that sort keys are in the order of messages
TRIES = 8  # numbers after the last known one, before the last one is looked up again


class LangChainHistory(BaseChatMessageHistory):
    """The messages of a session, each an item of the partition `chat#<session>`, whole as LangChain has it: tool calls,
    names and parts that are no text among them. Any number of threads and processes may write the same session.

    `Conversation` (docs/hybrid.md) keeps turns of plain text, of which a bank can remember the older ones; the two do
    not share a session.

    Args:
        store: where they lie; `SQLiteStore`, `DynamoDBStore`.
        session: its name, of 1 to 900 bytes.
        ttl: seconds after which a message expires. Default: never.
        last: `messages` are the last so many. Default: all.

    Raises:
        ValueError: for a name or number that is none.
    """

    def __init__(self, store: MemoryStore, session: str, *, ttl: float | None = None, last: int | None = None) -> None:
        if not isinstance(session, str) or not session or len(session.encode(errors="replace")) > 900:
            raise ValueError(f"`session` must be a name of 1 to 900 bytes, got {session!r:.80}.")
        if last is not None and (type(last) is not int or last < 1):
            raise ValueError(f"`last` must be an integer of at least 1, or None, got {last!r:.80}.")
        self.store, self.session, self.ttl, self.last = store, session, ttl, last
        self.partition = f"chat#{session}"

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]  # where LangChain's types are not read
        """The messages in order, or the last ones.

        Raises:
            StoreFormatError: for an item that is no message.
        """
        if self.last is None:
            return [_message(item) for item in self._items()]
        return [_message(item) for item in self._items(reverse=True, limit=self.last)][::-1]

    def _items(self, reverse: bool = False, limit: int | None = None) -> Iterator[Item]:
        return self.store.query(self.partition, MESSAGE, reverse=reverse, limit=limit)

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add messages behind the last one, in order.

        Raises:
            ItemTooLarge: for one that no item can hold.
            ValueError: for one that JSON cannot express. None is added then.
        """
        now = self.store.now()
        expires_at = None if self.ttl is None else expiry(now, self.ttl)
        items = [
            Item(self.partition, MESSAGE, "message", {"message": message_to_dict(message), "at": now}, 0, expires_at)
            for message in messages
        ]
        for item in items:
            encode_item(item, MAX_ITEM)
        number, tries = self._find_last(), 0
        for item in items:
            while True:
                number += 1
                try:
                    self.store.put(replace(item, sort=f"{MESSAGE}{number:0{DIGITS}}"), expected=0)
                    break
                except VersionConflict:  # somebody else's message
                    tries += 1
                    number = max(number, self._find_last()) if tries % TRIES == 0 else number

    def _find_last(self) -> int:
        for item in self._items(reverse=True, limit=1):
            return _number(item)
        return 0

    def clear(self) -> None:
        """Delete the messages of the session."""
        for item in list(self._items()):
            self.store.delete(self.partition, item.sort)


def _number(item: Item) -> int:
    try:
        return int(item.sort.removeprefix(MESSAGE))
    except ValueError as error:
        raise _no_message(item, error) from error


def _message(item: Item) -> BaseMessage:
    try:
        (message,) = messages_from_dict([item.data["message"]])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _no_message(item, error) from error
    return message


def _no_message(item: Item, error: Exception) -> StoreFormatError:
    return StoreFormatError(
        f"{item.partition!r:.80}/{item.sort!r:.80} is no message of LangChain ({error!r:.200}); give chats a table of "
        "their own."
    )
