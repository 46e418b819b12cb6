"""Monitoring beside production: a wrapper that samples questions as they are answered and checks them later."""

from __future__ import annotations

import collections
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from ...generation import Answer
    from .finding import Finding
    from .metrics import MonitorMetrics
    from .monitor import Monitor

logger = logging.getLogger(__name__)
Answered = TypeVar("Answered", bound="Answer | str")


class Watched(Generic[Answered]):
    """A function that answers questions, some of which a monitor checks.

        ask = Watched(MemoryInterleave(...).ask, monitor, rate=0.02)
        answer = ask("Who keeps the Oskel Lantern?")  # as before
        ask.work(seconds=5)  # checks what waits; or ask.start() in a thread of its own

    A call costs a random number more than the function itself and, where the question is sampled, an entry of a queue:
    nothing is checked during a call. A question that finds the queue full is dropped and counted. What a check raises
    is logged and counted; it never reaches whoever asks.

    Args:
        answer: question -> `Answer`, whose trace is used, or text. Further arguments are handed on.
        monitor: that checks; its bank stays the one that it was made with.
        rate: the share of questions that are sampled, 0 to 1.
        queue: questions that wait at most.
        kept: findings that `findings` keeps, the newest.
        metrics: that count.
        seed: of the samples.

    Attributes:
        seen, sampled, dropped, failed: numbers of questions.
        findings: the newest.

    Raises:
        ValueError: for a rate or a number out of range.
    """

    def __init__(
        self,
        answer: Callable[..., Answered],
        monitor: Monitor,
        rate: float = 0.01,
        queue: int = 64,
        kept: int = 1000,
        metrics: MonitorMetrics | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"`rate` must lie between 0 and 1, got {rate}.")
        for name, value in (("queue", queue), ("kept", kept)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        self.answer, self.monitor, self.rate, self.limit, self.metrics = answer, monitor, rate, queue, metrics
        self.seen = self.sampled = self.dropped = self.failed = 0
        self.findings: collections.deque[Finding] = collections.deque(maxlen=kept)
        self._waiting: collections.deque[tuple[str, Answered]] = collections.deque()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._working = threading.Lock()
        self._more = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, question: str, *args: object, **options: object) -> Answered:
        """Answer a question; what the function raises is raised, and not sampled."""
        answered = self.answer(question, *args, **options)
        self._sample(question, answered)
        return answered

    def _sample(self, question: str, answered: Answered) -> None:
        with self._lock:
            self.seen += 1
            chosen = self._random.random() < self.rate
            full = chosen and len(self._waiting) >= self.limit
            if chosen:
                self.sampled += 1
                self.dropped += full
                if not full:
                    self._waiting.append((question, answered))
        if chosen and not full:
            self._more.set()
        if self.metrics is not None:
            self.metrics.count("seen")
            self.metrics.count("sampled", chosen)
            self.metrics.count("dropped", full)
            self.metrics.set("queue", self.waiting)

    @property
    def waiting(self) -> int:
        """Questions in the queue."""
        return len(self._waiting)

    def work(self, seconds: float | None = None) -> list[Finding]:
        """Check what waits.

        Args:
            seconds: after which no further batch begins. Default: until the queue is empty.

        Returns:
            the new findings.
        """
        found: list[Finding] = []
        end = None if seconds is None else time.monotonic() + seconds
        with self._working:
            while not self._stopped.is_set() and (end is None or time.monotonic() < end):
                with self._lock:
                    count = min(len(self._waiting), self.monitor.batch_size)
                    batch = [self._waiting.popleft() for _ in range(count)]
                if not batch:
                    break
                found += self._checked(batch)
        return found

    def _checked(self, batch: list[tuple[str, Answered]]) -> list[Finding]:
        try:
            found = self.monitor.check([question for question, _ in batch], [answered for _, answered in batch])
        except Exception:
            if len(batch) > 1:  # one question must not take the others along
                return [finding for item in batch for finding in self._checked([item])]
            logger.exception("The question %r could not be monitored.", batch[0][0][:80])
            self.failed += 1
            if self.metrics is not None:
                self.metrics.count("failed")
            return []
        self.findings += found
        if self.metrics is not None:
            self.metrics.add(found)
            self.metrics.set("queue", self.waiting)
        return found

    def start(self) -> None:
        """Check in a thread of its own, from now on, until `stop`. It shares the model and the machine with answers:
        where these must not wait, call `work` when there is time, or in another process."""
        if self._thread is not None:
            raise RuntimeError("The monitor's thread runs already.")
        self._stopped.clear()
        self._thread = threading.Thread(target=self._run, name="msa-hf-monitor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._more.wait()
            self._more.clear()
            self.work()

    def stop(self) -> None:
        """Let the thread finish its batch and end; what waits stays in the queue."""
        thread, self._thread = self._thread, None
        self._stopped.set()
        self._more.set()
        if thread is not None:
            thread.join()
        self._stopped.clear()
        self._more.clear()
        if self.waiting:
            self._more.set()

    def __enter__(self) -> Watched[Answered]:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
