"""A bank is what one would be that saw each event once, whatever the stream does; in memory and over Redis."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, contents
from servers import redis_server
from stream_worker import BAD, disordered, events, expected

from msa_hf.bank import BankLocked, BankStore
from msa_hf.hybrid.streams import (
    InMemorySource,
    MemoryEvent,
    RedisSource,
    StreamConsumer,
    StreamMetrics,
    StreamUnavailable,
    encode_event,
    open_when_free,
)
from msa_hf.model.bank_format_msa import BankFormatError

Source = InMemorySource | RedisSource
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), None, "--save", "") as url:
        yield url


class Place:
    """A stream of either kind."""

    def __init__(self, url: str | None) -> None:
        self.stream = f"events-{next(NUMBERS)}"
        self.source: Source = InMemorySource() if url is None else RedisSource(url, self.stream, "group")

    def publish(self, bodies: list[bytes]) -> None:
        if isinstance(self.source, InMemorySource):
            for body in bodies:
                self.source.publish(body)
            return
        pipeline = self.source._client.pipeline()
        for body in bodies:
            pipeline.xadd(self.stream, {"event": body})
        pipeline.execute()

    def rejected(self) -> list[tuple[bytes, str]]:
        if isinstance(self.source, InMemorySource):
            return [(delivery.body, reason) for delivery, reason in self.source.rejected]
        found = self.source._client.xrange(self.source.dead_letters)
        return [(fields[b"event"], fields[b"reason"].decode()) for _, fields in found]


@pytest.fixture(params=["memory", "redis"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(None if request.param == "memory" else request.getfixturevalue("redis_url"))


def texts(bank: BankStore) -> dict[str, tuple[object, ...]]:
    return contents(bank.snapshot()) if len(bank) else {}


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_repeated_and_reordered_events_with_bad_ones_between_them(
    place: Place, fast_path: Path, batch_size: int
) -> None:
    happened = events(min(250, 50 * batch_size), seed=batch_size)
    bodies = disordered(happened, random.Random(batch_size))
    place.publish(bodies)
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        consumer = StreamConsumer(place.source, bank, batch_size=batch_size, wait=0.01)
        metrics = consumer.run(until_idle=True)
        assert texts(bank) == expected(happened)
        bad = [body for body in bodies if body in BAD]
        assert sorted(body for body, _ in place.rejected()) == sorted(bad) and len(bad) == metrics.rejected > 1
        assert metrics.events == len(bodies) and metrics.lag == 0
        assert metrics.commits == bank.generation <= -(-len(bodies) // batch_size)
        generation = bank.generation
        place.publish([encode_event(event) for event in happened])
        again = consumer.run(until_idle=True)
        assert (bank.generation, again.applied) == (generation, again.applied) and texts(bank) == expected(happened)


def test_an_event_is_acknowledged_after_the_commit_and_comes_again_before(
    place: Place, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.publish([encode_event(MemoryEvent("k", 1, "text"))])
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        order: list[str] = []
        acknowledge, commit = place.source.acknowledge, bank._commit
        monkeypatch.setattr(bank, "_commit", lambda changes: (commit(changes), order.append("commit")))
        monkeypatch.setattr(place.source, "acknowledge", lambda found: order.append("acknowledge"))  # killed before
        assert StreamConsumer(place.source, bank, wait=0.01).step() == 1
        assert order == ["commit", "acknowledge"] and place.source.lag() == 1
        monkeypatch.setattr(place.source, "acknowledge", acknowledge)
        consumer = StreamConsumer(place.source, bank, wait=0.01)
        assert (consumer.step(), consumer.metrics.unchanged, consumer.metrics.commits) == (1, 1, 0)
        assert (place.source.lag(), consumer.step()) == (0, 0)


def test_what_cannot_be_encoded_is_rejected_alone(place: Place, fast_path: Path) -> None:
    good = [MemoryEvent(f"k{number}", 1, f"text {number}") for number in range(20)]
    bad = [MemoryEvent("bad one", 1, "refuse me"), MemoryEvent("bad two", 1, "refuse me")]
    happened = [*good[:3], bad[0], *good[3:15], bad[1], *good[15:]]
    place.publish([encode_event(event) for event in happened])
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        StreamConsumer(place.source, bank, wait=0.01).run(until_idle=True)
        assert texts(bank) == expected(good)
        assert place.rejected() == [(encode_event(event), "cannot be encoded: cannot be encoded") for event in bad]


class Overloaded(FakeModel):
    """Fails on some texts by itself, or on all of them."""

    def __init__(self, marks: tuple[str, ...], error: Exception) -> None:
        super().__init__()
        self.marks, self.error = marks, error

    def encode_documents(self, documents: Iterable[Any], tokenizer: Any = None, **options: Any) -> Any:
        rows = list(documents)
        if any(mark in str(row["text"]) for row in rows if isinstance(row, dict) for mark in self.marks):
            raise self.error
        return super().encode_documents(rows, tokenizer, **options)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError(), RecursionError("too deep")])
def test_a_text_that_the_device_cannot_take_is_rejected_alone(place: Place, fast_path: Path, error: Exception) -> None:
    good = [MemoryEvent(f"k{number}", 1, f"text {number}") for number in range(20)]
    happened = [*good[:7], MemoryEvent("huge", 1, "heavy"), *good[7:], MemoryEvent("gone", 2, None)]
    place.publish([encode_event(event) for event in happened])
    with BankStore(Overloaded(("heavy",), error), fast_path / "bank") as bank:
        StreamConsumer(place.source, bank, wait=0.01).run(until_idle=True)
        assert texts(bank) == expected(good) and place.source.lag() == 0
    reason = f"cannot be encoded: {error}" if str(error) else "cannot be encoded: MemoryError"
    assert place.rejected() == [(encode_event(happened[7]), reason)]


@pytest.mark.parametrize("marks", [("",), ("text 3", "word")])
def test_a_device_that_takes_nothing_any_more_rejects_nothing(
    place: Place, fast_path: Path, marks: tuple[str, ...]
) -> None:
    happened = [MemoryEvent(f"k{number}", 1, f"text {number}") for number in range(9)]
    place.publish([encode_event(event) for event in happened])
    with (
        BankStore(Overloaded(marks, RuntimeError("device lost")), fast_path / "bank") as bank,
        pytest.raises(RuntimeError, match="device lost"),
    ):
        StreamConsumer(place.source, bank, wait=0.01).run(until_idle=True)
    assert place.rejected() == []
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        StreamConsumer(place.source, bank, wait=0.01).run(until_idle=True)
        assert texts(bank) == expected(happened)


def test_a_mistake_in_the_program_rejects_nothing(
    place: Place, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.publish([encode_event(event) for event in events(10)])
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        monkeypatch.setattr(bank, "_commit", lambda changes: {}["missing"])
        with pytest.raises(KeyError, match="missing"):
            StreamConsumer(place.source, bank, wait=0.01).step()
    assert place.rejected() == [] and place.source.lag() == 10


@pytest.mark.parametrize("error", [BankFormatError("a file is damaged"), OSError(28, "No space left on device")])
def test_faults_of_the_bank_are_not_taken_for_bad_events(
    place: Place, fast_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    place.publish([encode_event(event) for event in events(10)])

    def fail(changes: object) -> None:
        raise error

    with BankStore(FakeModel(), fast_path / "bank") as bank:
        monkeypatch.setattr(bank, "_commit", fail)
        consumer = StreamConsumer(place.source, bank, wait=0.01)
        with pytest.raises(type(error)):
            consumer.step()
        assert place.rejected() == [] and place.source.lag() == 10
        monkeypatch.undo()
        place.source.recover()
        consumer.run(until_idle=True)
        assert texts(bank) == expected(events(10))


def test_a_model_that_is_another_one_now_rejects_nothing(
    place: Place, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import fake_model

    place.publish([encode_event(event) for event in events(3)])
    model = FakeModel()
    with BankStore(model, fast_path / "bank") as bank:
        other = replace(fake_model.ORIGIN, model_fingerprint="0" * 64)
        monkeypatch.setattr(model, "memory_origin", lambda tokenizer=None: other)
        monkeypatch.setattr(
            model, "encode_documents", lambda *given, **options: (_ for _ in ()).throw(ValueError("another model"))
        )
        with pytest.raises(ValueError, match="model"):
            StreamConsumer(place.source, bank, wait=0.01).step()
        assert place.rejected() == []


def test_a_second_consumer_stands_by_until_the_first_is_gone(place: Place, fast_path: Path) -> None:
    directory = fast_path / "bank"
    first = BankStore(FakeModel(), directory)
    place.publish([encode_event(event) for event in events(10)])
    StreamConsumer(place.source, first, batch_size=4, wait=0.01).step()
    place.source.receive(3, 0.01)  # and is killed before it applies these
    opened: list[BankStore] = []

    def stand_by() -> None:
        opened.append(open_when_free(lambda: BankStore(FakeModel(), directory), poll=0.01))

    second = threading.Thread(target=stand_by)
    second.start()
    time.sleep(0.1)
    assert not opened and place.source.lag() == 6  # it takes nothing while it waits
    with pytest.raises(BankLocked, match="is open for writing in process"):
        open_when_free(lambda: BankStore(FakeModel(), directory), patience=0.03, poll=0.01)
    with pytest.raises(BankLocked):
        open_when_free(lambda: BankStore(FakeModel(), directory), stop=lambda: True)
    first.close()
    second.join(10)
    (bank,) = opened
    StreamConsumer(place.source, bank, wait=0.01).run(until_idle=True)
    assert texts(bank) == expected(events(10)) and place.source.lag() == 0
    bank.close()


def test_a_server_that_is_away_is_waited_for_but_not_for_ever(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = InMemorySource(map(encode_event, events(9)))
    receive, acknowledge, away = source.receive, source.acknowledge, [3]

    def failing(call: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object) -> object:
            if away[0] > 0:
                away[0] -= 1
                raise StreamUnavailable("No answer.")
            return call(*given)

        return run

    monkeypatch.setattr(source, "receive", failing(receive))
    monkeypatch.setattr(source, "acknowledge", failing(acknowledge))
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        consumer = StreamConsumer(source, bank, batch_size=4, wait=0.01)
        metrics = consumer.run(until_idle=True)
        assert metrics.errors == 3 and "Trying again" in caplog.text and texts(bank) == expected(events(9))
        away[0] = 10**9
        consumer.patience = 0.1
        with pytest.raises(StreamUnavailable):
            consumer.run()


def test_counters_are_prometheus_text(place: Place, fast_path: Path) -> None:
    place.publish([*(encode_event(event) for event in events(30)), BAD[0]])
    seen: list[int] = []
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        consumer = StreamConsumer(place.source, bank, batch_size=10, wait=0.01)
        metrics = consumer.run(until_idle=True, after_batch=lambda found: seen.append(found.events))
    assert seen == [10, 20, 30, 31, 31]
    found = {}
    for line in metrics.prometheus().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    assert found['msa_hf_stream_events_total{outcome="rejected"}'] == 1
    assert found['msa_hf_stream_events_total{outcome="applied"}'] == metrics.applied > 15
    assert found["msa_hf_stream_lag"] == 0 and 0 <= found["msa_hf_stream_behind_seconds"] < 60
    assert found["msa_hf_stream_apply_seconds_total"] > 0 and found["msa_hf_stream_commits_total"] == 3
    with contextlib.suppress(ImportError):
        from prometheus_client.parser import text_string_to_metric_families

        families = {family.name: family for family in text_string_to_metric_families(metrics.prometheus())}
        assert families["msa_hf_stream_events"].type == "counter" and families["msa_hf_stream_lag"].type == "gauge"
    assert "lag" not in StreamMetrics().prometheus() and StreamMetrics().prometheus().endswith("\n")


def test_a_bank_without_a_model_is_refused(fast_path: Path) -> None:
    with BankStore(FakeModel(), fast_path / "bank"):
        pass
    with BankStore(None, fast_path / "bank") as bank, pytest.raises(ValueError, match="with its model"):
        StreamConsumer(InMemorySource(), bank)
    with BankStore(FakeModel(), None) as bank, pytest.raises(ValueError, match="`batch_size`"):
        StreamConsumer(InMemorySource(), bank, batch_size=0)
