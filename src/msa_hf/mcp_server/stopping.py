"""Ending work that nobody waits for any more."""

from __future__ import annotations

import threading
import time


class Stop:
    """Says when to end: after some time, or once whoever asked has gone.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds
        self._gone = threading.Event()

    def give_up(self) -> None:
        """Tell that nobody waits any more."""
        self._gone.set()

    @property
    def left(self) -> float:
        """Seconds that are left; none where nobody waits any more."""
        return 0.0 if self._gone.is_set() else max(self._until - time.monotonic(), 0.0)

    def check(self) -> None:
        """Go on only where somebody waits.

        Raises:
            TimeoutError: where the time is over, or nobody waits.
        """
        if not self.left:
            raise TimeoutError(f"It took longer than {self._seconds:g} seconds (--timeout), or was given up.")
