"""Who is let in: API keys, names of the server, sizes, kinds and times of bodies, and how many at once."""

import http.client
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from served import MODEL, Served, serving

from msa_hf.serving.hosts import is_loopback
from msa_hf.serving.keys import ApiKey, find_key, read_keys
from msa_hf.serving.limits import Limits

WRITER, READER = "w" * 20, "reader-key-0123456789"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = [ApiKey.of(WRITER), ApiKey.of(READER, writes=False)]
    limits = Limits(body_bytes=2000, body_seconds=1.0)
    with serving(tmp_path_factory.mktemp("guarded") / "bank", limits, keys=keys) as served:
        yield served


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


PRIVATE = [
    ("GET", "/v1/models"),
    ("GET", "/v1/documents"),
    ("GET", "/v1/documents/doc-1"),
    ("DELETE", "/v1/documents/doc-1"),
    ("PUT", "/v1/documents/doc-1"),
    ("POST", "/v1/documents"),
    ("POST", "/v1/search"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/bank"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/path"),
    ("GET", "//v1/documents"),
]


@pytest.mark.parametrize(("method", "path"), PRIVATE, ids=lambda value: value)
def test_nothing_without_a_key(guarded: Served, method: str, path: str) -> None:
    client = guarded.client()
    wrong = ["", "Bearer", f"Basic {WRITER}", WRITER, f"Bearer {WRITER}x", f"Bearer {WRITER[:-1]}"]
    for header in wrong:
        refused = client.request(method, path, headers={"Authorization": header} if header else {}, content=b"")
        assert refused.status_code == 401, (header, refused.text)
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer"
    refused = client.request(method, path, headers=[(b"Authorization", b"Bearer \xff\xfe")])
    assert refused.status_code == 401


def test_a_key_opens_what_it_may(guarded: Served) -> None:
    client = guarded.client()
    assert client.get("/healthz").status_code == 200
    question = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the reef?"}]}
    for key in (WRITER, READER):
        headers = bearer(key)
        assert client.get("/v1/documents", headers=headers).status_code == 200
        assert client.post("/v1/chat/completions", json=question, headers=headers).status_code == 200
        assert client.post("/v1/search", json={"query": "reef"}, headers=headers).status_code == 200
        assert client.get("/metrics", headers=headers).status_code == 200
    for refused in (
        client.put("/v1/documents/x", json={"text": "x"}, headers=bearer(READER)),
        client.post("/v1/documents", json={"key": "x", "text": "x"}, headers=bearer(READER)),
        client.delete("/v1/documents/doc-1", headers=bearer(READER)),
        client.delete("/v1/documents", params={"key": "doc-1"}, headers=bearer(READER)),
    ):
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert client.put("/v1/documents/x", json={"text": "x"}, headers=bearer(WRITER)).status_code == 201
    assert client.delete("/v1/documents/x", headers={"Authorization": f"bearer {WRITER}"}).status_code == 200


