"""`msa-hf serve` as operators run it: what it refuses to begin with, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import refusal
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model
from servers import free_port

from msa_hf.bank import BankStore
from msa_hf.cli import main

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


def wait_for(url: str) -> None:
    """Wait until a server takes requests."""
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            assert time.monotonic() < deadline
        time.sleep(0.05)


def use_it_and_end_it(url: str) -> dict[str, Any]:
    """Ask twice, send this process SIGTERM meanwhile, and go on asking; what came of it."""
    wait_for(url)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "mine", "messages": [{"role": "user", "content": "Where is the reef?"}], "max_tokens": 120}
    streaming, found = threading.Event(), {}

    def whole() -> httpx.Response:
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def stream() -> list[str]:
        asked = {**body, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, headers=headers, timeout=60) as response:
            lines = []
            for line in response.iter_lines():
                streaming.set()
                lines.append(line)
        return [line for line in lines if line]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stream)
        assert streaming.wait(60)
        second = pool.submit(whole)
        while not second.done() and not first.done():
            if "msa_hf_serve_waiting 1.0" in httpx.get(f"{url}/metrics", headers=headers).text:
                break
        os.kill(os.getpid(), signal.SIGTERM)
        while not first.done():
            late = httpx.put(f"{url}/v1/documents/late", json={"text": "x"}, headers=headers)
            if late.status_code != 201:
                found["late"], found["health"] = late, httpx.get(f"{url}/healthz")
                break
        found["stream"], found["whole"] = first.result(), second.result()
    return found


def test_it_finishes_what_runs_turns_new_requests_away_and_ends_with_0(place: Path, tmp_path: Path) -> None:
    """The command runs here, in the main thread, to which signals are delivered; its clients are other threads."""
    keys, port = tmp_path / "keys", free_port()
    keys.write_text(KEY + "\n")
    keys.chmod(0o600)
    url = f"http://127.0.0.1:{port}"
    command = ["serve", str(place / "model"), str(place / "bank"), "--port", str(port), "--name", "mine"]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # before the server listens to it, and after
    try:
        with ThreadPoolExecutor(1) as pool:
            used = pool.submit(use_it_and_end_it, url)
            assert main([*command, "--api-keys", str(keys), "--device", "cpu"]) == 0
            found = used.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found["late"].status_code == 503 and found["late"].headers["retry-after"]
    assert found["late"].json()["error"]["code"] == "draining" and found["health"].status_code == 503
    assert found["stream"][-1] == "data: [DONE]"
    assert found["whole"].status_code == 200 and found["whole"].json()["usage"]["completion_tokens"] > 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
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
        assert "at most 65535" in said(model, bank, "--port", "65536")
        assert "--max-batch: must be an integer of at most" in said(model, bank, "--max-batch", "9" * 30)
    with BankStore(None, bank):
        assert "is open for writing" in said(model, bank, "--port", "0")
    assert "no such directory" in said("/no/such/model", bank, "--port", "0")


def test_an_extra_that_is_missing_is_named(place: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; " + PROGRAM
    command = [sys.executable, "-c", code, "serve", str(place / "model"), str(place / "bank")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'pip install "msa-hf[serve]"' in done.stderr and "Traceback" not in done.stderr
    assert json.dumps(done.stdout) == '""'
