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
    """A server before the server: its hook sees every request and may answer it, have the answer lost ("lose"), or the
    request ("drop")."""
    hooks: list[Hook] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            operation = self.headers["X-Amz-Target"].partition(".")[2]
            told = hooks[-1](operation, json.loads(body)) if hooks else None
            if told == "drop":
                self.close_connection = True
                return
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
        hook(lose(("UpdateItem",), 1))
        update(store, "p", "counter", "t", lambda data: {"n": (data or {"n": 0})["n"] + 1})
        found = store.get("p", "counter")
        assert found is not None and found.data == {"n": expected_data}
    hook(lose(("UpdateItem",), 1))
    with pytest.raises(VersionConflict):
        store.put(found, expected=found.version - 1)
    hook(lose(("UpdateItem",), 1))
    assert store.put(found).version > found.version
    hook(lose(("UpdateItem",), 100))
    with pytest.raises(StoreUnavailable):
        store.put(found)


def between(first: str, meanwhile: Callable[[], object], operation: str = "UpdateItem") -> Hook:
    """The first request of an operation, or its answer, is lost, and something happens before it is sent again."""
    seen: list[str] = []

    def hook(name: str, body: dict[str, Any]) -> str | None:
        if name == operation:
            seen.append(name)
            if len(seen) == 1:
                return first
            if len(seen) == 2:
                meanwhile()
        return None

    return hook


def one_more(data: dict[str, Any] | None) -> dict[str, Any]:
    return {"n": (data or {"n": 0})["n"] + 1}


@pytest.mark.parametrize("lost", ["lose", "drop"])
@pytest.mark.parametrize("others", [1, 4])
@pytest.mark.parametrize("there", [False, True])
def test_a_change_is_made_once_though_others_came_between_its_two_sendings(
    proxy: tuple[str, Callable[[Hook], None]], dynamodb_server: str, lost: str, others: int, there: bool
) -> None:
    """The first sending was written and then overwritten, or it never arrived: the second one cannot see which."""
    (url, hook), name = proxy, f"between-{lost}-{others}-{there}"
    with (
        DynamoDBStore(name, endpoint=url, create=True) as store,
        DynamoDBStore(name, endpoint=dynamodb_server) as other,
    ):
        for _ in range(3 * there):
            update(other, "p", "n", "t", one_more)
        hook(between(lost, lambda: [update(other, "p", "n", "t", one_more) for _ in range(others)]))
        update(store, "p", "n", "t", one_more)
        found = other.get("p", "n")
        assert found is not None and found.data == {"n": 3 * there + others + 1}


def test_where_nobody_can_know_whether_a_write_was_done_it_is_said(
    proxy: tuple[str, Callable[[Hook], None]], dynamodb_server: str
) -> None:
    """Too many others wrote, or deleted: a conflict would promise that nothing was written."""
    url, hook = proxy
    store, other = DynamoDBStore("nobody", endpoint=url, create=True), DynamoDBStore("nobody", endpoint=dynamodb_server)
    item = Item("p", "s", "t", {})

    def again() -> None:
        other.delete("p", "s")
        other.put(item)

    for meanwhile in (lambda: [other.put(item) for _ in range(6)], lambda: other.delete("p", "s"), again):
        version = other.put(item).version
        hook(between("lose", meanwhile))
        with pytest.raises(StoreUnavailable, match=r"may have been done or not\. Read before repeating it"):
            store.put(item, expected=version)


def test_what_was_deleted_though_the_answer_was_lost_counts_as_deleted(
    proxy: tuple[str, Callable[[Hook], None]], dynamodb_server: str
) -> None:
    url, hook = proxy
    store, other = DynamoDBStore("gone", endpoint=url, create=True), DynamoDBStore("gone", endpoint=dynamodb_server)
    item = Item("p", "s", "t", {})
    hook(lose(("DeleteItem",), 1))
    assert store.delete("p", "s", expected=other.put(item).version) is True
    hook(lose(("DeleteItem",), 1))
    other.put(item)
    assert store.delete("p", "s") is True and store.delete("p", "s") is False
    for lost, error in (("lose", StoreUnavailable), ("drop", VersionConflict)):
        version = other.put(item).version
        hook(between(lost, lambda: other.put(item), "DeleteItem"))
        with pytest.raises(error):
            store.delete("p", "s", expected=version)


def test_nothing_is_deleted_before_all_is_written(proxy: tuple[str, Callable[[Hook], None]]) -> None:
    """A busy table does a part of a batch, and the writer may end before the rest: then both are there."""
    url, hook = proxy
    store = DynamoDBStore("order", endpoint=url, create=True)
    hasty = DynamoDBStore("order", endpoint=url, timeout=0.3)
    store.write([Item("p", "old", "t", {}), Item("p", "older", "t", {})])
    asked: list[str] = []

    def refuse_puts(operation: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if operation != "BatchWriteItem":
            return None
        kinds = {next(iter(request)) for request in body["RequestItems"]["order"]}
        asked.extend(kinds)
        return {"UnprocessedItems": body["RequestItems"]} if "PutRequest" in kinds else None

    hook(refuse_puts)
    with pytest.raises(StoreUnavailable):
        hasty.write([Item("p", "new", "t", {})], [("p", "old"), ("p", "older")])
    assert set(asked) == {"PutRequest"}
    assert [item.sort for item in store.query("p")] == ["old", "older"]
    hook(lambda operation, body: None)
    store.write([Item("p", "new", "t", {}), Item("p", "both", "t", {})], [("p", "old"), ("p", "older"), ("p", "both")])
    assert [item.sort for item in store.query("p")] == ["new"]


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"attempts": 1.5}, {"timeout": 0}, {"timeout": float("nan")}])
def test_settings_that_are_none_are_named(dynamodb_server: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        DynamoDBStore("settings", endpoint=dynamodb_server, **wrong)


def test_what_a_busy_table_leaves_of_a_batch_is_written_again(proxy: tuple[str, Callable[[Hook], None]]) -> None:
    url, hook = proxy
    store = DynamoDBStore("busy", endpoint=url, create=True)
    hasty = DynamoDBStore("busy", endpoint=url, timeout=1.0)
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
    with pytest.raises(StoreUnavailable, match=r"left 1 writes of a batch undone for 1 s"):
        hasty.write([Item("p", "s", "t", {})])


def test_what_the_server_finds_too_large_is_said_so(dynamodb_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If its count of bytes should differ from ours."""
    from msa_hf.hybrid.store import ItemTooLarge, dynamodb

    store = DynamoDBStore("large", endpoint=dynamodb_server, create=True)
    monkeypatch.setattr(dynamodb, "MAX_ITEM", 2 * MAX_ITEM)
    with pytest.raises(ItemTooLarge, match="exceeded the maximum allowed size"):
        store.put(Item("p", "s", "t", {"x": "y" * (MAX_ITEM + 1)}))
