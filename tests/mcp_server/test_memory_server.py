"""The server of the Model Context Protocol in this process: limits, several clients, banks without a model."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import torch
import uvicorn
from assistants import CARD, TEXTS, connected
from mcp import Client, MCPError
from mcp.shared.message import SessionMessage
from mcp.types import JSONRPCNotification, jsonrpc_message_adapter
from servers import free_port

from msa_hf.bank import BankStore
from msa_hf.cli.command_line import parser
from msa_hf.cli.mcp import check, open_bank, run, tell_failure
from msa_hf.generation import Answer, MemoryInterleave, Trace
from msa_hf.mcp_server import server as server_module
from msa_hf.mcp_server import stopping
from msa_hf.mcp_server.limits import Limits
from msa_hf.mcp_server.server import MemoryServer
from msa_hf.mcp_server.shared_bank import Options, Reader, SharedBank
from msa_hf.mcp_server.stopping import Stop
from msa_hf.mcp_server.tools import tools_for
from msa_hf.mcp_server.transports import http_app
from msa_hf.mcp_server.unreadable import Readable, id_in
from msa_hf.serving.keys import ApiKey
from msa_hf.user_errors import UserError

QUESTION = "What is the venue of the Jethefux Crossing known for?"


def test_long_texts_are_read_in_parts(directory: Path, server_of: Any) -> None:
    with connected(server_of(directory, with_model=False, limits=Limits(part=1000))) as client:
        text, offset = "", 0
        while offset is not None:
            part = client.tell("read", key="long", offset=offset)
            text, offset = text + part["text"], part["next_offset"]
            assert part["characters"] == len(TEXTS["long"]) and len(part["text"]) <= 1000
        assert text == TEXTS["long"]
        assert client.tell("read", key="long", offset=10**9)["text"] == ""


def test_without_a_model_words_are_searched_and_documents_deleted(directory: Path, server_of: Any) -> None:
    with connected(server_of(directory, with_model=False)) as client:
        assert [tool.name for tool in client.list_tools().tools] == ["search", "read", "forget"]
        told = client.tell("search", query="roses")
        assert (told["mode"], [item["key"] for item in told["documents"]]) == ("lexical", ["heights/main hall?"])
        (found,) = client.tell("search", query="Krikutust", where={"place": 0})["documents"]
        assert found["key"] == "crossing"
        assert client.tell("search", query="roses", where={"place": 0})["documents"] == []
        assert "`where`: 'place' must be" in client.refusal("search", query="roses", where={"place": {}})
        assert "needs `model`" in client.refusal("search", query="roses", mode="router")
        assert client.tell("forget", key="long")["deleted"]
        with pytest.raises(MCPError, match="no tool 'remember'"):
            client.call_tool("remember", {"key": "x", "text": "y"})


def test_read_only_takes_no_lock_and_changes_nothing(directory: Path, server_of: Any) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    with connected(server_of(directory, with_model=False, read_only=True)) as client:
        assert [tool.name for tool in client.list_tools().tools] == ["search", "read"]
        for tool in ("forget", "remember"):
            with pytest.raises(MCPError, match="no tool"):
                client.call_tool(tool, {"key": "long", "text": "x"})
        client.tell("search", query="roses")
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()} == before


def test_pages_lose_no_document_beside_changes(directory: Path, server_of: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_module, "PAGE", 1)
    with connected(server_of(directory)) as client:
        for number in range(3):
            client.tell("remember", key=f"note {number}", text=f"The note has the number {number}.")
        first = client.list_resources()
        names = [item.name for item in first.resources]
        assert names == ["bank", "crossing"]
        client.tell("forget", key="crossing")  # before the cursor, and one behind it
        client.tell("forget", key="note 1")
        cursor = first.next_cursor
        while cursor is not None:
            page = client.list_resources(cursor=cursor)
            names += [item.name for item in page.resources]
            cursor = page.next_cursor
        assert names == ["bank", "crossing", "heights/main hall?", "long", "note 0", "note 2"]
        for cursor in ("", "x", "0", f"{first.next_cursor}x", "elsewhere:1", "9" * 30):
            with pytest.raises(MCPError, match="list from the beginning"):
                client.list_resources(cursor=cursor)
        with BankStore(None, directory) as bank:
            bank.compact()
        with pytest.raises(MCPError, match="list from the beginning"):
            client.list_resources(cursor=first.next_cursor)


def test_clients_at_once_each_see_what_they_wrote(directory: Path, server_of: Any) -> None:
    server = server_of(directory)

    async def work(number: int) -> None:
        async with Client(server) as client:
            for turn in range(2):
                text = f"Client {number} wrote the number {turn}."
                told = await client.call_tool("remember", {"key": f"c{number}", "text": text})
                assert not told.is_error, told
                told = await client.call_tool("read", {"key": f"c{number}"})
                assert told.structured_content["text"] == text

    async def everybody() -> None:
        await asyncio.gather(*(work(number) for number in range(3)))

    asyncio.run(everybody())
    with BankStore(None, directory, read_only=True) as bank:
        assert len(bank) == len(TEXTS) + 3 and bank.verify() == []


def test_calls_beyond_the_limit_are_refused_at_once(directory: Path, server_of: Any, monkeypatch: Any) -> None:
    server, go = server_of(directory, with_model=False, limits=Limits(calls=2)), threading.Event()
    at_work = threading.Semaphore(0)

    def get(self: SharedBank, key: str) -> None:
        at_work.release()
        assert go.wait(60)

    monkeypatch.setattr(SharedBank, "get", get)

    async def crowd() -> list[Any]:
        async with Client(server) as client:
            waiting = [asyncio.create_task(client.call_tool("read", {"key": "x"})) for _ in range(2)]
            for _ in waiting:
                assert await asyncio.to_thread(at_work.acquire, timeout=60)
            refused = await client.call_tool("read", {"key": "x"})
            go.set()
            return [refused, *await asyncio.gather(*waiting), await client.call_tool("read", {"key": "x"})]

    said = [result.content[0].text for result in asyncio.run(crowd())]
    assert "2 calls are at work" in said[0] and all("no document" in text for text in said[1:])


@pytest.mark.parametrize("gone", [False, True], ids=["too slow", "given up"])
def test_an_answer_that_nobody_waits_for_ends(directory: Path, reader: Reader, gone: bool, monkeypatch: Any) -> None:
    clock = [0.0]  # seconds
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    bank, stop = SharedBank(directory, reader), Stop(60)

    def ask(self: MemoryInterleave, question: str, stopping_criteria: list[Any]) -> Answer:
        (criterion,) = stopping_criteria
        tokens = torch.zeros(2, 1, dtype=torch.int64)
        assert not criterion(tokens, None).any()
        if gone:
            stop.give_up()
        else:
            clock[0] = 60.0
        assert criterion(tokens, None).tolist() == [True, True]
        return Answer("half an", [], Trace(question, "router"), [])

    monkeypatch.setattr(MemoryInterleave, "ask", ask)
    with pytest.raises(TimeoutError, match="longer than"):
        bank.ask(QUESTION, stop)
    monkeypatch.undo()
    assert bank.ask(QUESTION, Stop(60))[0].text == "roses"


def test_the_model_is_waited_for_as_long_as_a_call_may_take(directory: Path, server_of: Any, reader: Reader) -> None:
    bank: Future[SharedBank] = Future()
    bank.set_result(SharedBank(directory, reader))

    def server(seconds: float) -> Any:
        return MemoryServer("test", bank, tools_for(True, False), Limits(seconds=seconds)).protocol

    with bank.result()._model_turn:
        with connected(server(0.2)) as client:
            assert "busy for longer" in client.refusal("ask", question=QUESTION)
            assert "busy for longer" in client.refusal("remember", key="x", text="y")
        with connected(server(60)) as client:
            assert client.tell("search", query="roses", mode="lexical")["documents"]


def test_faults_are_logged_and_not_told(directory: Path, server_of: Any, monkeypatch: Any, caplog: Any) -> None:
    def fail(self: SharedBank, key: str) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(SharedBank, "get", fail)
    with connected(server_of(directory, with_model=False)) as client:
        said = client.refusal("read", key="x")
        with pytest.raises(MCPError, match="fault"):
            client.read_resource("msa-hf://document/x")
    assert said == "The server has a fault (RuntimeError); its log says more." and "secret" in caplog.text


def test_a_model_without_protocol_answers_as_it_does_elsewhere(tmp_path: Path, reader: Reader) -> None:
    plain = Reader(reader.model, reader.tokenizer, None)
    bank = SharedBank(tmp_path / "bank", plain, Options(create=True))
    assert bank.search("roses", 3, None, Stop(60)) == ("router", [])
    assert bank.upsert("heights", TEXTS["heights/main hall?"], None, None, Stop(60)) == "added"
    assert [hit.key for hit in bank.search("roses", 3, None, Stop(60))[1]] == ["heights"]
    answer, documents = bank.ask(QUESTION, Stop(60))
    assert answer.token_ids and [document.key for document in documents] == ["heights"]


def test_what_cannot_be_loaded_is_told_to_whoever_calls(directory: Path, capsys: Any) -> None:
    (directory / "manifest.json").write_text("{")
    args = parser(["mcp"]).parse_args(["mcp", str(directory)])
    check(args)
    bank: Future[SharedBank] = Future()
    bank.add_done_callback(tell_failure)
    with connected(MemoryServer("test", bank, tools_for(False, False), Limits(seconds=0.1)).protocol) as client:
        assert "still being loaded" in client.refusal("search", query="roses")
        with pytest.raises(UserError) as raised:
            open_bank(args)
        bank.set_exception(raised.value)
        assert "manifest.json" in client.refusal("search", query="roses")
        with pytest.raises(MCPError, match=r"manifest\.json"):
            client.list_resources()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith("msa-hf: error: ")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["nowhere"], "nowhere: there is no bank; --create"),
        (["nowhere", "--create"], "--create needs --model"),
        (["nowhere", "--create", "--model", CARD, "--read-only"], "--create needs --model"),
        (["made", "--model", "./nobody"], "no such directory"),
        (["made", "--api-keys", "keys"], "--api-keys belongs to --http"),
        (["made", "--http", "0.0.0.0:80"], "could read and change the bank: give --api-keys"),
        (["made", "--http", "[::]:80", "--read-only"], "could read the bank"),
        (["made", "--http", "example.org:80"], "lets other machines in"),
        (["made", "--http", "web"], "must be PORT or HOST:PORT"),
        (["made", "--http", "70000"], "must be PORT or HOST:PORT"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_mistakes_of_the_command(made: Path, options: list[Any], cause: str) -> None:
    given = [str(made) if item == "made" else str(item) for item in options]
    with pytest.raises(UserError) as raised:
        check(parser(["mcp"]).parse_args(["mcp", *given]))
    assert cause in str(raised.value)


@pytest.mark.parametrize(
    ("options", "where"),
    [(["--http", "8000"], ("127.0.0.1", 8000)), (["--http", "[::1]:80"], ("::1", 80)), ([], None)],
    ids=["port", "IPv6", "none"],
)
def test_addresses(made: Path, options: list[str], where: Any) -> None:
    args = parser(["mcp"]).parse_args(["mcp", str(made), *options])
    check(args)
    assert args.http == where


def test_what_is_not_installed_is_named(made: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    for name in [name for name in sys.modules if name.startswith("msa_hf.mcp_server")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r'needs the package mcp: pip install "msa-hf\[mcp\]"'):
        run(parser(["mcp"]).parse_args(["mcp", str(made)]))


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An application on a port, in a thread."""
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        running.should_exit = True
        thread.join()


