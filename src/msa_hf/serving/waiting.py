"""The things that wait for the model: questions, of which several are answered together, and other work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..json_object import JsonObject
from .errors import ApiError

Turn = dict[str, str]  # `role` and `content`


@dataclass(frozen=True)
class Options:
    """The way an answer is generated.

    Attributes:
        new_tokens: at most.
        temperature: 0 for the most likely tokens.
        top_p: of what tokens are drawn from.
        seed: of the draw; None: another one every time.
        stop: texts that end the answer, and are no part of it.
    """

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def together(self) -> int | None:
        """The number that questions generated together must share; None: alone, since a draw depends on its company."""
        return self.new_tokens if self.temperature == 0 else None


@dataclass(frozen=True)
class Answered:
    """An answer, and where it comes from.

    Attributes:
        text: of the answer.
        finish_reason: `"stop"`, or `"length"` where it was cut off.
        prompt_tokens: that the answer follows, texts that were read among them.
        completion_tokens: of the answer.
        sources: documents, as JSON values.
        trace: the way to the answer, as JSON values.
        notices: what was done otherwise than a client may think.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    sources: list[JsonObject]
    trace: JsonObject
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A further piece of an answer."""

    text: str


Event = Delta | Answered | ApiError


@dataclass(eq=False)
class Question:
    """A question on its way: the event loop waits for its events, the thread of the model makes them.

    Attributes:
        turns: the messages; the last one asks.
        options: of the answer.
        param: of the request, which has them.
        sent: the text that was handed out so far.
    """

    turns: list[Turn]
    options: Options
    param: str = "messages"
    sent: str = ""
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    # On the thread of the model

    @property
    def cancelled(self) -> bool:
        """Tell whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def extend(self, text: str) -> None:
        """Hand out what an answer has become; it goes on with what was handed out before."""
        if len(text) > len(self.sent) and text.startswith(self.sent):
            new, self.sent = text[len(self.sent) :], text
            self._put(Delta(new))

    def finish(self, answered: Answered) -> None:
        """Hand out the rest, and the answer as a whole."""
        self.extend(answered.text)
        self._put(answered)

    def fail(self, error: ApiError) -> None:
        """Hand out an error in the place of an answer."""
        self._put(error)

    def _put(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # On the event loop

    def cancel(self) -> None:
        """Let the answer be: its generation ends at the next token, and whoever waits for it hears of that."""
        self._cancelled.set()
        self._events.put_nowait(ApiError(499, "The client went away.", "client_gone"))

    async def events(self) -> AsyncIterator[Delta | Answered]:
        """Pieces of the answer, and then the answer as a whole.

        Raises:
            ApiError: where it failed.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            yield event
            if isinstance(event, Answered):
                return

    async def answer(self) -> Answered:
        """The answer as a whole; errors as of `events`."""
        async for event in self.events():
            if isinstance(event, Answered):
                return event
        raise AssertionError


@dataclass(eq=False)
class Work:
    """Something else that the thread of the model does: a search, a commit."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
