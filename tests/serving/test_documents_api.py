"""Documents over HTTP: every change is one commit that the next question sees, and says what it expects to find."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from served import MODEL, Served, serving

from msa_hf.bank import BankDamaged, BankStore

KEYS = [
    "a",
    "with space",
    "a/b",
    "a//b",
    "/",
    "..",
    "a/../b",
    "%2e",
    "?x=1#y",
    "é",
    "\U0001f40b",
    "a\nb",
    "a\n",
    "\n",
    "\r\n\u2028",
    "<b>",
    "'\"\\",
    ".",
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("documents") / "bank") as served:
        yield served


@pytest.fixture(scope="module")
def documents(own: Served) -> httpx.Client:
    return own.client()


def put(client: httpx.Client, key: str, text: str, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    return client.put(f"/v1/documents/{key}", json={"text": text, **fields}, headers=headers)


def test_a_document_comes_changes_and_goes(documents: httpx.Client) -> None:
    made = put(documents, "one", "The first text.", metadata={"year": 1889})
    assert (made.status_code, made.json()["created"], made.json()["version"]) == (201, True, 1)
    shown = documents.get("/v1/documents/one")
    assert shown.json()["text"] == "The first text." and shown.json()["metadata"] == {"year": 1889}
    assert shown.headers["etag"] == made.headers["etag"]
    assert documents.get("/v1/documents/one", headers={"If-None-Match": made.headers["etag"]}).status_code == 304
    again = put(documents, "one", "The first text.", metadata={"year": 1889})
    assert (again.status_code, again.json()["changed"], again.json()["version"]) == (200, False, 1)
    other = put(documents, "one", "Another text.")
    assert (other.status_code, other.json()["changed"], other.json()["version"]) == (200, True, 2)
    assert other.json()["id"] == made.json()["id"] and other.headers["etag"] != made.headers["etag"]
    assert documents.delete("/v1/documents/one").json()["deleted"] is True
    assert documents.delete("/v1/documents/one").status_code == 404
    assert documents.get("/v1/documents/one").json()["error"]["code"] == "document_not_found"
    back = put(documents, "one", "It is back.")
    assert back.json()["version"] == 3 and back.json()["id"] != made.json()["id"]
    documents.delete("/v1/documents/one")


def test_a_change_for_another_state_is_a_conflict(documents: httpx.Client) -> None:
    first = put(documents, "two", "Text.")
    stale, put_two = first.headers["etag"], put(documents, "two", "Text two.", expected_version=1)
    assert put_two.json()["version"] == 2
    for refused in (
        put(documents, "two", "Lost.", expected_version=1),
        put(documents, "two", "Lost.", expected_version=0),
        put(documents, "two", "Lost.", version=2),
        put(documents, "two", "Lost.", version=1),
        put(documents, "two", "Lost.", headers={"If-Match": stale}),
        put(documents, "two", "Lost.", headers={"If-None-Match": "*"}),
        put(documents, "not there", "Lost.", headers={"If-Match": "*"}),
        put(documents, "not there", "Lost.", expected_version=3),
        documents.delete("/v1/documents/two", params={"expected_version": 1}),
        documents.delete("/v1/documents/two", headers={"If-Match": stale}),
    ):
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_conflict"), refused.text
    assert documents.get("/v1/documents/two").json()["text"] == "Text two."
    assert documents.get("/v1/documents/not there").status_code == 404
    same = put(documents, "two", "Text two.", version=2)  # an event that comes twice
    assert (same.status_code, same.json()["changed"]) == (200, False)
    current = put_two.headers["etag"]
    assert put(documents, "two", "Three.", headers={"If-Match": f'"x", {current}'}).status_code == 200
    assert put(documents, "two", "Far.", version=99).json()["version"] == 99
    gone = documents.delete("/v1/documents/two", params={"expected_version": 99})
    assert gone.status_code == 200
    assert put(documents, "two", "Late.", version=98).status_code == 409  # deleted behind it
    assert put(documents, "fresh", "New.", expected_version=0).status_code == 201


def test_errors_of_a_change_name_what_asked_for_it(documents: httpx.Client) -> None:
    put(documents, "named", "Text.")
    wanted = {
        "expected_version": put(documents, "named", "Lost.", expected_version=7),
        "If-Match": put(documents, "named", "Lost.", headers={"If-Match": '"x"'}),
        "If-None-Match": put(documents, "named", "Lost.", headers={"If-None-Match": "*"}),
        "version": put(documents, "named", "Lost.", version=1),
    }
    for second, param in (
        ({"key": "named", "text": "Lost.", "expected_version": 7}, "documents[1].expected_version"),
        ({"key": "named", "text": "Lost.", "version": 1}, "documents[1].version"),
        ({"key": "named", "text": " "}, "documents[1].text"),
        ({"key": "named", "text": "long " * 9999}, "documents[1].text"),
        ({"key": "other", "text": "Lost."}, "documents[1].key"),
    ):
        body = {"documents": [{"key": "other", "text": "Text."}, second]}
        wanted[f"{param} {second['text'][:5]}"] = documents.post("/v1/documents", json=body)
    for name, answer in wanted.items():
        assert answer.json()["error"]["param"] == name.partition(" ")[0], answer.text
        assert answer.status_code in (400, 409)
    assert documents.get("/v1/documents/named").json()["text"] == "Text."
    assert documents.get("/v1/documents/other").status_code == 404


def test_a_document_of_version_0_is_there(documents: httpx.Client) -> None:
    """Who expects none does not write over it."""
    assert put(documents, "zero", "Text.", version=0, expected_version=0).json()["version"] == 0
    for refused in (
        put(documents, "zero", "Lost.", expected_version=0),
        put(documents, "zero", "Lost.", version=5, expected_version=0),
        documents.delete("/v1/documents/zero", params={"expected_version": 0}),
    ):
        assert refused.status_code == 409 and "no document was expected" in refused.json()["error"]["message"]
    assert documents.get("/v1/documents/zero").json()["text"] == "Text."


def test_behind_the_last_version_nothing_changes(documents: httpx.Client) -> None:
    most = 2**62
    assert put(documents, "last", "Text.", version=most).json()["version"] == most
    assert put(documents, "last", "Text.").json()["changed"] is False
    answer = put(documents, "last", "Another.")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "version")
    assert "2^62" in answer.json()["error"]["message"] and "another key" in answer.json()["error"]["message"]
    assert documents.get("/v1/documents/last").json()["text"] == "Text."
    several = {"documents": [{"key": "new", "text": "Text."}, {"key": "last", "text": "Another."}]}
    assert documents.post("/v1/documents", json=several).json()["error"]["param"] == "documents[1].version"
    assert documents.get("/v1/documents/new").status_code == 404
    assert documents.delete("/v1/documents/last", params={"expected_version": most}).status_code == 200
    assert put(documents, "last", "Back.").json()["error"]["code"] == "version_exhausted"


def test_a_query_that_is_not_understood_changes_nothing(documents: httpx.Client) -> None:
    put(documents, "kept", "Text.")
    for answer, param in (
        (documents.delete("/v1/documents/kept?expectedversion=9"), "expectedversion"),
        (documents.delete("/v1/documents?key=kept&version=9"), "version"),
        (documents.delete("/v1/documents/kept?expected_version=9&expected_version=1"), "expected_version"),
        (documents.put("/v1/documents/kept?expected_version=9", json={"text": "Lost."}), "expected_version"),
        (documents.post("/v1/documents?expected_version=9", json={"key": "kept", "text": "Lost."}), "expected_version"),
        (documents.get("/v1/documents?offset=3"), "offset"),
        (documents.get("/v1/documents/kept?version=1"), "version"),
        (documents.post("/v1/search?k=3", json={"query": "text"}), "k"),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert documents.get("/v1/documents/kept").json()["text"] == "Text."


def test_of_many_that_change_the_same_one_wins(documents: httpx.Client) -> None:
    """No update is lost: as many as were counted came through."""
    put(documents, "counter", "0")

    def add(_: int) -> None:
        while True:
            found = documents.get("/v1/documents/counter")
            text = str(int(found.json()["text"]) + 1)
            if put(documents, "counter", text, headers={"If-Match": found.headers["etag"]}).status_code == 200:
                return

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(12)))
    assert documents.get("/v1/documents/counter").json()["text"] == "12"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_can_be_named(documents: httpx.Client, key: str) -> None:
    made = documents.post("/v1/documents", json={"key": key, "text": f"Text of {key!r}."})
    assert made.status_code == 201, made.text
    shown = documents.get("/v1/documents", params={"key": key})
    assert (shown.json()["key"], shown.json()["text"]) == (key, f"Text of {key!r}.")
    if key not in (".", "..", "a/../b"):  # no path holds these
        path = f"/v1/documents/{quote(key, safe='')}"
        assert documents.get(path).json()["key"] == key
        assert put(documents, quote(key, safe=""), "Other.").json()["key"] == key
        assert documents.delete(path).json()["key"] == key
        assert put(documents, quote(key, safe=""), "Again.").status_code == 201
    assert documents.delete("/v1/documents", params={"key": key}).status_code == 200
    assert documents.get("/v1/documents", params={"key": key}).status_code == 404


def test_several_come_in_one_commit_or_not_at_all(own: Served, documents: httpx.Client) -> None:
    before = own.service.store.generation
    many = [{"key": f"many-{place}", "text": f"Text {place}."} for place in range(5)]
    done = documents.post("/v1/documents", json={"documents": many})
    assert done.status_code == 200 and all(item["created"] for item in done.json()["data"])
    assert own.service.store.generation == before + 1
    many[0]["text"], many[4] = "Changed.", {"key": "many-4", "text": "Changed.", "expected_version": 7}
    assert documents.post("/v1/documents", json={"documents": many}).status_code == 409
    assert documents.get("/v1/documents/many-0").json()["text"] == "Text 0."
    twice = documents.post("/v1/documents", json={"documents": [many[0], many[0]]})
    assert twice.status_code == 400 and "many-0" in twice.json()["error"]["message"]


def test_pages_show_every_document_once_while_others_come_and_go(documents: httpx.Client) -> None:
    for place in range(7):
        put(documents, f"page-{place}", f"Text {place}.")
    seen: list[str] = []
    after = -1
    while True:
        page = documents.get("/v1/documents", params={"limit": 3, "after": after}).json()
        seen += [item["key"] for item in page["data"]]
        put(documents, "page-0", f"Replaced {after}.")  # moves its row, not its id
        if not page["has_more"]:
            break
        assert page["next"] == page["data"][-1]["id"]
        after = page["next"]
    assert len(seen) == len(set(seen)) == page["total"] and {f"page-{place}" for place in range(7)} <= set(seen)
    assert documents.get("/v1/documents", params={"after": 10**9}).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": " \n"}, "text"),
        ({"text": 5}, "text"),
        ({}, "text"),
        ({"text": "a", "version": -1}, "version"),
        ({"text": "a", "version": "3"}, "version"),
        ({"text": "a", "version": 2**63}, "version"),
        ({"text": "a", "expected_version": 1.5}, "expected_version"),
        ({"text": "a", "metadata": [1]}, "metadata"),
        ({"text": "a", "meta": {}}, "meta"),
        ({"text": "half \ud83d"}, "text"),
        ({"text": "a", "metadata": {"x": "half \ud83d"}}, "metadata"),
        ({"text": "a", "metadata": {"x": float("nan")}}, "metadata"),
    ],
)
def test_documents_that_are_none_are_refused(documents: httpx.Client, body: dict[str, Any], param: str) -> None:
    content = json.dumps(body).encode()
    answer = documents.put("/v1/documents/bad", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert documents.get("/v1/documents/bad").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1/documents?limit=0",
        "/v1/documents?limit=many",
        "/v1/documents?after=-2",
        "/v1/documents?key=",
        "/v1/documents/%ff",
    ],
)
def test_addresses_that_are_none_are_refused(documents: httpx.Client, path: str) -> None:
    answer = documents.get(path)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_tags_that_are_none_are_refused(documents: httpx.Client) -> None:
    assert put(documents, "tags", "a", headers={"If-Match": "unquoted"}).status_code == 400
    assert put(documents, "k" * 1025, "a").status_code == 400
    assert documents.patch("/v1/documents/tags", json={}).status_code == 405


def test_a_commit_is_seen_by_the_next_request(fresh: Path) -> None:
    with serving(fresh) as served:
        client = served.client()
        question = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the reef?"}], "trace": True}

        def chosen() -> set[str]:
            answer = client.post("/v1/chat/completions", json=question)
            assert answer.status_code == 200, answer.text
            return {item["key"] for found in answer.json()["trace"]["rounds"][0]["chosen"].values() for item in found}

        gone = list(chosen())
        for key in gone:
            client.delete("/v1/documents", params={"key": key})
        assert not set(gone) & chosen()
        for row in client.get("/v1/documents").json()["data"]:
            client.delete("/v1/documents", params={"key": row["key"]})
        assert chosen() == set()  # of an empty bank
        put(client, "only", "The reef is far.")
        assert chosen() == {"only"}


def test_searches_find_what_was_put_in(documents: httpx.Client) -> None:
    put(documents, "searched", "The heron nests by the weir.")
    found = documents.post("/v1/search", json={"query": "Where does the heron nest?", "k": 100}).json()
    assert found["mode"] == "router" and "searched" in [hit["key"] for hit in found["data"]]
    hit = next(item for item in found["data"] if item["key"] == "searched")
    assert "heron" in [part["text"].strip() for part in hit["passage"] if part["marked"]]
    put(documents, "other heron", "The heron nests by the weir.", metadata={"year": 1889})
    for year, keys in ((1889, ["other heron"]), ([1889, 1890], ["other heron"]), (1890, [])):
        found = documents.post("/v1/search", json={"query": "heron", "where": {"year": year}}).json()
        assert [hit["key"] for hit in found["data"]] == keys
    for body, param in (
        ({"query": ""}, "query"),
        ({"query": "a", "k": 0}, "k"),
        ({"query": "a", "mode": "magic"}, "mode"),
        ({"query": "a", "mode": "lexical"}, "mode"),
        ({}, "query"),
        ({"query": "a", "where": ["year"]}, "where"),
        ({"query": "a", "where": {"year": {"$gt": 3}}}, "where"),
        ({"query": "word " * 4000}, "query"),  # more than the model has positions for
    ):
        refused = documents.post("/v1/search", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_reading_beside_a_writer_follows_it(fresh: Path) -> None:
    with serving(fresh) as writer, serving(fresh, read_only=True) as reader:
        client = reader.client()
        assert put(writer.client(), "new", "A new text.").status_code == 201
        assert client.get("/v1/documents/new").json()["text"] == "A new text."
        found = client.post("/v1/search", json={"query": "A new text.", "k": 100}).json()
        assert "new" in [hit["key"] for hit in found["data"]]
        for refused in (put(client, "x", "y"), client.delete("/v1/documents/new")):
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "read_only")
        assert client.get("/v1/bank").json()["read_only"] is True
        fresh.rename(fresh.with_name("gone"))  # so that a balancer looks elsewhere
        assert client.get("/v1/documents/new").status_code == client.get("/healthz").status_code == 503
        assert str(fresh) not in client.get("/healthz").text
        fresh.with_name("gone").rename(fresh)
        assert client.get("/v1/documents/new").status_code == client.get("/healthz").status_code == 200


def test_a_disk_that_is_full_loses_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fresh) as served:
        client = served.client()
        monkeypatch.setattr(BankStore, "_apply", _full)
        assert put(client, "lost", "A text.").status_code == 507
        monkeypatch.undo()
        assert client.get("/v1/documents/lost").status_code == 404
        assert put(client, "kept", "A text.").status_code == 201


def test_a_bank_that_is_damaged_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(fresh) as served:
        client = served.client()

        def damaged(self: BankStore, *arguments: object) -> None:
            raise BankDamaged("/secret/path is damaged")

        question = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the reef?"}]}
        monkeypatch.setattr(BankStore, "snapshot", damaged)
        monkeypatch.setattr(BankStore, "get", damaged)
        found = [client.post("/v1/chat/completions", json={**question, "stream": stream}) for stream in (False, True)]
        found += [client.get("/v1/documents/doc-1"), client.post("/v1/search", json={"query": "a"})]
        for answer in (*found, put(client, "x", "y")):
            assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error", answer.text
        assert not any("secret" in answer.text for answer in found)


def _full(self: BankStore, commit: object) -> None:
    raise OSError(28, "No space left on device")


def test_writes_beside_questions_are_all_there(own: Served, documents: httpx.Client) -> None:
    stop = threading.Event()

    def ask() -> int:
        asked = 0
        while not stop.is_set():
            body = {"model": MODEL, "messages": [{"role": "user", "content": "Where is the reef?"}], "max_tokens": 2}
            assert documents.post("/v1/chat/completions", json=body).status_code == 200
            asked += 1
        return asked

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        for place in range(8):
            assert put(documents, f"beside-{place}", f"Text {place}.").status_code == 201
            assert documents.get(f"/v1/documents/beside-{place}").json()["text"] == f"Text {place}."
        stop.set()
        assert all(item.result() > 0 for item in asking)