def test_http_serves_who_has_a_key(directory: Path, server_of: Any) -> None:
    keys = [ApiKey.of("a-key-that-writes"), ApiKey.of("a-key-that-reads", writes=False)]
    app = http_app(server_of(directory, with_model=False), "127.0.0.1", keys, body=100_000)
    with serving(app) as url:
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
        message["params"] = {"name": "read", "arguments": {"key": "crossing"}}

        def post(content: str = "", **headers: str | bytes) -> httpx.Response:
            known = {"accept": "application/json, text/event-stream", "content-type": "application/json"}
            return httpx.post(url, content=content or json.dumps(message), headers={**known, **headers})

        for given in ("", "Bearer a-key-that-rea", "a-key-that-reads", "Basic a-key-that-reads", "Bearer \xff"):
            refused = post(**({"authorization": given.encode("latin-1")} if given else {}))
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for key in ("Bearer a-key-that-writes", "bearer a-key-that-reads"):
            assert TEXTS["crossing"] in post(authorization=key).text
        right = {"authorization": "Bearer a-key-that-writes"}
        message["params"] = {"name": "forget", "arguments": {"key": "crossing"}}
        assert "no tool 'forget'; there are search, read" in post(authorization="Bearer a-key-that-reads").text
        assert '"deleted":true' in post(**right).text
        message["method"] = "tools/list"
        assert "forget" in post(**right).text and "forget" not in post(authorization="Bearer a-key-that-reads").text
        assert post("x" * 100_001, **right).status_code == 413
        assert post('{"text": "\\ud83d"', **right).status_code == 400


