"""Servers that tests talk to, started on a free port and stopped afterwards; tests are skipped where one is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# dynalite ends when a client dies in the middle of a request; DynamoDB does not.
OUTLIVE_CLIENTS = """
process.on("uncaughtException", (error) => {
    if (error.code !== "ECONNRESET") { console.error(error); process.exit(1) }
})
"""


@contextlib.contextmanager
def started(
    command: Sequence[str], port: int, seconds: float = 30.0, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a port, until the end."""
    null = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=null, stderr=null, env={**os.environ, **variables}) as server:
        try:
            deadline = time.monotonic() + seconds
            while True:
                if server.poll() is not None:
                    pytest.fail(f"{command[0]} ended with {server.returncode}")
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < deadline, f"{command[0]} does not listen"
                time.sleep(0.02)
            yield server
        finally:
            server.kill()


@contextlib.contextmanager
def dynalite() -> Iterator[str]:
    """The URL of a server that speaks DynamoDB's API."""
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install msa-hf[dynamodb]")
    if shutil.which("dynalite") is None:
        pytest.skip("dynalite is not installed: npm install -g dynalite")
    port = free_port()
    times = [f"--{name}TableMs=0" for name in ("create", "delete", "update")]
    with tempfile.NamedTemporaryFile("w", suffix=".js") as script:
        script.write(OUTLIVE_CLIENTS)
        script.flush()
        command = ["dynalite", f"--port={port}", "--host=127.0.0.1", *times]
        with started(command, port, NODE_OPTIONS=f"--require={script.name}"):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def redis_server(directory: Path, port: int | None = None, *options: str) -> Iterator[str]:
    """The URL of a Redis server that keeps its data in a directory."""
    pytest.importorskip("redis", reason="redis is not installed: pip install msa-hf[redis]")
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: apt-get install redis-server")
    port = free_port() if port is None else port
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), *options]
    with started(command, port):
        yield f"redis://127.0.0.1:{port}"
