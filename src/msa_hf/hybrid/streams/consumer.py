"""`StreamConsumer`: applies the events of a stream to a bank, each once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...model.bank_format_msa import BankError
from ...model.origin_msa import check_origin
from .errors import BadEvent, StreamUnavailable
from .event import MAX_TEXT, MemoryEvent, decode_event
from .event_source import Delivery, EventSource
from .metrics import StreamMetrics

if TYPE_CHECKING:
    from ...bank import BankStore

logger = logging.getLogger(__name__)
LOOK_EVERY = 5.0  # seconds between two looks at the lag
Received = tuple[Delivery, MemoryEvent]


class StreamConsumer:
    """Applies events in batches: one commit of the bank per batch, then the acknowledgement.

    A message that was applied and not acknowledged comes again, and has no effect then, as its version is known. What
    cannot be an event, or cannot be encoded, is rejected with the reason, and the rest of its batch is applied.

    Args:
        source: the stream.
        bank: opened to write, with its model and tokenizer.
        batch_size: most events per commit.
        wait: seconds to wait for the first message of a batch.
        max_text: most bytes of a text.
        patience: seconds for which the stream's server may be away before `run` gives up.
        metrics: counters to go on with. Default: new ones.
    """

    def __init__(
        self,
        source: EventSource,
        bank: BankStore,
        *,
        batch_size: int = 256,
        wait: float = 1.0,
        max_text: int = MAX_TEXT,
        patience: float = 60.0,
        metrics: StreamMetrics | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if bank.model is None:
            raise ValueError("A consumer encodes documents: open the bank with its model.")
        self.source, self.bank, self.model = source, bank, bank.model
        self.batch_size, self.wait, self.max_text, self.patience = batch_size, wait, max_text, patience
        self.metrics = StreamMetrics() if metrics is None else metrics
        self._looked = float("-inf")
        source.recover()

    def step(self) -> int:
        """Receive, apply and acknowledge one batch; returns how many messages it had.

        Raises:
            StreamUnavailable: if the server does not answer; nothing is lost, and `source.recover()` goes on.
            BankError, OSError: if the bank cannot be written; nothing was acknowledged.
        """
        deliveries = self.source.receive(self.batch_size, self.wait)
        received: list[Received] = []
        rejected: list[tuple[Delivery, str]] = []
        for delivery in deliveries:
            try:
                received.append((delivery, decode_event(delivery.body, self.max_text)))
            except BadEvent as error:
                rejected.append((delivery, str(error)))
        start = time.perf_counter()
        rejected += self._apply(received)
        self.metrics.apply_seconds += time.perf_counter() - start
        for delivery, reason in rejected:
            logger.warning("message %s was rejected: %s", delivery.id, reason)
            self.source.reject(delivery, reason)
            self.metrics.rejected += 1
        gone = {delivery.id for delivery, _ in rejected}
        self.source.acknowledge([delivery for delivery in deliveries if delivery.id not in gone])
        if times := [delivery.at for delivery in deliveries if delivery.at is not None]:
            self.metrics.behind_seconds = max(0.0, time.time() - max(times))
        if time.monotonic() - self._looked > LOOK_EVERY or not deliveries:
            self.metrics.lag, self._looked = self.source.lag(), time.monotonic()
        return len(deliveries)

    def run(
        self,
        stop: Callable[[], bool] = lambda: False,
        *,
        until_idle: bool = False,
        after_batch: Callable[[StreamMetrics], None] | None = None,
    ) -> StreamMetrics:
        """Apply events until `stop` says so between two batches; returns the counters.

        Args:
            until_idle: also stop when no message came within `wait`.
            after_batch: called with the counters after every batch.

        Raises:
            StreamUnavailable: if the server was away for longer than `patience`.
        """
        away_since: float | None = None
        pause = 0.05
        while not stop():
            try:
                count = self.step()
            except StreamUnavailable as error:
                self.metrics.errors += 1
                away_since = time.monotonic() if away_since is None else away_since
                if time.monotonic() - away_since > self.patience:
                    raise
                logger.warning("%s Trying again.", error)
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
                self.source.recover()
                continue
            away_since, pause = None, 0.05
            if after_batch is not None:
                after_batch(self.metrics)
            if until_idle and not count:
                break
        return self.metrics

    # Applying ---------------------------------------------------------------------------------------------------------

    def _apply(self, received: Sequence[Received]) -> list[tuple[Delivery, str]]:
        """Apply events in one commit, or, if one of them cannot be, in as few as leave these out; returns them."""
        if not received:
            return []
        try:
            changed = self._commit([event for _, event in received])
        except (BankError, OSError):  # some BankErrors are ValueErrors; none is the events' fault
            raise
        except Exception as error:
            check_origin(self.bank.origin, self.model.memory_origin(self.bank.tokenizer))  # nor is another model
            if len(received) == 1:
                delivery, event = received[0]
                if not isinstance(error, ValueError | TypeError) and not self._asks_too_much(event):
                    raise
                return [(delivery, f"cannot be encoded: {str(error) or type(error).__name__}"[:1000])]
            middle = len(received) // 2
            return self._apply(received[:middle]) + self._apply(received[middle:])
        self.metrics.applied += changed
        self.metrics.unchanged += len(received) - changed
        return []

    def _asks_too_much(self, event: MemoryEvent) -> bool:
        """Tell whether the model fails on this text, as for want of memory, and on no other: then it is at fault."""

        def encode(text: str) -> None:
            protocol, tokenizer = self.bank.protocol, self.bank.tokenizer
            row = {"text": text} if protocol is None else protocol.document_row(0, text, tokenizer, "word")
            self.model.encode_documents([row], tokenizer)

        if event.text is None:
            return False
        try:
            encode(event.text)
        except Exception:
            encode("word")  # raises where the model fails on everything
            return True
        return False

    def _commit(self, events: Sequence[MemoryEvent]) -> int:
        """One commit; returns how many events were news."""
        changed, generation = 0, self.bank.generation
        with self.bank.batch():
            for event in events:
                if event.text is None:
                    changed += self.bank.delete(event.key, event.version)
                else:
                    changed += self.bank.upsert(event.key, event.text, event.version, event.metadata)
        self.metrics.commits += self.bank.generation > generation
        return changed