def test_http_without_keys_answers_to_this_machine_alone(directory: Path, server_of: Any) -> None:
    with serving(http_app(server_of(directory, with_model=False), "127.0.0.1", [], body=100_000)) as url:
        with connected(url) as one, connected(url) as other:
            for client in (one, other, one):
                assert client.tell("search", query="roses")["documents"][0]["key"] == "heights/main hall?"
        for name, value, status in (("host", "evil.example", 421), ("origin", "http://evil.example", 403)):
            assert httpx.post(url, json={}, headers={name: value}).status_code == status


@pytest.mark.parametrize(
    ("line", "id"),
    [
        ('{"jsonrpc":"2.0","id":7,"method":"x","params":{"text":"\\ud83d"}}', 7),
        ('{"jsonrpc":"2.0","id":7,"method":"x","params":{"text":"\udcff"}}', 7),
        (
            '{"jsonrpc":"2.0","id":"a-1","method":"x","params":{"a":DEEP}}'.replace("DEEP", "[" * 9999 + "]" * 9999),
            "a-1",
        ),
        ('{"method":"x","params":{"id":3,"a":LARGE},"jsonrpc":"2.0","id":8}\n'.replace("LARGE", "9" * 5000), 8),
        ('{"method":"x","params":{"id":3,"a":LARGE}}'.replace("LARGE", "9" * 5000), None),
        ('{"params":{"jsonrpc":"2.0","id":3,"a":', None),
        ('{"jsonrpc":"2.0","id":5}', 5),
        ('{"jsonrpc":"2.0","id":true}', None),
        ("garbage", None),
        ("[]", None),
    ],
    ids=["surrogate", "bytes", "deep", "large", "not its own", "cut", "no request", "bool", "garbage", "batch"],
)
def test_messages_that_cannot_be_read_are_answered(line: str, id: object) -> None:
    """A client that waits for the answer to its own id would wait for ever."""
    try:
        jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError as error:
        unreadable = error
    good = SessionMessage(JSONRPCNotification(jsonrpc="2.0", method="notifications/initialized"))

    async def pass_on() -> tuple[list[Any], list[Any]]:
        send, incoming = anyio.create_memory_object_stream[Any](9)
        outgoing, answers = anyio.create_memory_object_stream[Any](9)
        async with send:
            for item in (unreadable, good, unreadable, unreadable, good):
                await send.send(item)
        stream = Readable(incoming, outgoing)
        passed = [await stream.receive()]
        async with stream:
            passed += [item async for item in stream]
        outgoing.close()
        return passed, [item async for item in answers]

    passed, answers = asyncio.run(pass_on())
    assert passed == [good, good] and len(answers) == 3
    for answer in answers:
        assert answer.message.id == id and answer.message.error.code == -32700
        assert answer.message.error.message.startswith("This message cannot be read: ")
    assert id_in({"id": 3}) == 3 and id_in({}) is None
