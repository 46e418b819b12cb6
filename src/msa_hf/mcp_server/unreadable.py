"""Answers to messages that cannot be read, whose sender would wait for ever."""

from __future__ import annotations

import json
import re
from types import TracebackType
from typing import Protocol

from mcp import ErrorData, JSONRPCError, types
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

RequestId = int | str | None
ID = r'"id"\s*:\s*(-?\d{1,15}|"[^"\\]{1,100}")'
VERSION = r'"jsonrpc"\s*:\s*"2\.0"'
# Where an id is the message's own for certain: before anything nested, or directly before the end.
FIRST_ID = re.compile(rf"\s*\{{\s*(?:{VERSION}\s*,\s*)?{ID}")
LAST_ID = re.compile(rf"{ID}(?:\s*,\s*{VERSION})?\s*\}}\s*$")


class Incoming(Protocol):
    """Messages, and the errors of those that cannot be read."""

    async def receive(self) -> SessionMessage | Exception: ...
    async def aclose(self) -> None: ...
    def __aiter__(self) -> Incoming: ...
    async def __anext__(self) -> SessionMessage | Exception: ...
    async def __aenter__(self) -> Incoming: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


class Outgoing(Protocol):
    """The stream that answers go to."""

    async def send(self, item: SessionMessage, /) -> None: ...


class Readable:
    """A stream of messages without those that cannot be read, which are answered with an error.

    Args:
        incoming: all of them.
        outgoing: where answers go.
    """

    def __init__(self, incoming: Incoming, outgoing: Outgoing) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    async def receive(self) -> SessionMessage | Exception:
        """The next message that can be read."""
        return await self._next(await self._incoming.receive())

    async def _next(self, item: SessionMessage | Exception) -> SessionMessage | Exception:
        while isinstance(item, ValidationError):
            cause = item.errors(include_url=False)[0]
            refusal = ErrorData(code=types.PARSE_ERROR, message=f"This message cannot be read: {cause['msg']}.")
            answer = JSONRPCError(jsonrpc="2.0", id=id_in(cause["input"]), error=refusal)
            await self._outgoing.send(SessionMessage(answer))
            item = await self._incoming.__anext__()
        return item

    async def aclose(self) -> None:
        """Close the stream."""
        await self._incoming.aclose()

    def __aiter__(self) -> Readable:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        return await self._next(await self._incoming.__anext__())

    async def __aenter__(self) -> Readable:
        await self._incoming.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._incoming.__aexit__(kind, error, trace)


def id_in(message: object) -> RequestId:
    """The id of a message that is JSON or should have been; None where it is not certain."""
    found: object = message
    if isinstance(message, str):
        try:
            found = json.loads(message)
        except (ValueError, RecursionError):
            place = FIRST_ID.match(message) or LAST_ID.search(message)
            return None if place is None else json.loads(place[1])
    given = found.get("id") if isinstance(found, dict) else None
    return given if isinstance(given, int | str) and not isinstance(given, bool) else None
