"""`RedisSource`: a Redis stream, read by a consumer group."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import StreamError, StreamUnavailable
from .event_source import Delivery

logger = logging.getLogger(__name__)
FIELD = b"event"
PAGE = 256  # pending messages that are claimed at once
# A script ends where a command fails; a transaction would go on, and acknowledge a message that nobody kept.
REJECT = """
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
return redis.call('XACK', KEYS[2], ARGV[1], ARGV[2])
"""
# Where the stream and the group are, of one moment, without the entries that XINFO would bring along.
LOOK = """
local function named(flat)
  local made = {}
  for place = 1, #flat, 2 do made[flat[place]] = flat[place + 1] end
  return made
end
local stream, first = named(redis.call('XINFO', 'STREAM', KEYS[1])), ''
if type(stream['first-entry']) == 'table' then first = stream['first-entry'][1] end
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = named(flat)
  if group['name'] == ARGV[1] then
    return {stream['entries-added'] or -1, stream['length'], first, stream['last-generated-id'],
            stream['max-deleted-entry-id'] or '', group['last-delivered-id'], group['entries-read'] or -1,
            group['pending']}
  end
end
return false
"""
# What a server says while it starts, is replaced by another one, or cannot write for a while: it may pass.
PASSING = (
    "READONLY",
    "MASTERDOWN",
    "LOADING",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "MISCONF",
    "NOREPLICAS",
    "BUSY ",
    "UNBLOCKED",
)


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a group in its stream: the answer of `LOOK`.

    Attributes:
        added: entries that there ever were; -1: unknown, before Redis 7.
        length: entries that are there.
        first, last, deleted: ids of the first of these, the last that was added, the last that was deleted singly.
        delivered: the last id that the group was given.
        read: entries that the server counts as given to it; -1: unknown.
        pending: entries that are not acknowledged.
    """

    added: int
    length: int
    first: tuple[int, int] | None
    last: tuple[int, int] | None
    deleted: tuple[int, int] | None
    delivered: tuple[int, int] | None
    read: int
    pending: int

    @property
    def before_the_first(self) -> bool:
        """Tell whether the group was given nothing of what is there."""
        return self.delivered is not None and (self.first is None or self.delivered < self.first)

    @property
    def gone(self) -> int | None:
        """Entries before the first one that is there; None where the server cannot tell."""
        singly = self.deleted is not None and self.first is not None and self.deleted > self.first
        return None if self.added < 0 or singly else self.added - self.length