def test_keys_are_compared_in_constant_time_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [ApiKey.of(WRITER), ApiKey.of(READER)]
    assert WRITER not in repr(keys)
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: compared.append(1) or one == other)
    assert find_key(keys, WRITER) is keys[0] and find_key(keys, "x") is None
    assert len(compared) == 4  # a hit does not end it


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(f"\ufeff# of the team\r\n{WRITER}\r\n\r\n  {READER}  read # the page\r\n".encode())
    assert read_keys(path) == [ApiKey.of(WRITER), ApiKey.of(READER, writes=False)]
    for text, cause in (
        ("", "holds no API key"),
        ("short", "at least 16"),
        (f"{WRITER} write", "`read` behind it"),
        ("ü" * 20, "ASCII"),
        (f"{WRITER}\n{READER} read more", ":2:"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=cause) as error:
            read_keys(path)
        assert WRITER not in str(error.value)
    assert stat.S_ISREG(path.stat().st_mode)


def test_bodies_that_are_too_large(guarded: Served) -> None:
    """By what they say, and by what comes where they say nothing or less."""
    client = guarded.client()
    headers = {**JSON, **bearer(WRITER)}

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    for content in (b" " * 2001, chunks()):
        large = client.post("/v1/documents", content=content, headers=headers)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    fits = client.post("/v1/documents", content=b" " * 1950 + b'{"key": "fit", "text": "x"}', headers=headers)
    assert fits.status_code == 201


@pytest.mark.parametrize(
    "body", [b"{", b'{"key": "\xe9"}', b"[" * 1900, b'{"key": ' + b"9" * 5000 + b"}"], ids=range(4)
)
def test_bodies_that_cannot_be_decoded(server: Served, body: bytes) -> None:
    refused = server.client().post("/v1/documents", content=body, headers=JSON)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "invalid_json") and "JSON" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_bodies_that_are_no_json(guarded: Served, kind: str) -> None:
    """A form of a strange page could send these without asking the browser."""
    headers = {**bearer(WRITER), **({"Content-Type": kind} if kind else {})}
    body = b'{"key": "strange", "text": "x"}'
    refused = guarded.client().post("/v1/documents", content=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
    packed = {**bearer(WRITER), **JSON, "Content-Encoding": "gzip"}
    assert guarded.client().post("/v1/documents", content=body, headers=packed).status_code == 415
    typed = {**bearer(WRITER), "Content-Type": "Application/JSON; charset=utf-8"}
    assert guarded.client().post("/v1/documents", content=body, headers=typed).status_code in (200, 201)


def status_of_reply(connection: socket.socket) -> int:
    """The status of a reply, read to its end, in however many pieces it comes."""
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    reply.read()
    return reply.status


@pytest.mark.parametrize("before", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("piece", [b"", b"POST /v1/documents HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: y"])
def test_a_head_that_does_not_come(guarded: Served, before: bytes, piece: bytes) -> None:
    """Nor one that comes a byte at a time: connections are few, and whoever holds them keeps others out."""
    address, start = urlsplit(guarded.url), time.monotonic()
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        if before:
            connection.sendall(before)
            assert status_of_reply(connection) == 200
        connection.sendall(piece)
        connection.settimeout(0.1)
        while time.monotonic() < start + 20:
            try:
                connection.sendall(b"a" if piece.endswith(b"y") else b"")
                assert connection.recv(1000) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the connection stayed")
    assert time.monotonic() - start >= 0.9


def test_requests_that_follow_one_another_keep_their_connection(guarded: Served) -> None:
    """Also for longer than one of them may take to come."""
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), 20) as connection:
        for _ in range(8):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status_of_reply(connection) == 200
            time.sleep(0.15)


def test_a_body_that_does_not_come(guarded: Served) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), 10) as connection:
        head = f"POST /v1/documents HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {WRITER}\r\n"
        connection.sendall((head + "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{").encode())
        start = time.monotonic()
        assert status_of_reply(connection) == 408
        assert time.monotonic() - start < 8


def test_more_requests_than_may_be_in_flight(fresh: Path) -> None:
    with serving(fresh, Limits(requests=2)) as served, ThreadPoolExecutor(2) as pool:
        client = served.client()
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the reef?"}]}
        with served.busy():
            sent = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(2)]
            served.wait_for(lambda: served.application.load.running == 2)
            refused = client.get("/v1/documents")
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
        assert [item.result().status_code for item in sent] == [200, 200]


def test_a_server_without_keys_answers_to_names_of_this_machine(server: Served, fresh: Path) -> None:
    client = server.client()
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        assert client.get("/v1/documents", headers={"Host": name}).status_code == 403
    for name in ("localhost", "localhost:99", "127.0.0.1", "[::1]:8000"):
        assert client.get("/v1/documents", headers={"Host": name}).status_code == 200
    assert is_loopback("::1") and not is_loopback("0.0.0.0") and not is_loopback("10.0.0.1")
    with serving(fresh, allowed_hosts=["memory.example"]) as served:
        assert served.client().get("/v1/documents", headers={"Host": "Memory.Example:80"}).status_code == 200


def test_answers_carry_an_id_and_figures_no_names_of_clients(server: Served) -> None:
    client = server.client()
    first, second = client.get("/secret-path-1"), client.get("/v1/documents/secret-key-2")
    assert first.status_code == second.status_code == 404
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert client.request("PROPFIND", "/healthz").status_code == 405
    figures = client.get("/metrics").text
    assert "secret" not in figures and "PROPFIND" not in figures
    assert 'route="other",status="404"' in figures and "msa_hf_serve_documents 18.0" in figures


def test_other_origins_are_told_nothing(server: Served) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}
    found = server.client().options("/v1/documents/doc-1", headers=asked)
    assert found.status_code == 405 and "access-control-allow-origin" not in found.headers
    assert httpx.get(f"{server.url}healthz").headers["x-content-type-options"] == "nosniff"
