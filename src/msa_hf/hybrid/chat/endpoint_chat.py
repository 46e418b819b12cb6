"""An endpoint that speaks OpenAI's chat completions as a chat model; every wait is bounded."""

from __future__ import annotations

import importlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...json_object import JsonObject
from ...model.tokenizing_msa import tokenize
from .chat_model import Completion, Message, as_json, require_room
from .json_schema import strict

LARGEST_REPLY = 8 * 2**20  # bytes
PER_MESSAGE = 8  # tokens that a chat template adds to a message, at most
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses that may pass
GRACE = 0.25  # seconds: so that the client's own timeout, which says more, comes first
LONGEST_PAUSE = 30.0  # seconds between two attempts
SHOWN = 300  # characters of a reply that errors show


class EndpointError(OSError):
    """An endpoint that does not answer, refuses, or answers with something else than a completion."""


class _Again(Exception):
    """A failure that may pass, with the seconds that the endpoint asks to wait."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class EndpointChat:
    """A model behind an endpoint.

    Args:
        url: such as `http://localhost:8000/v1`; `/chat/completions` is added.
        model: its name there.
        api_key: sent as a bearer token; no error shows it.
        tokenizer: of the model, to count with. Default: bytes of UTF-8 are counted, which tokens never exceed.
        context_tokens: of prompt and answer together; None where the endpoint alone shall bound them.
        timeout: seconds that an attempt may take, from connecting to the last byte, however slowly bytes come.
        attempts: at most so many, for failures that may pass (statuses 408, 409, 425, 429, 5xx; no connection; no
            answer in time).
        pause: seconds before the second attempt; doubled for each further one. What the endpoint's `Retry-After` asks
            for counts instead, up to 30 seconds.
        structured: hand a schema on as `response_format`, for endpoints that know it.
        sleep: waits.

    Raises:
        ImportError: where neither httpx nor httpx2 is installed, naming the extra.
        ValueError: for an option out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context_tokens: int | None = None,
        timeout: float = 60.0,
        attempts: int = 3,
        pause: float = 0.5,
        structured: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must begin with http:// or https://, got {url!r}.")
        if not timeout > 0 or type(attempts) is not int or attempts < 1 or pause < 0:
            raise ValueError(
                f"`timeout` must be above 0, `attempts` at least 1 and `pause` at least 0, got {timeout}, {attempts} "
                f"and {pause}."
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("`api_key` has a line break, or a character that is not of ASCII; no key has.")
        self._http = _http_package()
        try:
            host = self._http.URL(url).host
        except (self._http.InvalidURL, UnicodeError) as error:
            raise ValueError(f"`url` is no address: {error} ({url!a:.200}).") from None
        if not host:
            raise ValueError(f"`url` names no host: {url!r:.200}.")
        self.url, self.name, self.tokenizer = url.rstrip("/") + "/chat/completions", model, tokenizer
        self.context_tokens, self.structured = context_tokens, structured
        self.timeout, self.attempts, self.pause, self._sleep = timeout, attempts, pause, sleep
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt, or an upper bound of them: those of the contents, and 8 for what a template adds to
        each message."""
        return sum(self._count(message.content) + PER_MESSAGE for message in messages)

    def _count(self, text: str) -> int:
        return len(text.encode()) if self.tokenizer is None else len(tokenize(self.tokenizer, text))

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        *,
        schema: Mapping[str, object] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Completion:
        """Write the next turn; see `ChatModel.complete`.

        Raises:
            EndpointError: with the endpoint, what it said, and the attempts made.
        """
        require_room(self, self.count_tokens(messages), max_new_tokens)
        request: JsonObject = {
            "model": self.name,
            "messages": as_json(messages),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "stream": False,
        }
        if schema is not None and self.structured:
            described = {"name": "answer", "strict": True, "schema": strict(schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": described}
        for attempt in range(1, self.attempts + 1):
            try:
                return self._completion(self._post(request))
            except _Again as error:
                if attempt == self.attempts:
                    times = "one attempt" if attempt == 1 else f"{attempt} attempts"
                    raise EndpointError(
                        f"{self.url}: {error} ({times} of at most {self.timeout:g} s). Is it running, and is "
                        "`timeout` long enough for it?"
                    ) from error
                wait = self.pause * 2 ** (attempt - 1) if error.wait is None else error.wait
                self._sleep(min(wait, LONGEST_PAUSE))
        raise AssertionError("unreachable")

    def _post(self, request: JsonObject) -> bytes:
        """The body of a reply with status 200.

        A client's timeout is one of every single wait, so that headers of a byte now and then would last for ever: the
        exchange has a thread of its own, which is left behind once the time is over.
        """
        outcomes: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def work() -> None:
            try:
                outcomes.put(self._exchange(request))
            except Exception as error:
                outcomes.put(error)

        threading.Thread(target=work, daemon=True, name="msa_hf-endpoint").start()
        try:
            outcome = outcomes.get(timeout=self.timeout + GRACE)
        except queue.Empty:
            raise _Again("it did not finish its answer in time") from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _exchange(self, request: JsonObject) -> bytes:
        http, end = self._http, time.monotonic() + self.timeout
        received = bytearray()
        try:
            with (
                http.Client(timeout=self.timeout, headers=self._headers) as client,
                client.stream("POST", self.url, json=request) as reply,
            ):
                for part in reply.iter_bytes():
                    received += part
                    if time.monotonic() > end:
                        raise _Again("it did not finish its answer in time")
                    if len(received) > LARGEST_REPLY:
                        raise EndpointError(f"{self.url}: its reply has more than {LARGEST_REPLY} bytes")
                status, wait = reply.status_code, _seconds(reply.headers.get("retry-after"))
        except http.TimeoutException as error:
            raise _Again(f"no answer in time ({type(error).__name__})") from error
        except http.TransportError as error:
            raise _Again(f"no connection ({type(error).__name__}: {error})") from error
        except http.HTTPError as error:
            raise EndpointError(f"{self.url}: {type(error).__name__}: {error}") from error
        if status in AGAIN:
            raise _Again(f"status {status}: {_shown(received)}", wait)
        if status != 200:
            raise EndpointError(f"{self.url}: status {status}: {_shown(received)}")
        return bytes(received)

    def _completion(self, body: bytes) -> Completion:
        try:
            record = json.loads(body)
            choice = record["choices"][0]
            text = choice["message"]["content"]
            usage = record.get("usage") or {}
            if not isinstance(text, str):
                raise TypeError(f"its content is {text!r}")
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            prompt, new = (count if type(count) is int else None for count in counts)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise EndpointError(
                f"{self.url}: its reply is no chat completion ({type(error).__name__}: {error}): {_shown(body)}"
            ) from error
        return Completion(text.strip(), choice.get("finish_reason") == "length", prompt, new)


def _http_package() -> Any:
    for name in ("httpx", "httpx2"):  # of one interface; the second came with huggingface_hub 2
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("An endpoint needs httpx: pip install 'msa-hf[endpoint]'.")


def _seconds(text: str | None) -> float | None:
    """The seconds of a Retry-After; a date, or nonsense, counts as none."""
    plain = (text or "").strip()
    return float(plain) if plain.isascii() and plain.isdigit() else None


def _shown(body: bytes | bytearray) -> str:
    text = " ".join(body[: 4 * SHOWN].decode("utf-8", "replace").split())
    return text[:SHOWN] or "(nothing)"
