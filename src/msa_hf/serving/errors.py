"""Errors as clients of OpenAI's API expect them: a status, and an object that says what is wrong with what."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..json_object import JsonObject
from ..model.bank_format_msa import BankError

if TYPE_CHECKING:
    from starlette.responses import Response

logger = logging.getLogger(__name__)
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SHOWN = 200  # characters of what a client sent, in a message


class ApiError(HTTPException):
    """A request that is refused or failed.

    Args:
        status: of the HTTP response.
        message: cause and remedy, for people.
        code: for programs.
        param: the parameter that is at fault.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def to_dict(self) -> JsonObject:
        """The object that clients get."""
        kind = KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response."""
        return JSONResponse(self.to_dict(), self.status_code, self.headers)


def bad_parameter(param: str, message: str) -> ApiError:
    """A parameter that cannot be what it is."""
    return ApiError(400, f"`{param}`: {message}", "invalid_parameter", param)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of an app in this shape."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error.errors(), error.body).response()

    async def not_served(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:SHOWN]
        if error.status_code == 404:
            found = ApiError(404, f"There is nothing at {request.method} {path!r}.", "not_found")
        elif error.status_code == 405:
            found = ApiError(405, f"{path!r} does not take {request.method}.", "method_not_allowed")
        elif error.status_code == 400:  # a body on which decoding gave up
            message = (
                "The body cannot be read as JSON: it must be UTF-8, without thousands of brackets inside each other or "
                "numbers of thousands of digits."
            )
            found = ApiError(400, message, "invalid_json")
        else:
            found = ApiError(error.status_code, str(error.detail), "invalid_request")
        found.headers = error.headers
        return found.response()

    async def failed(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, not_served)
    app.add_exception_handler(BankError, failed)
    app.add_exception_handler(Exception, failed)


def api_error(error: Exception) -> ApiError:
    """An error as clients get it. Faults of the server are told to its log, and to the client only that there was
    one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BankError):
        logger.error("the bank cannot be used: %s", error)
        return ApiError(503, "The bank cannot be used now; the log of the server says why.", "bank_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed at this request; its log says why.", "internal_error")


def _of_validation(errors: Sequence[Mapping[str, object]], body: object) -> ApiError:
    """The first thing that is wrong with a request."""
    # Of alternatives, the one that came farthest; where none did, one whose fields are there.
    first = max(errors, key=lambda error: (len(_place(error)), error["type"] not in ("missing", "extra_forbidden")))
    place = _place(first)
    source, rest = (place[0], place[1:]) if place else ("body", [])
    if first["type"] == "json_invalid":
        context = first.get("ctx")
        detail = context.get("error", "") if isinstance(context, dict) else ""
        return ApiError(400, f"The body is not JSON: {detail}.", "invalid_json")
    param = _param(rest, body) if source == "body" else ".".join(map(str, rest))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: `{param}`.", "unknown_parameter", param)
    if first["type"] == "missing" and not param:
        return ApiError(400, "The request has no body; send a JSON object.", "missing_body")
    if first["type"] == "missing":
        return ApiError(400, f"`{param}` is missing.", "missing_parameter", param)
    message = str(first["msg"]).removeprefix("Value error, ")
    if not param and (named := re.match(r"`(\w+)`", message)):
        param = named.group(1)
    text = f"`{param}`: {message}" if param and not message.startswith("`") else message
    return ApiError(400, text.rstrip(".") + ".", "invalid_parameter", param or None)


def _place(error: Mapping[str, object]) -> list[object]:
    return list(error["loc"]) if isinstance(error["loc"], tuple) else []


def _param(place: Sequence[object], body: object) -> str:
    """The name of a place in a body, as `messages[0].content`; alternatives of a type are no part of it."""
    name, value = "", body
    for part in place:
        if isinstance(part, int) and isinstance(value, list):
            name += f"[{part}]"
            value = value[part] if part < len(value) else None
        elif isinstance(part, str) and (isinstance(value, dict) and (part in value or part == place[-1])):
            name += f".{part}" if name else part
            value = value.get(part)
    return name[:SHOWN]
