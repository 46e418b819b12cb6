"""Remembering: the turns of sessions go into a bank, each once, also after a crash."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ...model.memory_msa import Document
from ...model.splitting_msa import split_text
from ..store import Item, MemoryStore, VersionConflict
from .conversation import DIGITS, PENDING, Conversation, Turn

if TYPE_CHECKING:
    from ...bank import BankStore

PART_TOKENS = 512  # of a document; longer turns become several
GRACE = 60.0  # seconds within which an announced write has happened or failed


def part_key(session: str, number: int, part: int = 0) -> str:
    """The key of a turn's document in a bank."""
    return f"{session}/{number:0{DIGITS}}/{part:04}"


def remember_turns(
    store: MemoryStore,
    bank: BankStore,
    sessions: Iterable[str] | None = None,
    *,
    part_tokens: int = PART_TOKENS,
    grace: float = GRACE,
    show_progress: bool = False,
) -> int:
    """Bring a bank up to date with the turns of sessions, in a commit per session that has news.

    Turns are documents with their version, so that doing it again, or going on after a crash, changes nothing that is
    there; forgotten turns are deleted. One process at a time can: the bank has one writer.

    Args:
        bank: opened to write.
        sessions: default those that announced a write.
        part_tokens: most tokens of a document; a longer turn becomes several.
        grace: a session stays among those that announced a write for so many seconds, in which the write must have
            happened: longer than the store's timeouts.

    Returns:
        turns that were put in, replaced or deleted.
    """
    changed = 0
    for name, announcement in tqdm(
        _announced(store, sessions), "Remembering", unit="session", disable=not show_progress
    ):
        changed += _remember(Conversation(store, name), bank, part_tokens)
        if announcement is not None and float(announcement.data["at"]) + grace < store.now():
            with contextlib.suppress(VersionConflict):  # announced again meanwhile
                store.delete(PENDING, name, expected=announcement.version)
    return changed


def forget_lost_turns(store: MemoryStore, bank: BankStore, *, show_progress: bool = False) -> int:
    """Delete the documents of turns that the store has no more, such as expired ones; returns how many documents.

    Reads the keys of the whole bank; documents that are no turns stay.
    """
    of_turns: dict[str, dict[int, list[str]]] = {}
    for document in tqdm(bank.documents, "Reading keys", unit="doc") if show_progress else bank.documents:
        if (found := _turn_of(document)) is not None:
            session, number = found
            of_turns.setdefault(session, {}).setdefault(number, []).append(document.key)
    lost: list[str] = []
    for session, numbers in of_turns.items():
        living = {turn.number for turn in Conversation(store, session).turns()}
        lost += [key for number, keys in numbers.items() if number not in living for key in keys]
    if lost:
        with bank.batch():
            for key in lost:
                bank.delete(key)
    return len(lost)


def remembered_parts(bank: BankStore, session: str, turn: Turn) -> list[str]:
    """The keys of a turn's documents if the bank has this version of it, else none."""
    document = bank.get(part_key(session, turn.number))
    if document is None or document.version != turn.version:
        return []
    return [part_key(session, turn.number, part) for part in range(_parts(document.metadata))]


def _announced(store: MemoryStore, sessions: Iterable[str] | None) -> list[tuple[str, Item | None]]:
    """Sessions, and the announcement that each has."""
    if sessions is None:
        return [(item.sort, item) for item in store.query(PENDING)]
    return [(name, store.get(PENDING, name)) for name in sessions]


def _turn_of(document: Document) -> tuple[str, int] | None:
    """The session and number of the turn that a document is of; None for other documents."""
    metadata = document.metadata or {}
    session, number = metadata.get("session"), metadata.get("turn")
    if not isinstance(session, str) or not isinstance(number, int):
        return None
    return (session, number) if document.key.startswith(f"{session}/{number:0{DIGITS}}/") else None


def _remember(conversation: Conversation, bank: BankStore, part_tokens: int) -> int:
    session, changed = conversation.session, 0
    news: list[tuple[Turn, int]] = []
    for turn in conversation.all_turns():
        document = bank.get(part_key(session, turn.number))
        old = 0 if document is None else _parts(document.metadata)
        if (document is None and turn.text is not None) or (document is not None and document.version != turn.version):
            news.append((turn, old))
    if not news:
        return 0
    with bank.batch():
        for turn, old in news:
            parts = [] if turn.text is None else list(_split(bank, turn.text, part_tokens))
            metadata = {"session": session, "turn": turn.number, "role": turn.role, "at": turn.at, "parts": len(parts)}
            done = False
            for part, text in enumerate(parts):
                done |= bank.upsert(part_key(session, turn.number, part), text, turn.version, metadata)
            for part in range(len(parts), old):
                done |= bank.delete(part_key(session, turn.number, part), turn.version)
            changed += done
    return changed


def _split(bank: BankStore, text: str, limit: int) -> Iterator[str]:
    if len(text.encode()) <= limit:  # no token has less than a byte
        yield text
        return
    if bank.tokenizer is None:
        raise ValueError("A turn may be too long for one document: open the bank with its tokenizer.")
    yield from (piece for piece, _ in split_text(bank.tokenizer, text, limit))


def _parts(metadata: dict[str, object] | None) -> int:
    parts = (metadata or {}).get("parts")
    return parts if isinstance(parts, int) else 1
