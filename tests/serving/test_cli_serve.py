"""`msa-hf serve` as operators run it: what it refuses to begin with, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import refusal
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model
from servers import free_port

from msa_hf.bank import BankStore

KEY = "operator-key-0123456789"
PROGRAM = "import sys; from msa_hf.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    for item in (model, tokenizer, COMPACT):
        item.save_pretrained(root / "model")
    with BankStore(model, root / "bank", tokenizer, COMPACT) as store:
        store.add(TEXTS)
    return root


class Running:
    """A server in a process of its own."""

    def __init__(self, place: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["serve", str(place / "model"), str(place / "bank"), "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *command], stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "documents at" in line:
                break
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or []), daemon=True).start()
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                assert time.monotonic() < deadline and self.process.poll() is None, self.lines
            time.sleep(0.02)


@pytest.fixture
def running(place: Path, tmp_path: Path) -> Iterator[Running]:
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    server = Running(place, "--api-keys", str(keys), "--name", "mine", "--most-new-tokens", "3000")
    yield server
    server.process.kill()
    server.process.wait()


def test_it_finishes_what_runs_turns_new_requests_away_and_ends_with_0(running: Running, place: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "mine", "messages": [{"role": "user", "content": "Where is the reef?"}], "max_tokens": 300}
    streaming = threading.Event()

    def whole() -> httpx.Response:
        return httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def stream() -> list[str]:
        url, asked = f"{running.url}/v1/chat/completions", {**body, "stream": True}
        with httpx.stream("POST", url, json=asked, headers=headers, timeout=60) as response:
            lines = []
            for line in response.iter_lines():
                streaming.set()
                lines.append(line)
        return [line for line in lines if line]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stream)
        assert streaming.wait(30)
        second = pool.submit(whole)
        figures = httpx.get(f"{running.url}/metrics", headers=headers).text
        while "msa_hf_serve_waiting 1.0" not in figures and not second.done() and not first.done():
            figures = httpx.get(f"{running.url}/metrics", headers=headers).text
        running.process.send_signal(signal.SIGTERM)
        refused = []
        while not refused and not first.done():
            late = httpx.put(f"{running.url}/v1/documents/late", json={"text": "x"}, headers=headers)
            if late.status_code != 201:
                refused.append(late)
        assert refused and refused[0].status_code == 503 and refused[0].headers["retry-after"]
        assert refused[0].json()["error"]["code"] == "draining"
        assert httpx.get(f"{running.url}/healthz").status_code == 503
        assert first.result()[-1] == "data: [DONE]"
        assert second.result().status_code == 200 and second.result().json()["usage"]["completion_tokens"] > 0
    assert running.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/healthz")
    with BankStore(None, place / "bank") as store:  # the lock is free again
        assert store.verify() == []


def test_it_refuses_what_cannot_work_in_one_line(place: Path, tmp_path: Path, capsys: Any) -> None:
    model, bank = place / "model", place / "bank"

    def said(*arguments: object) -> str:
        return refusal(capsys, "serve", *arguments)

    assert "no bank there" in said(model, tmp_path / "none") and not (tmp_path / "none").exists()
    assert "lets other machines in" in said(model, bank, "--host", "0.0.0.0")
    assert "exclude each other" in said(model, bank, "--create", "--read-only")
    (tmp_path / "keys").write_text("short\n")
    assert "keys:1: an API key has at least 16" in said(model, bank, "--api-keys", tmp_path / "keys")
    assert "No such file" in said(model, bank, "--api-keys", tmp_path / "missing")
    assert "at least 1" in said(model, bank, "--max-batch", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f":{port}: [Errno" in said(model, bank, "--port", port)
    with BankStore(None, bank):
        assert "is open for writing" in said(model, bank, "--port", "0")
    assert "no such directory" in said("/no/such/model", bank, "--port", "0")


def test_an_extra_that_is_missing_is_named(place: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; " + PROGRAM
    command = [sys.executable, "-c", code, "serve", str(place / "model"), str(place / "bank")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'pip install "msa-hf[serve]"' in done.stderr and "Traceback" not in done.stderr
    assert json.dumps(done.stdout) == '""'
