"""Notices of the processes that share a memory, beside their exchanges: the first error, and that they are there.

They lie in the store of the processes' group. A thread of its own asks it, in every process: so an error is heard while
a process is busy, and before the one that holds the store has ended; and nobody waits for ever for a store whose holder
hangs.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

# Keys of the store.
ERROR = "error"  # the first that was told
HEARD = "heard/{}"  # by these processes
ALARM = "alarm"  # an exchange broke off, and nobody had told an error
THERE = "there/{}"  # processes that know of the alarm because their exchange broke off too
ALIVE = "alive/{}"  # those that do something else, but answer

INTERVAL = 0.1  # seconds between two looks into the store
GRACE = 1.0  # seconds for those that wait in the same exchange to find that it broke off
PATIENCE = 3.0  # seconds for a process, or the store, to answer

T = TypeVar("T")
_Job = tuple[Callable[[dist.Store], Any], "Future[Any]"]


class StoreSilent(Exception):
    """The store did not answer, or is gone."""


@dataclass
class _Known:
    """The notices that this process has read."""

    error: str | None = None
    answered: bool = False  # an alarm


class Notices:
    """One process' view of the notices, and its own.

    Args:
        store: of the group; used by no other thread.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._known = _Known()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        Thread(target=_serve, args=(store, self._jobs, self._known, rank), name="msa-hf notices", daemon=True).start()
        self.close = weakref.finalize(self, self._jobs.put, None)

    def tell(self, text: str) -> bool:
        """Put an error before all; returns whether it was the first one."""

        def put(store: dist.Store) -> bool:
            first = store.compare_set(ERROR, "", text).decode(errors="replace") == text
            _look(store, self._known, self.rank)
            return first

        try:
            return self._ask(put)
        except StoreSilent:
            return False

    def wait_until_heard(self) -> None:
        """Stay until all that answer know the error: the store may end with this process."""

        def others(store: dist.Store) -> bool:
            alarm = store.check([ALARM])
            return any(
                not store.check([HEARD.format(rank)])
                and (not alarm or store.check([THERE.format(rank)]) or store.check([ALIVE.format(rank)]))
                for rank in range(self.size)
            )

        until = time.monotonic() + PATIENCE
        try:
            while self._ask(others) and time.monotonic() < until:
                time.sleep(INTERVAL / 2)
        except StoreSilent:
            pass

    def explain(self, error: BaseException, started: float, timeout: float) -> str:
        """Say why an exchange broke off: another process' error, or who does not answer, and for how long.

        Args:
            error: of the exchange.
            started: when this process began to wait, by `time.monotonic`.
            timeout: of the exchange, seconds.
        """
        begun = time.monotonic()
        try:
            self._ask(self._raise_alarm)
            while self._known.error is None:
                there, alive = self._ask(self._roll)
                waited = time.monotonic() - begun
                missing = [rank for rank in range(self.size) if rank not in there]
                silent = [rank for rank in missing if rank not in alive]
                if not missing or waited > (PATIENCE if silent else GRACE):
                    self.tell(self._words(silent, missing, error, time.monotonic() - started, timeout))
                    break
                time.sleep(INTERVAL / 2)
        except StoreSilent as reason:
            if self._known.error is None:
                return (
                    f"{_holder()}, which holds the store of this shared memory's processes, {reason}; process "
                    f"{self.rank} waited {time.monotonic() - started:.1f} seconds."
                )
        return self._known.error or _line(error)

    def _words(self, silent: list[int], missing: list[int], error: BaseException, waited: float, timeout: float) -> str:
        if silent:
            return (
                f"{_named(silent)} of this shared memory {'does' if len(silent) == 1 else 'do'} not answer: killed, "
                f"stopped or out of reach. Process {self.rank} waited {waited:.1f} seconds."
            )
        if missing:
            one = len(missing) == 1
            return (
                f"{_named(missing)} of this shared memory {'is' if one else 'are'} alive, but did not come to an "
                f"exchange: process {self.rank} waited {waited:.1f} seconds, with a timeout of {timeout:g} seconds."
            )
        return f"An exchange of this shared memory broke off after {waited:.1f} seconds ({_line(error)})."

    def _raise_alarm(self, store: dist.Store) -> None:
        _look(store, self._known, self.rank)
        if self._known.error is None:
            self._known.answered = True
            store.set(THERE.format(self.rank), "")
            store.set(ALARM, "")

    def _roll(self, store: dist.Store) -> tuple[set[int], set[int]]:
        """Processes whose exchange broke off too, and those that answer."""
        _look(store, self._known, self.rank)
        ranks = range(self.size)
        there = {rank for rank in ranks if store.check([THERE.format(rank)])}
        return there, {rank for rank in ranks if store.check([ALIVE.format(rank)])}

    def _ask(self, job: Callable[[dist.Store], T]) -> T:
        """Have the thread do something with the store.

        Raises:
            StoreSilent: where the store does not answer in time, or is gone.
        """
        future: Future[T] = Future()
        self._jobs.put((job, future))
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            raise StoreSilent("does not answer: stopped or out of reach") from None
        except RuntimeError as error:
            raise StoreSilent("is gone") from error


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do something that may wait for other processes without a deadline of its own.

    Raises:
        TimeoutError: where it takes longer; it goes on in a thread of its own, which ends with the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="msa-hf connecting", daemon=True).start()
    return future.result(seconds)


def _serve(store: dist.Store, jobs: SimpleQueue[_Job | None], known: _Known, rank: int) -> None:
    """Do what is asked for, and look into the store meanwhile, until None comes."""
    gone = False
    while True:
        try:
            job = jobs.get(timeout=INTERVAL)
        except Empty:
            if not gone and known.error is None:
                try:
                    _look(store, known, rank)
                except RuntimeError:  # whoever asks is told
                    gone = True
            continue
        if job is None:
            return
        work, future = job
        try:
            future.set_result(work(store))
        except BaseException as error:
            future.set_exception(error)


def _look(store: dist.Store, known: _Known, rank: int) -> None:
    """Read what is new, and answer."""
    if known.error is None and store.check([ERROR]):
        known.error = store.get(ERROR).decode(errors="replace")
        store.set(HEARD.format(rank), "")
    if not known.answered and store.check([ALARM]):
        known.answered = True
        store.set(ALIVE.format(rank), "")


def _holder() -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "The launcher"
    return "Process 0"


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"Process {ranks[0]}"
    return f"Processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
