"""`Conversation`: the turns of a session, what is pinned in it, and the state of the application, in a store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..chat.chat_model import ROLES
from ..store import Item, MemoryStore, StoreFormatError, VersionConflict, expiry, update

# Partitions and the sort keys in them.
SESSIONS, PENDING = "sessions", "pending"
TURN, PIN, STATE = "turn#", "pin#", "state#"
DIGITS = 12  # of a turn's number, so that sort keys are in the order of turns
TRIES = 8  # numbers after the last known one, before the last one is looked up again


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a session.

    Attributes:
        number: from 1; not given again, also if the turn is forgotten, until all turns of the session have expired.
        role: who says it, such as `"user"`.
        text: None for a turn that was forgotten.
        at: seconds since 1970.
        version: of the store; grows when the text changes.
    """

    number: int
    role: str
    text: str | None
    at: float
    version: int


class Conversation:
    """A session in a store. Any number of threads and processes may write the same one.

    The partition `session#<session>` has an item per turn, pinned text and value of the state; the partition `sessions`
    lists sessions, `pending` those of which a bank has not seen everything.

    Args:
        store: where it lies.
        session: its name, such as that of a user or a chat.
        ttl: seconds after which a turn expires. Default: never.

    Raises:
        ValueError: for a name that is empty or too long.
    """

    def __init__(self, store: MemoryStore, session: str, *, ttl: float | None = None) -> None:
        if not session or len(session.encode()) > 900:
            raise ValueError(f"`session` must be a name of 1 to 900 bytes, got {session!r:.80}.")
        self.store, self.session, self.ttl = store, session, ttl
        self.partition = f"session#{session}"
        self._last: int | None = None
        self._listed = False

    # Turns ------------------------------------------------------------------------------------------------------------

    def append(self, role: str, text: str) -> Turn:
        """Add a turn behind the last one.

        Args:
            role: `"user"`, `"assistant"` or `"system"`.

        Raises:
            ItemTooLarge: for a text that no item can hold.
        """
        _check_text("text", text)
        if role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, got {role!r:.80}.")
        self._announce()
        now = self.store.now()
        expires_at = None if self.ttl is None else expiry(now, self.ttl)
        tries = 0
        if self._last is None:
            self._last = self._find_last()
        while True:
            number = self._last + 1
            item = Item(self.partition, turn_sort(number), "turn", {"role": role, "text": text, "at": now})
            try:
                written = self.store.put(replace(item, expires_at=expires_at), expected=0)
            except VersionConflict:  # somebody else's turn
                tries += 1
                self._last = max(number, self._find_last()) if tries % TRIES == 0 else number
                continue
            self._last = number
            return _turn(written)

    def edit(self, number: int, text: str) -> Turn:
        """Give a turn another text.

        Raises:
            KeyError: for a turn that does not exist or was forgotten.
        """
        _check_text("text", text)
        self._announce()
        return self._change(number, lambda item: replace(item, data={**item.data, "text": text}))

    def forget(self, number: int) -> None:
        """Delete the text of a turn here, and in a bank with the next `remember_turns`.

        Raises:
            KeyError: for a turn that does not exist or was forgotten.
        """
        self._announce()

        def without_text(item: Item) -> Item:
            return replace(item, type="forgotten", data={"role": item.data["role"], "at": item.data["at"]})

        self._change(number, without_text)

    def _change(self, number: int, change: Callable[[Item], Item]) -> Turn:
        while True:
            found = self.store.get(self.partition, turn_sort(number))
            if found is None or found.type == "forgotten":
                raise KeyError(f"session {self.session!r} has no turn {number}")
            with contextlib.suppress(VersionConflict):
                return _turn(self.store.put(change(found), expected=found.version))

    def turns(self, last: int | None = None) -> list[Turn]:
        """The turns in order, or the last ones, without those that were forgotten."""
        found = self.store.query(self.partition, TURN, type="turn", reverse=last is not None, limit=last)
        turns = [_turn(item) for item in found]
        return turns if last is None else turns[::-1]

    def all_turns(self) -> Iterator[Turn]:
        """The turns in order, those that were forgotten as well."""
        return map(_turn, self.store.query(self.partition, TURN))

    def _find_last(self) -> int:
        for item in self.store.query(self.partition, TURN, reverse=True, limit=1):
            return _turn(item).number
        return 0

    # Pinned texts -----------------------------------------------------------------------------------------------------

    def pin(self, name: str, text: str) -> None:
        """Keep a text that stands in every prompt as it is."""
        _check_text("text", text)
        self._announce(pending=False)
        self.store.put(Item(self.partition, PIN + name, "pin", {"text": text}))

    def unpin(self, name: str) -> bool:
        """Let go of a pinned text; returns whether there was one."""
        return self.store.delete(self.partition, PIN + name)

    def pins(self) -> dict[str, str]:
        """The pinned texts by name."""
        found = self.store.query(self.partition, PIN)
        return {item.sort.removeprefix(PIN): str(item.data["text"]) for item in found}

    # State ------------------------------------------------------------------------------------------------------------

    def set_state(self, name: str, value: object) -> None:
        """Set a value of the application's state, which stands in every prompt: JSON."""
        self._announce(pending=False)
        self.store.put(Item(self.partition, STATE + name, "state", {"value": value}))

    def update_state(self, name: str, change: Callable[[object], object]) -> object:
        """Change a value by what it is (None: nothing yet), so that no change of another writer is lost; returns it."""
        self._announce(pending=False)
        item = update(
            self.store,
            self.partition,
            STATE + name,
            "state",
            lambda data: {"value": change(None if data is None else data["value"])},
        )
        return item.data["value"]

    def delete_state(self, name: str) -> bool:
        """Delete a value; returns whether there was one."""
        return self.store.delete(self.partition, STATE + name)

    def state(self) -> dict[str, object]:
        """The state by name."""
        return {item.sort.removeprefix(STATE): item.data["value"] for item in self.store.query(self.partition, STATE)}

    # The lists --------------------------------------------------------------------------------------------------------

    def _announce(self, pending: bool = True) -> None:
        """Enter the session in the lists, before something is written to it, so that no crash hides what was."""
        if not self._listed:
            with contextlib.suppress(VersionConflict):
                self.store.put(Item(SESSIONS, self.session, "session", {"since": self.store.now()}), expected=0)
            self._listed = True
        if pending:
            self.store.put(Item(PENDING, self.session, "pending", {"at": self.store.now()}))


def sessions(store: MemoryStore) -> Iterator[str]:
    """The names of all sessions of a store, in the order of their bytes."""
    return (item.sort for item in store.query(SESSIONS))


def turn_sort(number: int) -> str:
    """The sort key of a turn."""
    return f"{TURN}{number:0{DIGITS}}"


def _turn(item: Item) -> Turn:
    try:
        text = None if item.type == "forgotten" else str(item.data["text"])
        number = int(item.sort.removeprefix(TURN))
        return Turn(number, str(item.data["role"]), text, float(item.data["at"]), item.version)
    except (KeyError, ValueError, TypeError) as error:
        raise StoreFormatError(
            f"{item.partition!r:.80}/{item.sort!r:.80} is no turn ({error!r}); give conversations a table of their own."
        ) from error


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{what}` must be a text that is not empty, got {text!r:.80}.")
