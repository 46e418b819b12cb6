"""The thread of the model: one thing after the other, and questions that wait together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .errors import ApiError, api_error
from .waiting import Question, Work

logger = logging.getLogger(__name__)
WORKS_IN_A_ROW = 16  # between two batches


class BatchWatcher(Protocol):
    """Told what the thread of the model does."""

    def batch(self, questions: int, seconds: float) -> None:
        """Note that so many questions were answered together."""


class ModelThread:
    """Runs everything that a model does: questions that can go together, in the order in which they came, and between
    two batches other work, which is short; never more than a few pieces of it, so that questions get their turn.

    Args:
        answer: answers questions, all of which can be generated together, and hands out their events.
        most: questions at once.
        waiting: how many things may wait.
        watcher: told of every batch.
    """

    def __init__(
        self, answer: Callable[[Sequence[Question]], None], most: int, waiting: int, watcher: BatchWatcher
    ) -> None:
        self.answer, self.most, self.limit, self.watcher = answer, most, waiting, watcher
        self._questions: deque[Question] = deque()
        self._works: deque[Work] = deque()
        self._works_in_a_row = 0
        self._changed = threading.Condition()
        self._ended = False
        self._seconds = 1.0  # of a batch, about
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def __len__(self) -> int:
        return len(self._questions) + len(self._works)

    @property
    def alive(self) -> bool:
        """Tell whether it goes on."""
        return self._thread.is_alive()

    def put(self, item: Question | Work) -> None:
        """Let something wait for its turn.

        Raises:
            ApiError: 429 where too much waits; 503 behind the end.
        """
        with self._changed:
            if self._ended:
                raise ApiError(503, "This server is ending.", "draining", headers={"Retry-After": "5"})
            if len(self) >= self.limit:
                turns = math.ceil(len(self) / self.most)
                wait = {"Retry-After": str(min(max(math.ceil(turns * self._seconds), 1), 60))}
                message = f"{len(self)} requests wait for the model, as many as may; ask again later."
                raise ApiError(429, message, "queue_full", headers=wait)
            if isinstance(item, Work):
                self._works.append(item)
            else:
                self._questions.append(item)
            self._changed.notify()

    def end(self, seconds: float = 60.0) -> None:
        """Do what waits, and end."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Work):
                self._do(item)
            else:
                start = time.perf_counter()
                self._answer(item)
                seconds = time.perf_counter() - start
                self._seconds += 0.2 * (seconds - self._seconds)
                self.watcher.batch(len(item), seconds)

    def _next(self) -> Work | list[Question] | None:
        """The next thing: a piece of work, or questions that can go together. None at the end."""
        with self._changed:
            while True:
                while self._questions and self._questions[0].cancelled:
                    self._questions.popleft()
                if self._works and (not self._questions or self._works_in_a_row < WORKS_IN_A_ROW):
                    self._works_in_a_row += 1
                    return self._works.popleft()
                self._works_in_a_row = 0
                if self._questions:
                    return self._batch()
                if self._ended:
                    return None
                self._changed.wait()

    def _batch(self) -> list[Question]:
        """The first question, and those that can go together with it."""
        first = self._questions.popleft()
        batch = [first]
        if (kind := first.options.together) is not None:
            for item in list(self._questions):
                if len(batch) == self.most:
                    break
                if item.options.together == kind:
                    self._questions.remove(item)
                    batch.append(item)
        return batch

    def _do(self, work: Work) -> None:
        if not work.future.set_running_or_notify_cancel():
            return
        try:
            result = work.function()
        except BaseException as error:
            work.future.set_exception(error)
        else:
            work.future.set_result(result)

    def _answer(self, questions: list[Question]) -> None:
        """Answer a batch; if that fails, each alone, so that no question fails because of another."""
        try:
            self.answer(questions)
        except Exception as error:
            if len(questions) == 1:
                questions[0].fail(api_error(error))
                return
            logger.warning("a batch of %d questions failed (%s); each is asked alone", len(questions), error)
            for question in questions:
                self._answer([question])
