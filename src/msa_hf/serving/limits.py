"""Limits of what clients may send and how much may go on at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

WATCHED = ("/healthz", "/metrics")  # answered whatever goes on


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: of a request; more is a 413.
        body_seconds: for sending it; more is a 408.
        seconds: of a request, waiting included; more is a 504.
        requests: in flight; one more is a 429.
        waiting: questions, searches and changes that wait for the model; one more is a 429.
        batch: questions that are generated together.
        new_tokens: that a request may ask for.
    """

    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    seconds: float = 120.0
    requests: int = 512
    waiting: int = 256
    batch: int = 8
    new_tokens: int = 2048


class BodyGate:
    """Refuses what cannot be a request of this API, before it is read: too large, too slow, no JSON, no Unicode."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with its body bounded."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (error := self.refusal(scope)) is not None:
            await error.response()(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        taken, deadline, ended = 0, loop.time() + self.limits.body_seconds, False

        async def bounded() -> Message:
            nonlocal taken, ended
            if ended:
                return await receive()  # waits for the client to go
            try:
                message = await asyncio.wait_for(receive(), max(deadline - loop.time(), 0.0))
            except TimeoutError:
                raise self.unread(large=False) from None
            taken += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if taken > self.limits.body_bytes:
                raise self.unread(large=True)
            return message

        await self.app(scope, bounded, send)

    def unread(self, large: bool) -> ApiError:
        """A body that was not read to its end."""
        close = {"Connection": "close"}
        if large:
            message = f"The body is larger than {self.limits.body_bytes} bytes; send less at once."
            return ApiError(413, message, "body_too_large", headers=close)
        message = f"The body did not come within {self.limits.body_seconds:g} seconds."
        return ApiError(408, message, "body_too_slow", headers=close)

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request may not come through, from its head alone."""
        for part in (scope.get("raw_path") or b"", scope.get("query_string") or b""):
            try:
                unquote_to_bytes(part).decode("utf-8")
            except UnicodeDecodeError:
                return ApiError(400, "The address is not UTF-8.", "invalid_address")
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get(b"content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self.limits.body_bytes:
            return self.unread(large=True)
        has_body = length != "0" or b"transfer-encoding" in headers
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if has_body and scope["method"] in ("POST", "PUT", "PATCH") and kind != "application/json":
            message = f"The body must be JSON (Content-Type: application/json), got {kind[:100] or 'no type'!r}."
            return ApiError(415, message, "unsupported_media_type")
        coding = headers.get(b"content-encoding", "identity").strip().lower()
        if has_body and coding not in ("", "identity"):
            message = f"The body must not be compressed (Content-Encoding: {coding[:100]})."
            return ApiError(415, message, "unsupported_media_type")
        return None


class LoadGate:
    """Counts requests in flight; refuses more than there may be, and all new ones once the server drains.

    Args:
        app: what is behind it.
        most: requests at once.
        rejected: told why a request was refused.

    Attributes:
        running: requests in flight.
        draining: whether the server is about to end.
    """

    def __init__(self, app: ASGIApp, most: int, rejected: Callable[[str], None]) -> None:
        self.app, self.most, self.rejected = app, most, rejected
        self.running = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on."""
        if scope["type"] != "http" or scope["path"] in WATCHED:
            await self.app(scope, receive, send)
            return
        if (error := self.refusal()) is not None:
            self.rejected(error.code)
            await error.response()(scope, receive, send)
            return
        self.running += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    def refusal(self) -> ApiError | None:
        """Why no request may come through now."""
        if self.draining:
            headers = {"Retry-After": "5", "Connection": "close"}
            return ApiError(503, "This server is ending; ask again in a moment.", "draining", headers=headers)
        if self.running >= self.most:
            message = f"{self.running} requests are in flight, as many as may be; ask again later."
            return ApiError(429, message, "too_many_requests", headers={"Retry-After": "1"})
        return None

    async def drained(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()
