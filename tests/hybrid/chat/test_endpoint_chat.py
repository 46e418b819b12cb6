"""An endpoint of OpenAI's protocol: a small real server, also one that hangs, drips, refuses, and answers garbage."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from msa_hf.hybrid.chains import ChainRunner, StepError, chain_from_dict
from msa_hf.hybrid.chat import EndpointChat, EndpointError, Message, PromptTooLong
from msa_hf.hybrid.chat import endpoint_chat as module

if not any(__import__("importlib.util").util.find_spec(name) for name in ("httpx", "httpx2")):
    pytest.skip("neither httpx nor httpx2 is installed", allow_module_level=True)

USER = [Message("user", "Where is it?")]
Behavior = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: Any, **more: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


class Server:
    """A server whose replies are a function, or a list of functions, one after the other.

    Attributes:
        requests: path, headers and body of each.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.behaviors: list[Behavior] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                behavior = outer.behaviors[min(len(outer.requests), len(outer.behaviors)) - 1]
                with contextlib.suppress(OSError):  # the client may have gone
                    behavior(self, body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def hang(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self.released.wait(20)

    def drip_body(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not self.released.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def drip_headers(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.released.wait(0.05):
            handler.wfile.write(b"a")
            handler.wfile.flush()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.released.set()
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


def chat_of(server: Server, waits: list[float], *behaviors: Behavior, **options: Any) -> EndpointChat:
    server.behaviors = list(behaviors)
    return EndpointChat(server.url, "some-model", **{"timeout": 5.0, "sleep": waits.append, **options})


def test_a_completion(server: Server, waits: list[float]) -> None:
    chat = chat_of(server, waits, lambda handler, body: reply(handler, 200, completion(" Here. ")), api_key="s3cret")
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    written = chat.complete([Message("system", "Be brief."), *USER], 20, schema=schema, seed=4)
    assert (written.text, written.cut, written.prompt_tokens, written.new_tokens) == ("Here.", False, 9, 3)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is it?"}]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("some-model", 20, 0.0, 4)
    assert body["response_format"]["json_schema"]["schema"] == {
        **schema,
        "required": ["a"],
        "additionalProperties": False,
    }
    server.behaviors = [
        lambda handler, body: reply(handler, 200, completion("cut", finish_reason="length", usage=None))
    ]
    assert chat.complete(USER, 20).cut and "response_format" not in server.requests[1][2]
    assert waits == []


def test_tokens_are_bounded_by_bytes(server: Server, waits: list[float]) -> None:
    chat = chat_of(server, waits, server.hang, context_tokens=40)
    assert chat.count_tokens([Message("user", "a\u00e9\u20ac\U0001f600")]) == 10 + 8
    with pytest.raises(PromptTooLong, match="some-model holds"):
        chat.complete([Message("user", "x" * 30)], 3)
    assert not server.requests


@pytest.mark.parametrize("way", ["hang", "drip_body", "drip_headers"])
def test_an_endpoint_that_hangs_or_drips_ends_in_time(server: Server, waits: list[float], way: str) -> None:
    chat = chat_of(server, waits, getattr(server, way), timeout=0.3, attempts=2, pause=0.1)
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r"in time.*2 attempts of at most 0\.3 s"):
        chat.complete(USER, 20)
    assert time.monotonic() - start < 4 and len(server.requests) == 2 and waits == [0.1]


def test_failures_that_may_pass_are_tried_again(server: Server, waits: list[float]) -> None:
    chat = chat_of(
        server,
        waits,
        lambda handler, body: reply(handler, 429, b"slow down", Retry_After="7"),
        lambda handler, body: reply(handler, 500, b"oops", Retry_After="tomorrow"),
        lambda handler, body: reply(handler, 503, b"", Retry_After="9999"),
        lambda handler, body: reply(handler, 200, completion("ok")),
        attempts=4,
        pause=1.0,
    )
    assert chat.complete(USER, 20).text == "ok" and waits == [7.0, 2.0, 30.0]
    server.behaviors = [lambda handler, body: reply(handler, 500, b"still\n  broken")]
    with pytest.raises(EndpointError, match=r"status 500: still broken \(4 attempts"):
        chat.complete(USER, 20)
    server.behaviors = [lambda handler, body: reply(handler, 401, b"bad key")]
    before = len(server.requests)
    with pytest.raises(EndpointError, match="status 401: bad key"):
        chat.complete(USER, 20)
    assert len(server.requests) == before + 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>welcome</html>",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {}}]}',
        completion(None),
        completion(3),
        b"[" * 50_000,
        b'{"choices": "none"}',
        b'{"error": {"message": "no such model"}}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_garbage_is_told_from_completions(server: Server, waits: list[float], body: bytes) -> None:
    chat = chat_of(server, waits, lambda handler, _: reply(handler, 200, body))
    with pytest.raises(EndpointError, match="no chat completion") as caught:
        chat.complete(USER, 20)
    assert len(server.requests) == 1 and len(str(caught.value)) < 600


def test_replies_without_end_and_no_server(server: Server, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_REPLY", 1000)
    chat = chat_of(server, waits, lambda handler, _: reply(handler, 200, b" " * 5000))
    with pytest.raises(EndpointError, match="more than 1000 bytes"):
        chat.complete(USER, 20)
    chat = chat_of(server, waits, lambda handler, _: handler.connection.close())
    with pytest.raises(EndpointError, match="no connection"):
        chat.complete(USER, 20)
    gone = EndpointChat("http://127.0.0.1:1/v1", "m", attempts=2, sleep=waits.append, api_key="s3cret")
    with pytest.raises(EndpointError, match="Is it running") as caught:
        gone.complete(USER, 20)
    assert "s3cret" not in str(caught.value)
    for options in ({"url": "localhost"}, {"timeout": 0}, {"attempts": 0}, {"pause": -1}):
        with pytest.raises(ValueError):
            EndpointChat(**{"url": "http://x", "model": "m", **options})
    for url in ("http://", "http:///v1", "http://\ud800/"):
        with pytest.raises(ValueError, match="`url`"):
            EndpointChat(url, "m")
    for key in ("s3cret\nX-Other: 1", "schl\u00fcssel"):
        with pytest.raises(ValueError, match="`api_key`") as refused:
            EndpointChat("http://x", "m", api_key=key)
        assert key not in str(refused.value)


def test_a_chain_tells_which_step_asked_an_endpoint_that_hangs(server: Server, waits: list[float]) -> None:
    chat = chat_of(server, waits, server.hang, timeout=0.2, attempts=1)
    chain = chain_from_dict({"name": "x", "steps": [{"name": "ask", "prompt": "{question}"}]})
    with pytest.raises(StepError, match=r"step ask: http.*no answer in time"):
        ChainRunner(chats={"chat": chat}).run(chain, "why?")
