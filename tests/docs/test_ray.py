"""examples/deploying: replicas of Ray Serve over one bank, one writer beside them, and snapshots that go to tasks."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from msa_hf.bank import BankLocked, BankStore

ray = pytest.importorskip("ray", reason='ray is not installed: pip install "ray[serve]"')
serve = pytest.importorskip("ray.serve")
requests = pytest.importorskip("starlette.requests")
pytest.importorskip("tantivy")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "deploying"
CARD = str(ROOT / "model_cards" / "msa-hf-tiny")
TEXTS = {
    "crossing": "The Jethefux Crossing is held at Krikutust Heights.",
    "heights": "Krikutust Heights is known for its roses.",
}
QUESTION = "What is the venue of the Jethefux Crossing known for?"


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module")
def examples() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(EXAMPLES))
    names = ("ray_serve", "ray_batch")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(EXAMPLES))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, and Serve without its HTTP proxy."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(EXAMPLES)]))
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # By default workers are nice to whatever else runs, which beside other tests would take minutes.
    for name, value in {**settings, "RAY_worker_niceness": "0"}.items():
        patch.setenv(name, value)
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    yield
    serve.shutdown()
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def writing(examples: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The one writer, in this process, of an empty bank."""
    directory = tmp_path_factory.mktemp("ray") / "bank"
    writer = examples["ray_serve"].Writing.func_or_class(CARD, str(directory))
    yield writer
    writer.bank.close()


def test_two_replicas_answer_over_one_bank_and_see_commits(
    cluster: None, examples: dict[str, ModuleType], writing: Any
) -> None:
    answering = serve.run(examples["ray_serve"].Answering.bind(CARD, str(writing.bank.directory)))
    before = [answering.ask.remote(QUESTION) for _ in range(4)]
    assert {told["answer"] for told in (item.result(timeout_s=120) for item in before)} == {
        "The memory does not hold the answer."
    }
    for key, text in TEXTS.items():
        assert writing.upsert(key, text)["changed"]
    with pytest.raises(BankLocked):
        BankStore(None, writing.bank.directory)
    told, empty = [answering.ask.remote(QUESTION) for _ in range(24)], answering.ask.remote(" ")
    found = [item.result(timeout_s=120) for item in told]
    assert len({item["process"] for item in found}) == 2
    for item in found:
        assert (item["answer"], item["sources"], item["generation"]) == ("roses", list(TEXTS), 2)
    assert "not empty" in empty.result(timeout_s=120)["error"]


def test_snapshots_are_searched_in_tasks(
    cluster: None, examples: dict[str, ModuleType], writing: Any, tmp_path: Path
) -> None:
    with BankStore(writing.bank.model, tmp_path, writing.bank.tokenizer, writing.bank.protocol, lexical=True) as bank:
        bank.add({"key": key, "text": text} for key, text in TEXTS.items())
    queries = ["roses", "the crossing", "nothing of it", "Krikutust"]
    found = examples["ray_batch"].search_all(str(tmp_path), queries, part=2)
    assert found[:3] == [["heights"], ["crossing"], []] and sorted(found[3]) == ["crossing", "heights"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", "/ask", {"question": "x"}, 200, {"answer": "x"}),
        ("POST", "/ask", {"question": ""}, 400, {"error": "empty"}),
        ("POST", "/ask", {}, 400, {"error": "KeyError: 'question'"}),
        ("POST", "/ask", [], 400, None),
        ("PUT", "/documents", {"key": "k", "text": "t"}, 200, {"changed": True}),
        ("GET", "/ask", None, 404, {"error": "there is no GET /ask"}),
    ],
)
def test_the_front_passes_on(
    examples: dict[str, ModuleType], method: str, path: str, body: Any, status: int, told: Any
) -> None:
    class Handle:
        """Stands for the handles of both deployments."""

        ask = upsert = property(lambda self: self)

        async def remote(self, *given: Any) -> dict[str, Any]:
            if len(given) == 3:
                return {"changed": True}
            return {"answer": given[0]} if given[0] else {"error": "empty"}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "server": ("x", 80)}
    front = examples["ray_serve"].Front.func_or_class(Handle(), Handle())
    response = asyncio.run(front(requests.Request(scope, receive)))
    assert response.status_code == status and told in (None, json.loads(response.body))
