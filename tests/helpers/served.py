"""A server in this process, on a tiny model with random weights, for tests that talk to it over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model

from msa_hf.bank import BankStore
from msa_hf.serving.app import Application
from msa_hf.serving.limits import Limits
from msa_hf.serving.running import DrainingServer, address_of, listen
from msa_hf.serving.service import Service, Settings
from msa_hf.serving.waiting import Work

MODEL = "tiny"
NEW_TOKENS = 8


@dataclass
class Served:
    """A server at work.

    Attributes:
        url: where it listens.
        service: what answers.
        application: what it runs.
        server: uvicorn's.
    """

    url: str
    service: Service
    application: Application
    server: DrainingServer
    clients: list[httpx.Client] = field(default_factory=list)

    def client(self, **options: Any) -> httpx.Client:
        """A client of it."""
        made = httpx.Client(base_url=self.url, timeout=60, **options)
        self.clients.append(made)
        return made

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """The thread of the model does something else, so that whatever comes meanwhile waits together."""
        begun, end = threading.Event(), threading.Event()
        self.service.thread.put(Work(lambda: (begun.set(), end.wait(60))))
        assert begun.wait(60)
        try:
            yield
        finally:
            end.set()

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_waiting(self, count: int) -> None:
        """Wait until so many things wait for the model."""
        self.wait_for(lambda: len(self.service.thread) == count)


@contextlib.contextmanager
def serving(
    directory: Path,
    limits: Limits | None = None,
    protocol: Any = COMPACT,
    read_only: bool = False,
    **application: Any,
) -> Iterator[Served]:
    """A server of a bank, made of `TEXTS` where there is none."""
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    if not (directory / "manifest.json").exists():
        with BankStore(model, directory, tokenizer, protocol) as store:
            store.add([{"key": f"doc-{place}", "text": text} for place, text in enumerate(TEXTS)])
    store = BankStore(model, directory, tokenizer, protocol, read_only=read_only)
    settings = Settings(MODEL, NEW_TOKENS, limits or Limits(), {} if protocol is None else {"max_rounds": 2})
    service = Service(store, model, tokenizer, protocol, settings)
    app = Application(service, **application)
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="error", access_log=False)
    config.timeout_graceful_shutdown = 1
    server = DrainingServer(config, app, patience=10)
    service.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    served = Served(address_of(listener), service, app, server)
    try:
        served.wait_for(lambda: server.started)
        yield served
    finally:
        for client in served.clients:
            client.close()
        server.should_exit = True
        thread.join(30)
        service.close()
