"""The names that a server without API keys answers to.

A page of a stranger whose name was made to point to this machine could otherwise talk to it through a user's browser.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class HostGate:
    """Lets requests to addresses of this machine through, and to names that were allowed."""

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app, self.allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on."""
        from .errors import ApiError

        if scope["type"] == "http":
            given = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
            if not is_loopback(name) and name.lower() not in self.allowed:
                message = (
                    f"Without API keys this server answers to localhost, not to {name[:100]!r}; give it keys, or "
                    "allow the name with --allow-host."
                )
                await ApiError(403, message, "unknown_host").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
