"""Conversations of any length about invented people, deterministic by seed.

What is asked, and where in the conversation it is said, in shares of its length, does not depend on the length: a
longer conversation has the same facts farther apart, with more talk and more facts about other people between them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from .attributes import ATTRIBUTES, NAMES
from .filler import Filler
from .questions import KINDS, TalkQuestion
from .statements import Statement
from .threads import Thread, asked_threads, cast_of, idle_threads

CHARACTERS = 4.4  # of a token, about
SESSION_TOKENS = 3000
IDLE_TOKENS = 1500  # of talk for each fact that nobody asks about
DAYS = 1000  # from the first session to the last, about
FIRST_DAY = date(2023, 1, 2)
LEAST_SESSIONS = 8
EXCHANGE = 500  # characters of a question and its answer, about


@dataclass(frozen=True, slots=True)
class TalkTurn:
    """A turn.

    Attributes:
        number: from 1, through all sessions.
        session: from 1.
        role: "user" or "assistant".
        text: what is said.
        statement: of a turn that says something about a person.
    """

    number: int
    session: int
    role: str
    text: str
    statement: Statement | None = None


@dataclass(frozen=True, slots=True)
class TalkSession:
    """The turns of a day."""

    number: int
    day: date
    turns: tuple[TalkTurn, ...]


@dataclass(frozen=True)
class LongConversation:
    """Sessions in order, and questions that are put after the last one."""

    sessions: tuple[TalkSession, ...]
    questions: tuple[TalkQuestion, ...]

    def turns(self) -> Iterator[TalkTurn]:
        """The turns of all sessions."""
        for session in self.sessions:
            yield from session.turns


def make_conversation(
    tokens: int = 100_000, seed: int = 0, asked: int = 10, filler: Sequence[str] = ()
) -> LongConversation:
    """A conversation of about so many tokens, with questions of every kind.

    Args:
        tokens: by 4.4 characters each; as many as the questions take at least.
        seed: another seed gives other people, facts and talk.
        asked: questions of each kind; their sorts take turns.
        filler: texts that assistants say between the facts. Default: talk of our own.

    Raises:
        ValueError: for numbers below 1, and for more than there are people for.
    """
    if asked < 1 or tokens < 1:
        raise ValueError(f"`tokens` and `asked` must be at least 1, got {tokens} and {asked}.")
    cast = cast_of(seed, "asked")
    threads = [asked_threads(cast, kind, sorts[n % len(sorts)]) for kind, sorts in KINDS.items() for n in range(asked)]
    # People of whom nobody asks: as many as talk of this length takes, and as there are names.
    others = min(tokens // IDLE_TOKENS, len(NAMES) // 2 * len(ATTRIBUTES) // 3)
    threads += idle_threads(cast_of(seed, "idle"), others)
    count = max(tokens // SESSION_TOKENS, LEAST_SESSIONS)
    days = [FIRST_DAY + timedelta(round(DAYS * place / count)) for place in range(count)]
    placed = _place(threads, count, days, random.Random(f"{seed} places"))
    sessions, said = _write(placed, threads, days, tokens, random.Random(f"{seed} talk {tokens}"), filler)
    return LongConversation(tuple(sessions), tuple(_questions(threads, placed, said, days)))


def _place(threads: Sequence[Thread], count: int, days: Sequence[date], chance: random.Random) -> list[list[int]]:
    """The session of each statement of each thread: ascending, each on a day of its own."""
    placed = []
    for thread in threads:
        moments = sorted(chance.random() for _ in thread.statements)
        places: list[int] = []
        for left, moment in zip(range(len(moments) - 1, -1, -1), moments, strict=True):
            place = min(int(moment * count), count - 1 - left * _apart(days))
            if places:
                place = max(place, places[-1] + _apart(days))
            places.append(place)
        placed.append(places)
    return placed


def _apart(days: Sequence[date]) -> int:
    """Sessions from one day to the next: more than one where a day has several."""
    return max(1, -(-len(days) // DAYS))


def _write(
    placed: Sequence[Sequence[int]],
    threads: Sequence[Thread],
    days: Sequence[date],
    tokens: int,
    chance: random.Random,
    filler: Sequence[str],
) -> tuple[list[TalkSession], dict[tuple[int, int], int]]:
    """Sessions, and the number of the turn of each statement, by thread and place in it."""
    due: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for thread, places in enumerate(placed):
        for step, session in enumerate(places):
            due[session].append((thread, step))
    talk, sessions, said = Filler(chance, filler), list[TalkSession](), dict[tuple[int, int], int]()
    number = characters = 0
    for place, day in enumerate(days):
        facts, goal = due[place], tokens * CHARACTERS * (place + 1) / len(days)
        chance.shuffle(facts)
        turns: list[TalkTurn] = []
        while facts or characters < goal or not turns:
            left = max(goal - characters, 0) / EXCHANGE
            statement = None
            if facts and chance.random() < (len(facts) + 0.5) / (len(facts) + left + 0.5):
                thread, step = facts.pop()
                statement = threads[thread].statements[step]
                said[thread, step] = number + 1
                words = statement.words(chance, day if threads[thread].dated else None)
                if not statement.pinned and chance.random() < 0.3:
                    words = f"{talk.small_talk()} {words}"
                pair = words, talk.acknowledgement()
            else:
                pair = talk.exchange()
            turns.append(TalkTurn(number + 1, place + 1, "user", pair[0], statement))
            turns.append(TalkTurn(number + 2, place + 1, "assistant", pair[1]))
            number, characters = number + 2, characters + len(pair[0]) + len(pair[1])
        sessions.append(TalkSession(place + 1, day, tuple(turns)))
    return sessions, said


def _questions(
    threads: Sequence[Thread],
    placed: Sequence[Sequence[int]],
    said: dict[tuple[int, int], int],
    days: Sequence[date],
) -> Iterator[TalkQuestion]:
    for number, thread in enumerate(threads):
        if not thread.kind:
            continue
        text, answer = thread.ask(tuple(days[session] for session in placed[number]))
        evidence = tuple(said[number, step] for step in thread.gold)
        yield TalkQuestion(thread.kind, thread.sort, text, answer, evidence, thread.stale, thread.seen)
