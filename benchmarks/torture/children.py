"""Children that open banks: forked, each for one call, from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .attack import Wrong

CONTEXT = multiprocessing.get_context("forkserver")


class ChildFailed(Exception):
    """A child that gave no answer: it crashed, hung, or raised what nobody expected."""


def start_server(shim: Path | None) -> None:
    """Start the process that children are forked from, with the shim for system calls where there is one."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    if shim is not None:
        settings["LD_PRELOAD"] = str(shim)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    CONTEXT.set_forkserver_preload(["__main__", "torture.warm"])
    try:
        forkserver.ensure_running()
        # Waits for its imports, so that they count for nobody's time.
        call(os.getpid, timeout=300)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Child:
    """A running child, which says things on the way and at its end.

    Args:
        work: called with `say`, a function that sends a value, and the arguments.
    """

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        self._connection, theirs = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=_run, args=(theirs, work, arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def said(self, timeout: float) -> Iterator[Any]:
        """Everything that the child says, until it ends.

        Raises:
            Wrong: as the child did.
            ChildFailed: where it raised something else, died of another signal than SIGKILL, or took longer than
                `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if not self._connection.poll(max(deadline - time.monotonic(), 0)):
                self.kill()
                raise ChildFailed(f"took longer than {timeout:.0f} s")
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError):
                break
            if kind != "said":
                raise Wrong(value) if kind == "wrong" else ChildFailed(value)
            yield value
        self._process.join(10)
        code = self._process.exitcode
        if code not in (0, -signal.SIGKILL):
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            raise ChildFailed(f"died of {name}")

    def kill(self) -> None:
        """SIGKILL, at once."""
        self._process.kill()


def call(work: Callable[..., Any], *arguments: object, timeout: float = 120) -> Any:
    """What a function returns in a child of its own.

    Raises:
        ChildFailed: as `Child.said`, and where it was killed.
    """
    values = list(Child(_answer, work, *arguments).said(timeout))
    if not values:
        raise ChildFailed("died of SIGKILL")
    return values[-1]


def _answer(say: Callable[[object], None], work: Callable[..., object], *arguments: object) -> None:
    say(work(*arguments))


def _run(connection: Connection, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    try:
        work(lambda value: connection.send(("said", value)), *arguments)
    except Wrong as error:
        connection.send(("wrong", str(error)))
    except BaseException:
        connection.send(("raised", traceback.format_exc(limit=-4)))
    # Nothing of what the interpreter does at its end is part of an attack.
    connection.close()
    os._exit(0)


@contextmanager
def killed_at_the_end(*children: Child) -> Iterator[None]:
    """A block whose children do not outlive it."""
    try:
        yield
    finally:
        for child in children:
            child.kill()
