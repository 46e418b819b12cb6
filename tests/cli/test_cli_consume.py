"""`msa-hf consume`: a bank follows a Redis stream, until it is told to stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from commands import refusal
from forking import ended, forked
from servers import redis_server

from msa_hf import MemoryBank
from msa_hf.cli import main

redis = pytest.importorskip("redis")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), None, "--save", "") as url:
        yield url


def publish(url: str, stream: str, *events: dict[str, Any] | str) -> Any:
    client = redis.Redis.from_url(url)
    for event in events:
        client.xadd(stream, {"event": event if isinstance(event, str) else json.dumps(event)})
    return client


def texts(bank: Path) -> dict[str, str | None]:
    return {document.key: document.text for document in MemoryBank.from_pretrained(bank).documents}


def test_events_are_applied_once_and_counted(
    place: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, metrics = tmp_path / "bank", tmp_path / "metrics.prom"
    client = publish(
        url,
        "notes",
        {"key": "tea", "version": 2, "text": "tea is grown in the hills"},
        {"key": "tea", "version": 1, "text": "tea is grown by the sea"},
        {"key": "sea", "version": 1, "text": "the sea is deep"},
        "no event",
        {"key": "sea", "version": 2, "delete": True},
    )
    command = ["consume", bank, "--model", place / "compact", "--redis", url, "--stream", "notes", "--group", "g"]
    command += ["--until-idle", "--wait", "0.05", "--metrics", metrics, "--dead-letters", "letters"]
    assert main(list(map(str, command))) == 0
    assert "3 applied, 1 unchanged, 1 rejected; 1 documents" in capsys.readouterr().out
    assert texts(bank) == {"tea": "tea is grown in the hills"}
    assert [fields[b"event"] for _, fields in client.xrange("letters")] == [b"no event"]
    assert 'msa_hf_stream_events_total{outcome="applied"} 3\n' in metrics.read_text()
    assert "msa_hf_stream_lag 0\n" in metrics.read_text() and len(list(tmp_path.iterdir())) == 2
    publish(url, "notes", {"key": "sea", "version": 3, "text": "the sea is cold"})
    assert main(list(map(str, command))) == 0
    assert "1 applied, 0 unchanged, 0 rejected; 2 documents" in capsys.readouterr().out


def test_a_signal_ends_it_between_two_batches(place: Path, url: str, tmp_path: Path) -> None:
    client = publish(url, "live", {"key": "tea", "version": 1, "text": "tea is grown in the hills"})
    command = ["consume", tmp_path / "bank", "--redis", url, "--model", place / "compact"]
    command += ["--stream", "live", "--group", "g", "--wait", "0.1"]

    def consume() -> None:
        out, err = ((tmp_path / name).open("w") for name in ("out", "err"))
        with redirect_stdout(out), redirect_stderr(err), out, err:
            assert main(list(map(str, command))) == 0

    process = forked(consume)
    deadline = time.monotonic() + 120
    while not [group for group in client.xinfo_groups("live") if group["lag"] == 0 and group["pending"] == 0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    assert ended(process) == [0]
    assert "1 applied, 0 unchanged, 0 rejected; 1 documents" in (tmp_path / "out").read_text()
    assert "finishing the batch" in (tmp_path / "err").read_text()


def test_mistakes_are_one_line(
    place: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.Redis.from_url(url).set("text", "no stream")
    common = ["consume", tmp_path / "bank", "--model", place / "compact", "--group", "g"]
    assert "is no stream" in refusal(capsys, *common, "--redis", url, "--stream", "text")
    assert "No answer from redis://127.0.0.1:1" in refusal(
        capsys, *common, "--redis", "redis://127.0.0.1:1", "--stream", "s"
    )
    assert "must be seconds" in refusal(capsys, *common, "--redis", url, "--stream", "s", "--wait", "soon")
    assert "--model" in refusal(capsys, "consume", "bank", "--redis", url, "--stream", "s", "--group", "g")
    (tmp_path / "file").write_text("")
    assert "not a directory" in refusal(
        capsys, "consume", tmp_path / "file", *common[2:], "--redis", url, "--stream", "s"
    )
    monkeypatch.setitem(sys.modules, "redis", None)
    assert "msa-hf[redis]" in refusal(capsys, *common, "--redis", url, "--stream", "s")
