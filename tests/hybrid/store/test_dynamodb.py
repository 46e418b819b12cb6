"""Tables that are no store, servers that are missing, hang, lose answers or are busy."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from msa_hf.hybrid.store import (
    DynamoDBStore,
    Item,
    StoreError,
    StoreFormatError,
    StoreUnavailable,
    VersionConflict,
    update,
)
from msa_hf.hybrid.store.item import MAX_ITEM

boto3 = pytest.importorskip("boto3")
pytestmark = pytest.mark.usefixtures("dynamodb_server")


@pytest.mark.parametrize(
    ("keys", "described"),
    [
        ({"pk": ("S", "HASH")}, "(pk S HASH)"),
        ({"pk": ("S", "HASH"), "sk": ("N", "RANGE")}, "(pk S HASH, sk N RANGE)"),
        ({"id": ("S", "HASH"), "at": ("S", "RANGE")}, "(id S HASH, at S RANGE)"),
    ],
)
def test_a_table_without_the_keys_is_refused(
    dynamodb_server: str, keys: dict[str, tuple[str, str]], described: str
) -> None:
    client = boto3.client("dynamodb", endpoint_url=dynamodb_server)
    name = "-".join(["other", *(f"{key}{type}" for key, (type, _) in keys.items())])
    client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": key, "KeyType": kind} for key, (_, kind) in keys.items()],
        AttributeDefinitions=[{"AttributeName": key, "AttributeType": type} for key, (type, _) in keys.items()],
        BillingMode="PAY_PER_REQUEST",
    )
    for create in (False, True):
        with pytest.raises(StoreFormatError) as caught:
            DynamoDBStore(name, endpoint=dynamodb_server, create=create)
        assert described in str(caught.value) and "pk S HASH, sk S RANGE" in str(caught.value)


def test_a_missing_table_and_items_of_others_are_named(dynamodb_server: str) -> None:
    with pytest.raises(StoreFormatError, match=r"no table 'missing'.*create=True makes it"):
        DynamoDBStore("missing", endpoint=dynamodb_server)
    store = DynamoDBStore("strange", endpoint=dynamodb_server, create=True)
    client = boto3.client("dynamodb", endpoint_url=dynamodb_server)
    client.put_item(TableName="strange", Item={"pk": {"S": "p"}, "sk": {"S": "s"}, "price": {"N": "3"}})
    with pytest.raises(StoreFormatError, match="an item that no store wrote"):
        store.get("p", "s")
    client.delete_table(TableName="strange")
    with pytest.raises(StoreFormatError, match="any more"):
        store.get("p", "s")


def test_boto3_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ImportError, match=r"msa-hf\[dynamodb\]"):
        DynamoDBStore("table")


def test_missing_credentials_and_regions_are_named(
    dynamodb_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(StoreError, match="Set the region"):
        DynamoDBStore("table", endpoint=dynamodb_server)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID"):
        DynamoDBStore("table", endpoint=dynamodb_server, region="us-east-1")


def test_a_server_that_is_not_there_or_hangs_is_not_waited_for(dynamodb_server: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for listening in (False, True):
            if listening:
                silent.listen()  # and never answers
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match=f"No answer from http://127.0.0.1:{port} within 0.2 s"):
                DynamoDBStore("table", endpoint=f"http://127.0.0.1:{port}", timeout=0.2, attempts=1)
            assert time.monotonic() - start < 10


# --- between store and server -----------------------------------------------------------------------------------------

Hook = Callable[[str, dict[str, Any]], str | dict[str, Any] | None]


@pytest.fixture
def proxy(dynamodb_server: str) -> Iterator[tuple[str, Callable[[Hook], None]]]:
    """A server before the server: its hook sees every request and may answer it, or have the answer lost ("lose")."""
    hooks: list[Hook] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            operation = self.headers["X-Amz-Target"].partition(".")[2]
            told = hooks[-1](operation, json.loads(body)) if hooks else None
            if isinstance(told, dict):
                status, answer = 200, json.dumps(told).encode()
            else:
                request = urllib.request.Request(dynamodb_server, body, dict(self.headers))
                try:
                    with urllib.request.urlopen(request) as response:
                        status, answer = response.status, response.read()
                except urllib.error.HTTPError as error:
                    status, answer = error.code, error.read()
            if told == "lose":
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.0")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", hooks.append
    server.shutdown()
    thread.join()
    server.server_close()


def lose(operations: tuple[str, ...], times: int) -> Hook:
    """The first answers to some operations are lost."""
    left = [times]

    def hook(operation: str, body: dict[str, Any]) -> str | None:
        if operation in operations and left[0]:
            left[0] -= 1
            return "lose"
        return None

    return hook


def test_a_write_whose_answer_was_lost_is_not_taken_for_a_conflict(proxy: tuple[str, Callable[[Hook], None]]) -> None:
    url, hook = proxy
    store = DynamoDBStore("lossy", endpoint=url, create=True)
    for expected_data in range(1, 5):  # created, then changed
        hook(lose(("PutItem",), 1))
        update(store, "p", "counter", "t", lambda data: {"n": (data or {"n": 0})["n"] + 1})
        found = store.get("p", "counter")
        assert found is not None and found.data == {"n": expected_data}
    hook(lose(("PutItem",), 1))
    with pytest.raises(VersionConflict):
        store.put(found, expected=found.version - 1)
    hook(lose(("PutItem",), 1))
    assert store.put(found).version > found.version
    hook(lose(("PutItem",), 100))
    with pytest.raises(StoreUnavailable):
        store.put(found)


def test_what_a_busy_table_leaves_of_a_batch_is_written_again(proxy: tuple[str, Callable[[Hook], None]]) -> None:
    url, hook = proxy
    store = DynamoDBStore("busy", endpoint=url, create=True, timeout=0.5)
    refused: list[int] = []

    def refuse(operation: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if operation != "BatchWriteItem" or len(refused) % 2:
            refused.append(0)
            return None
        refused.append(len(body["RequestItems"]["busy"]))
        return {"UnprocessedItems": body["RequestItems"]}

    hook(refuse)
    store.write(Item("p", f"{number:02}", "t", {}) for number in range(60))
    assert len(list(store.query("p"))) == 60 and [count for count in refused if count] == [25, 25, 10]
    hook(lambda operation, body: {"UnprocessedItems": body["RequestItems"]} if "Batch" in operation else None)
    with pytest.raises(StoreUnavailable, match=r"left 1 writes of a batch undone for 0\.5 s"):
        store.write([Item("p", "s", "t", {})])


def test_what_the_server_finds_too_large_is_said_so(dynamodb_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its count of bytes should differ from ours."""
    from msa_hf.hybrid.store import ItemTooLarge, dynamodb

    store = DynamoDBStore("large", endpoint=dynamodb_server, create=True)
    monkeypatch.setattr(dynamodb, "MAX_ITEM", 2 * MAX_ITEM)
    with pytest.raises(ItemTooLarge, match="size has exceeded"):
        store.put(Item("p", "s", "t", {"x": "y" * (MAX_ITEM + 1)}))
