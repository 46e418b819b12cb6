"""Notices of the processes that share a memory, beside their exchanges: the first error, and that they are there.

They lie in the store of the processes' group. A thread of its own asks it, in every process: so an error is heard while
a process is busy, and before the one that holds the store has ended; and nobody waits for ever for a store whose holder
hangs. Each thread also leaves a sign of life there and looks for that of the next process: so one that was killed is
noticed beside the work, which may wait for nothing but a device.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
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
BEAT = "beat/{}"  # signs of life, a number that grows

INTERVAL = 0.1  # seconds between two looks into the store
GRACE = 1.0  # seconds for those that wait in the same exchange to find that it broke off
PATIENCE = 3.0  # seconds for a process, or the store, to answer
BEATS = 1.0  # seconds between two signs of life
SILENCE = 20.0  # least seconds without one until a process counts as gone: its thread may wait for Python's lock

T = TypeVar("T")
_Job = tuple[Callable[[dist.Store], Any], "Future[Any]"]


class StoreSilent(Exception):
    """The store did not answer, or is gone."""


@dataclass
class _Known:
    """The notices that this process has read.

    Attributes:
        error: the first that was told.
        answered: an alarm.
        leaving: this process is through, and others may be gone.
        heard: done once `error` is known.
    """

    error: str | None = None
    answered: bool = False
    leaving: bool = False
    heard: Callable[[], None] = field(default=lambda: None, repr=False)

    def hear(self, error: str) -> None:
        """Note the first error."""
        if self.error is None:
            self.error = error
            self.heard()


class Notices:
    """One process' view of the notices, and its own.

    Args:
        store: of the group; used by no other thread.
        rank: of this process.
        size: number of processes.
        heard: done by a thread as soon as an error is known, such as ending what a device waits for. It must not keep
            these notices alive.
        silence: seconds without a sign of life until a process counts as gone; `SILENCE` at least.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, heard: Callable[[], None] | None = None, silence: float = 0.0
    ) -> None:
        self.rank, self.size = rank, size
        self._known = _Known() if heard is None else _Known(heard=heard)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        watch = _Watch(rank, size, max(silence, SILENCE), weakref.WeakMethod(self._explain_loss))
        arguments = store, self._jobs, self._known, watch
        Thread(target=_serve, args=arguments, name="msa-hf notices", daemon=True).start()
        self.close = weakref.finalize(self, self._jobs.put, None)

    @property
    def error(self) -> str | None:
        """The first error that was told, as far as this process knows."""
        return self._known.error

    def leave(self) -> None:
        """Expect others to be gone from now on."""
        self._known.leaving = True

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

    def _explain_loss(self) -> None:
        """Find out who is gone, and tell all; in a thread of its own, as the one that serves is asked meanwhile."""
        started = time.monotonic()

        def explain() -> None:
            self._known.hear(self.explain(ConnectionError("a process is gone"), started, 0.0))

        Thread(target=explain, name="msa-hf loss", daemon=True).start()

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


class _Watch:
    """Signs of life: leaves those of this process, and misses those of the next one.

    Args:
        rank: of this process.
        size: number of processes.
        silence: seconds without a sign of life until a process counts as gone.
        lost: called where the next process is gone, or the store; once.
    """

    def __init__(self, rank: int, size: int, silence: float, lost: weakref.WeakMethod[Callable[[], None]]) -> None:
        self.rank, self.next, self.silence = rank, (rank + 1) % size, silence
        self._lost: weakref.WeakMethod[Callable[[], None]] | None = lost
        self._beats, self._due, self._seen, self._since = 0, 0.0, b"", time.monotonic()

    def look(self, store: dist.Store, known: _Known) -> None:
        """Leave a sign where one is due, and look for the other process' last one."""
        now = time.monotonic()
        if now < self._due:
            return
        # Later than due, this process itself was stopped, and so may have been the others.
        late = bool(self._beats) and now > self._due + self.silence / 2
        self._due, self._beats = now + BEATS, self._beats + 1
        store.set(BEAT.format(self.rank), str(self._beats))
        beat = BEAT.format(self.next)
        seen = store.get(beat) if store.check([beat]) else b""
        if seen != self._seen or late:
            self._seen, self._since = seen, now
        elif now - self._since > self.silence:
            self.miss(known)

    def miss(self, known: _Known) -> None:
        """Say that a process is gone."""
        explain = None if self._lost is None or known.leaving else self._lost()
        self._lost = None
        if explain is not None:
            explain()


def _serve(store: dist.Store, jobs: SimpleQueue[_Job | None], known: _Known, watch: _Watch) -> None:
    """Do what is asked for, and look into the store meanwhile, until None comes."""
    gone = False
    while True:
        try:
            job = jobs.get(timeout=INTERVAL)
        except Empty:
            if not gone and known.error is None:
                try:
                    _look(store, known, watch.rank)
                    watch.look(store, known)
                except RuntimeError:  # of whom holds the store
                    gone = True
                    watch.miss(known)
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
        known.hear(store.get(ERROR).decode(errors="replace"))
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
