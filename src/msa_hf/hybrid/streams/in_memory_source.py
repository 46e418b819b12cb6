"""`InMemorySource`: a stream within a process, for tests and examples."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from .event_source import Delivery


class InMemorySource:
    """An `EventSource` in memory; threads may publish while another one receives.

    Attributes:
        rejected: messages that were rejected, with the reasons.
    """

    def __init__(self, bodies: Iterable[bytes] = ()) -> None:
        self._ids = itertools.count()
        self._waiting: deque[Delivery] = deque()
        self._pending: dict[str, Delivery] = {}
        self._changed = threading.Condition()
        self.rejected: list[tuple[Delivery, str]] = []
        for body in bodies:
            self.publish(body)

    def publish(self, body: bytes) -> None:
        """Write a message."""
        with self._changed:
            self._waiting.append(Delivery(str(next(self._ids)), body, time.time()))
            self._changed.notify()

    def receive(self, limit: int, wait: float) -> Sequence[Delivery]:
        """See `EventSource`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting), wait)
            found = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            self._pending.update((delivery.id, delivery) for delivery in found)
            return found

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `EventSource`."""
        with self._changed:
            for delivery in deliveries:
                self._pending.pop(delivery.id, None)

    def reject(self, delivery: Delivery, reason: str) -> None:
        """See `EventSource`."""
        self.rejected.append((delivery, reason))
        self.acknowledge([delivery])

    def recover(self) -> None:
        """See `EventSource`."""
        with self._changed:
            self._waiting.extendleft(reversed(self._pending.values()))
            self._pending.clear()

    def lag(self) -> int | None:
        """See `EventSource`."""
        with self._changed:
            return len(self._waiting) + len(self._pending)

    def close(self) -> None:
        """See `EventSource`."""
