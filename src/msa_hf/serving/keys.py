"""API keys: who may ask, and who may change documents."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from .errors import ApiError  # which needs FastAPI; keys do not

SHORTEST = 16  # characters of a key
OPEN = ("/", "/healthz", "/page/")  # what the page is made of holds no data; it asks for the key itself
ASKING = ("/v1/chat/completions", "/v1/completions", "/v1/search")  # POST, but they change nothing


@dataclass(frozen=True)
class ApiKey:
    """A key as the server keeps it.

    Attributes:
        digest: SHA-256 of the key; the key itself is not kept.
        writes: whether it may change documents.
    """

    digest: bytes
    writes: bool

    @classmethod
    def of(cls, text: str, writes: bool = True) -> ApiKey:
        """From a key as users have it.

        Raises:
            ValueError: for one that is too short or has characters that no header can carry.
        """
        if len(text) < SHORTEST:
            raise ValueError(f"an API key has at least {SHORTEST} characters, got {len(text)}")
        if not (text.isascii() and text.isprintable()) or " " in text:
            raise ValueError("an API key consists of printable ASCII characters without spaces")
        return cls(_digest(text), writes)


def read_keys(path: str | Path) -> list[ApiKey]:
    """The keys of a file: one per line, `read` behind those that may not change documents; `#` begins a comment.

    Raises:
        ValueError: for a file without a key and a line that is none, named by its number: keys are not printed.
        OSError: where the file cannot be read.
    """
    keys = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[1:] not in ([], ["read"]):
            raise ValueError(f"{path}:{number}: a line is a key, with `read` behind it or nothing")
        try:
            keys.append(ApiKey.of(words[0], writes=not words[1:]))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not keys:
        raise ValueError(f"{path}: holds no API key")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def find_key(keys: Iterable[ApiKey], given: str) -> ApiKey | None:
    """The key that was given. All are compared, each in constant time, so that the time tells nothing."""
    digest, found = _digest(given), None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


class KeyGate:
    """Lets requests with a key through, to what it may do; all of them where there are no keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self.app, self.keys = app, tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on."""
        if scope["type"] == "http" and self.keys and (error := self.refusal(scope)) is not None:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request may not come through."""
        from .errors import ApiError

        path, method = scope["path"], scope["method"]
        if path in OPEN or path.startswith(OPEN[-1]):
            return None
        challenge = {"WWW-Authenticate": "Bearer"}
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            message = "This server wants an API key: send `Authorization: Bearer KEY`."
            return ApiError(401, message, "missing_api_key", headers=challenge)
        key = find_key(self.keys, given.strip())
        if key is None:
            return ApiError(401, "This API key is not one of this server's.", "invalid_api_key", headers=challenge)
        if not key.writes and method not in ("GET", "HEAD") and path not in ASKING:
            return ApiError(403, "This API key may read, and not change documents.", "read_only_key")
        return None
