"""Running a server until a signal asks it to end: requests in flight are finished first, and new ones turned away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import uvicorn

from .app import Application

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Cycle(Protocol):
    response_complete: bool


class Connection(Protocol):
    """The state that uvicorn keeps of a connection; a request has a cycle once its head has come."""

    cycle: Cycle | None
    transport: asyncio.Transport


class DrainingServer(uvicorn.Server):
    """uvicorn, but that it answers 503 while it ends, and ends with 0, and does not wait for the head of a request for
    ever.

    Args:
        config: of uvicorn.
        app: whose requests are counted.
        patience: seconds that requests in flight have once the end was asked for; a second signal ends them at once.
    """

    def __init__(self, config: uvicorn.Config, app: Application, patience: float) -> None:
        super().__init__(config)
        self.app, self.patience = app, patience
        self.cut_off = False
        self._draining: asyncio.Task[None] | None = None
        self._waits: dict[Connection, tuple[object, float]] = {}  # for a request behind which one, since when

    async def on_tick(self, counter: int) -> bool:
        """Look after connections, ten times a second."""
        self._close_silent()
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        """Close connections whose next request has not come as a whole head in the time that a body has."""
        now, waits = time.monotonic(), self._waits
        connections: set[Connection] = self.server_state.connections  # type: ignore[assignment]
        self._waits = {}
        for item in connections:
            if item.cycle is None or item.cycle.response_complete:
                last, since = waits.get(item, (None, now))
                self._waits[item] = item.cycle, since if last is item.cycle else now
                if last is item.cycle and now - since > self.app.service.limits.body_seconds:
                    item.transport.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Begin to end at a signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.begin_to_end)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def begin_to_end(self) -> None:
        """Turn new requests away, and end once those in flight are finished; called again, end them too."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        logger.info("finishing %d requests", self.app.load.running)
        self.app.load.draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await asyncio.wait_for(self.app.load.drained(), self.patience)
        except TimeoutError:
            self.cut_off = True
            logger.error("%d requests did not end within %g seconds", self.app.load.running, self.patience)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address, before anything is loaded.

    Raises:
        OSError: where the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def address_of(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: Application, listener: socket.socket, patience: float = 60.0, access_log: bool = False) -> int:
    """Serve until a signal, and return the exit code: 0, or 1 where requests were cut off."""
    config = uvicorn.Config(
        app, log_level="info" if access_log else "warning", access_log=access_log, server_header=False
    )
    config.timeout_graceful_shutdown = 1
    server = DrainingServer(config, app, patience)
    app.service.start()
    name = app.service.settings.name
    print(
        f"msa-hf: {name} with {len(app.service.store)} documents at {address_of(listener)}", file=sys.stderr, flush=True
    )
    try:
        server.run([listener])
    finally:
        app.service.close()
    return int(server.cut_off or server.force_exit)