class RedisSource:
    """An `EventSource` over a Redis stream (Redis 6.2 or newer) whose entries have the field `event`.

    Messages go to one consumer of the group and stay with it until they are acknowledged. `recover` takes over all that
    are pending, also those of other consumers: a bank has one writer, so that whoever has it open is the only one at
    work, and the others are dead. Give each bank a group of its own.

    Args:
        url: such as `redis://host:6379/0`, `rediss://` with TLS.
        stream: the stream's key; made if it is missing.
        group: of consumers; made if it is missing, and then begins with the first message there is.
        consumer: name of this consumer; several may have the same one, as one is at work.
        dead_letters: key of the stream for rejected messages. Default: `<stream>:dead`.
        timeout: seconds to wait for a connection and for an answer.
        claim_idle: while there is nothing else, messages that have been pending for so many seconds are taken over.

    Attributes:
        lost: messages that were trimmed from the stream before they were acknowledged, or even delivered, as far as the
            server says so (Redis 7).

    Raises:
        ImportError: if redis is missing.
        StreamError: if the key is no stream, or the server refuses.
        StreamUnavailable: if no server answers.
    """

    def __init__(
        self,
        url: str,
        stream: str,
        group: str,
        *,
        consumer: str = "writer",
        dead_letters: str | None = None,
        timeout: float = 5.0,
        claim_idle: float = 60.0,
    ) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ImportError('RedisSource needs redis: `pip install "msa-hf[redis]"`.') from error
        self.stream, self.group, self.consumer = stream, group, consumer
        self.dead_letters = dead_letters or f"{stream}:dead"
        if self.dead_letters == stream:
            raise StreamError(f"{stream!r} cannot get its own dead letters, which would come again for ever.")
        for name, key in (("stream", stream), ("group", group), ("dead_letters", self.dead_letters)):
            try:
                key.encode()
            except UnicodeEncodeError as error:
                raise StreamError(f"`{name}` is no Unicode ({error.reason}), got {key!r:.80}.") from None
        self.lost = 0
        self._passed: int | None = (
            None  # entries up to the last one that the group was given, whether they are there or not
        )
        self._timeout, self._claim_idle = timeout, claim_idle
        self._exceptions = redis.exceptions
        self._recovering: bytes | None = b"0-0"
        self._looked = time.monotonic()
        try:
            # No retries inside: messages of an answer that was lost are pending, and must be recovered.
            self._client: Any = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise StreamError(f"{_without_password(url)} is no URL of a Redis server: {error}") from error
        self._where = _without_password(url)
        with self._reported(self.dead_letters):
            kind: Any = self._client.type(self.dead_letters)
        if kind not in (b"none", b"stream"):
            raise StreamError(
                f"{self.dead_letters!r} at {self._where} is a {kind.decode()}, no stream; name another key for "
                "dead letters."
            )
        with self._reported(), contextlib.suppress(_GroupExists):
            self._create_group()
            self._look()  # what was trimmed before there was a group was nobody's

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except self._exceptions.ResponseError as error:
            if "BUSYGROUP" in str(error):
                raise _GroupExists from None
            raise

    def receive(self, limit: int, wait: float) -> Sequence[Delivery]:
        """See `EventSource`; what is recovered comes first."""
        with self._reported():
            if self._recovering is not None and (found := self._claim(limit, 0)):
                return found
            self._look()
            # A blocked answer must come before the socket's timeout.
            block = max(1, int(1000 * min(wait, 0.8 * self._timeout)))
            answer = self._client.xreadgroup(
                self.group, self.consumer, {self.stream: ">"}, count=limit, block=block if wait > 0 else None
            )
            entries = [entry for _, found in _streams(answer) for entry in found]
            if self._passed is not None:
                self._passed += len(entries)
            if not entries and time.monotonic() - self._looked > self._claim_idle:
                self._recovering, self._looked = b"0-0", time.monotonic()
                claimed = self._claim(limit, self._claim_idle)
                self._recovering = None
                return claimed
            return [_delivery(id, fields) for id, fields in entries]

    def _claim(self, limit: int, idle: float) -> list[Delivery]:
        """Take over pending messages from where the last call stopped; none when all were seen."""
        while self._recovering is not None:
            cursor, entries, *deleted = self._client.xautoclaim(
                self.stream, self.group, self.consumer, int(1000 * idle), self._recovering, count=min(limit, PAGE)
            )
            gone = len(deleted[0]) if deleted else 0
            # Before Redis 7 entries that are not in the stream any more come without fields, and stay pending.
            alive = [(id, fields) for id, fields in entries if fields is not None]
            missing = [id for id, fields in entries if fields is None and id is not None]
            if missing:
                self._client.xack(self.stream, self.group, *missing)
            self._note_lost(gone + len(missing))
            self._recovering = None if cursor == b"0-0" else cursor
            if alive:
                return [_delivery(id, fields) for id, fields in alive]
        return []

    def _place(self) -> _Place:
        found = self._client.eval(LOOK, 1, self.stream, self.group)
        if not found:
            raise StreamError(f"{self.stream!r} at {self._where} has no group {self.group!r} any more; begin again.")
        added, length, first, last, deleted, delivered, read, pending = found
        ids = (_id(first), _id(last), _id(deleted), _id(delivered))
        return _Place(int(added), int(length), *ids, int(read), int(pending))

    def _look(self) -> _Place:
        """Note what was trimmed before it was delivered: entries are gone that lay behind the last one delivered."""
        place = self._place()
        counted = [count for count in (self._passed, place.read) if count is not None and count >= 0]
        # The server counts what it gave, some releases without what was trimmed before; we do not know what others got.
        self._passed = max(counted, default=None)
        known: int | None = None
        if place.delivered == place.last and place.added >= 0:
            known = place.added
        elif place.before_the_first and place.gone is not None:
            known = place.gone
            if self._passed is not None:
                self._note_lost(known - self._passed, "delivered")
        if known is not None:
            self._passed = known
            if place.read < known and place.delivered is not None:
                # Corrects the server's count, by which the next consumer will know what was lost before it came.
                delivered = "{}-{}".format(*place.delivered)
                self._client.xgroup_setid(self.stream, self.group, delivered, entries_read=known)
        return place

    def _note_lost(self, count: int, before: str = "acknowledged") -> None:
        if count > 0:
            self.lost += count
            logger.warning(
                "%s: %d messages were trimmed from the stream before they were %s; write these events again.",
                self.stream,
                count,
                before,
            )

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """See `EventSource`."""
        if deliveries:
            with self._reported():
                self._client.xack(self.stream, self.group, *(delivery.id for delivery in deliveries))

    def reject(self, delivery: Delivery, reason: str) -> None:
        """See `EventSource`; both at once, so that a rejected message is there once, and never nowhere."""
        fields = {FIELD: delivery.body, "reason": reason, "id": delivery.id, "group": self.group, "at": time.time()}
        values = [part for field in fields.items() for part in field]
        with self._reported(self.dead_letters):
            self._client.eval(REJECT, 2, self.dead_letters, self.stream, self.group, delivery.id, *values)

    def recover(self) -> None:
        """See `EventSource`; connects anew, as another server may stand under the address now."""
        self._recovering = b"0-0"
        self._client.connection_pool.disconnect()

    def lag(self) -> int | None:
        """See `EventSource`; None before Redis 7, and where entries that were not delivered were deleted."""
        with self._reported():
            place = self._look()
            if place.before_the_first:
                return place.length + place.pending
            if self._passed is None or place.added < 0 or (place.deleted or (0, 0)) > (place.delivered or (0, 0)):
                return None
            return place.added - self._passed + place.pending

    def close(self) -> None:
        """See `EventSource`."""
        self._client.close()

    @contextlib.contextmanager
    def _reported(self, key: str | None = None) -> Iterator[None]:
        """Turn redis-py's errors into a stream's. `key`: what is written. Default: the stream."""
        exceptions, key = self._exceptions, self.stream if key is None else key
        try:
            yield
        except exceptions.AuthenticationError as error:
            raise StreamError(f"{self._where} refuses the user or password: {error}") from error
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            raise StreamUnavailable(
                f"No answer from {self._where} within {self._timeout:g} s ({error}). Is the server there?"
            ) from error
        except exceptions.RedisError as error:
            text = str(error).partition(" script: ")[0].rstrip(".")
            away = exceptions.ReadOnlyError, exceptions.ClusterDownError, exceptions.TryAgainError
            if isinstance(error, away) or text.startswith(PASSING):
                raise StreamUnavailable(f"{self._where} does not take this now: {text}.") from error
            hint = "."
            if "WRONGTYPE" in text:
                hint = f": {key!r} is no stream; name another key."
            elif "maxmemory" in text:
                hint = ": the server's memory is full; trim its streams, or raise `maxmemory`. Nothing is lost."
            elif "NOGROUP" in text:
                hint = f": the stream or the group {self.group!r} was deleted; begin again."
            elif "unknown command" in text.lower():
                hint = ": Redis 6.2 or newer is needed."
            raise StreamError(f"{key!r} at {self._where}: {text}{hint}") from error


class _GroupExists(Exception):
    """The group is there already."""


def _streams(answer: Any) -> Sequence[tuple[bytes, Sequence[tuple[bytes, Mapping[bytes, bytes]]]]]:
    """Streams and their entries, in either form that redis-py answers in."""
    if not answer:
        return []
    if isinstance(answer, Mapping):  # RESP3: a list of lists per stream
        return [(name, [entry for page in pages for entry in page]) for name, pages in answer.items()]
    streams: Sequence[tuple[bytes, Sequence[tuple[bytes, Mapping[bytes, bytes]]]]] = answer
    return streams


def _id(text: bytes) -> tuple[int, int] | None:
    """The two numbers of an entry's id; None for none."""
    milliseconds, _, number = text.partition(b"-")
    return (int(milliseconds), int(number)) if number else None


def _delivery(id: bytes, fields: Mapping[bytes, bytes]) -> Delivery:
    body = fields.get(FIELD)
    if body is None:  # kept as it is for those who look at it
        body = repr(dict(fields)).encode()
    return Delivery(id.decode(), body, int(id.partition(b"-")[0]) / 1000)


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"
