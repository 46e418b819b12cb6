"""The ways in which clients reach a server: its standard input and output, or HTTP."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence

import anyio
import uvicorn
from mcp.server import Server
from mcp.server.stdio import stdio_server
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..serving.keys import ApiKey, find_key
from .unreadable import Readable

logger = logging.getLogger(__name__)
PATH = "/mcp"
DRAIN = 10  # seconds for calls at work once the server is to end
READS_ONLY = "msa_hf.reads_only"  # in the scope of a request whose key may change nothing


def serve_stdio(server: Server[object]) -> None:
    """Serve the one client that started this process, until it closes the standard input."""

    async def serve() -> None:
        # Bytes that are not UTF-8 become a message that cannot be read, instead of other text.
        lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="surrogateescape")
        async with stdio_server(stdin=anyio.wrap_file(lines)) as (incoming, outgoing):
            await server.run(Readable(incoming, outgoing), outgoing, server.create_initialization_options())

    anyio.run(serve)


def http_app(server: Server[object], host: str, keys: Sequence[ApiKey], body: int) -> ASGIApp:
    """The application that serves any number of clients over streamable HTTP at `/mcp`.

    Args:
        host: address that it listens on. Without keys, on one of this machine alone, other `Host` headers are refused,
            so that no page in a browser reaches it by a name of its own.
        keys: one of which clients must send as `Authorization: Bearer KEY`; none: everybody may.
        body: bytes of a request at most.
    """
    app: ASGIApp = server.streamable_http_app(
        streamable_http_path=PATH, stateless_http=True, json_response=True, max_request_body_size=body, host=host
    )
    return KeyRequired(app, keys) if keys else app


def serve_http(app: ASGIApp, host: str, port: int) -> None:
    """Serve an application until a signal ends the process; calls at work are answered first."""
    logger.info("Serving http://%s:%d%s", f"[{host}]" if ":" in host else host, port, PATH)
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=DRAIN)


class KeyRequired:
    """Lets requests through that have one of the keys, and says which may change nothing."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app, self._keys = app, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with status 401."""
        if scope["type"] == "http":
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            key = find_key(self._keys, given.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                refusal = {"error": "This server wants an API key: send `Authorization: Bearer KEY`."}
                await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
            scope[READS_ONLY] = not key.writes
        await self._app(scope, receive, send)
