"""`EventSource`: what a consumer asks of a stream, whatever system keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message as it was handed out.

    Attributes:
        id: by which the stream knows it.
        body: what the producer wrote, `encode_event`.
        at: when it was written, in seconds since 1970; None if the stream does not say.
    """

    id: str
    body: bytes
    at: float | None = None


class EventSource(Protocol):
    """A stream as one group of consumers sees it.

    Every message is handed out until it is acknowledged or rejected: at least once, in any order.
    """

    def receive(self, limit: int, wait: float) -> Sequence[Delivery]:
        """At most `limit` messages; waits up to `wait` seconds for the first.

        Raises:
            StreamUnavailable: if the server does not answer; `recover` before the next call.
        """

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Say that these were dealt with for good and need not be handed out again."""

    def reject(self, delivery: Delivery, reason: str) -> None:
        """Put a message where people look at those that cannot be dealt with, and acknowledge it."""

    def recover(self) -> None:
        """Hand out again whatever was handed out and not acknowledged: a consumer begins, or goes on after an error."""

    def lag(self) -> int | None:
        """Messages that are not acknowledged yet; None if the stream cannot tell."""

    def close(self) -> None:
        """Let go of the connection."""
