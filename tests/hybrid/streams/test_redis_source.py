"""Redis itself: consumers killed at random moments, a server that restarts, streams that were trimmed or are none."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, contents
from servers import free_port, redis_server
from stream_worker import BAD, disordered, events, expected

import msa_hf
from msa_hf.bank import BankStore
from msa_hf.hybrid.streams import (
    RedisSource,
    StreamConsumer,
    StreamError,
    StreamUnavailable,
    encode_event,
    open_when_free,
)

redis = pytest.importorskip("redis")
KILLS = 50
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis"), None, "--save", "") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        yield client


@pytest.fixture(scope="module")
def workers() -> Iterator[subprocess.Popen[str]]:
    """A process that forks a consumer for every line it reads."""
    command = [sys.executable, str(Path(__file__).parents[2] / "helpers" / "stream_worker.py")]
    path = os.pathsep.join([str(Path(msa_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, process_group=0) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # with those that are still at work


def begin(workers: subprocess.Popen[str], **told: object) -> int:
    """Start a consumer; its number."""
    assert workers.stdin is not None and workers.stdout is not None
    print(json.dumps(told), file=workers.stdin, flush=True)
    while (line := workers.stdout.readline().split())[0] != "pid":
        assert line == ["dead"]
    return int(line[1])


def publish(client: Any, stream: str, bodies: list[bytes]) -> None:
    pipeline = client.pipeline()
    for body in bodies:
        pipeline.xadd(stream, {"event": body})
    pipeline.execute()


def drained(client: Any, stream: str) -> bool:
    (group,) = client.xinfo_groups(stream)
    return group["lag"] == 0 and group["pending"] == 0


def test_a_consumer_killed_at_50_random_moments(
    workers: subprocess.Popen[str], url: str, client: Any, fast_path: Path
) -> None:
    """Events come all the time; afterwards the bank is what one is that saw each once; so are the dead letters."""
    pick = random.Random(3)
    happened, bodies = [], []
    told = {"bank": str(fast_path / "bank"), "url": url, "stream": "kills", "group": "g", "batch": 5}
    client.xgroup_create("kills", "g", id="0", mkstream=True)
    span, moved = 0.08, 0
    for _ in range(KILLS):
        fresh = events(8, first=len(happened), seed=3)
        happened += fresh
        bodies += (disorder := [*disordered(fresh, pick), pick.choice(BAD)])
        publish(client, "kills", disorder)
        child = begin(workers, **told)
        before = client.xinfo_groups("kills")[0]["last-delivered-id"]
        time.sleep(pick.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        progress = client.xinfo_groups("kills")[0]["last-delivered-id"] != before
        moved += progress
        span *= 0.95 if progress else 1.15  # as long as a few commits take, also where the machine is busy
    assert moved > KILLS // 5, "the kills must have hit consumers at work"
    with open_when_free(lambda: BankStore(FakeModel(), fast_path / "bank"), 60) as bank:
        StreamConsumer(RedisSource(url, "kills", "g"), bank, wait=0.01).run(until_idle=True)
        assert contents(bank.snapshot()) == expected(happened)
        assert bank.verify() == []
    assert drained(client, "kills")
    dead = [fields[b"event"] for _, fields in client.xrange("kills:dead")]
    assert sorted(dead) == sorted(body for body in bodies if body in BAD)


def test_the_second_of_two_consumers_goes_on_where_the_first_was_killed(
    workers: subprocess.Popen[str], url: str, client: Any, fast_path: Path
) -> None:
    pick = random.Random(4)
    told = {"bank": str(fast_path / "bank"), "url": url, "stream": "two", "group": "g", "batch": 3, "background": True}
    client.xgroup_create("two", "g", id="0", mkstream=True)
    happened = events(60, seed=4)
    bodies = disordered(happened, pick)
    first, second = (begin(workers, **told) for _ in range(2))
    publish(client, "two", bodies[:30])
    deadline = time.monotonic() + 60
    while not client.xinfo_groups("two")[0]["entries-read"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    publish(client, "two", bodies[30:])
    while not drained(client, "two"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(second, signal.SIGKILL)
    with open_when_free(lambda: BankStore(FakeModel(), fast_path / "bank"), 60) as bank:
        assert contents(bank.snapshot()) == expected(happened)


def test_a_server_that_restarts_is_waited_for(tmp_path: Path, fast_path: Path) -> None:
    """It forgets nothing that it acknowledged, as it appends to a file; the consumer goes on by itself."""
    port, options = free_port(), ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
    happened = events(80, seed=5)
    bodies = disordered(happened, random.Random(5))
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        with redis_server(tmp_path, port, *options) as url, contextlib.closing(redis.Redis.from_url(url)) as client:
            publish(client, "s", bodies)
            source = RedisSource(url, "s", "g", timeout=2.0)
            consumer = StreamConsumer(source, bank, batch_size=8, wait=0.05)
            consumer.step()
            source.receive(8, 0.05)  # not acknowledged when the server goes
        with pytest.raises(StreamUnavailable, match=f"No answer from redis://.*:{port}"):
            consumer.step()
        runner = threading.Thread(target=consumer.run, kwargs={"until_idle": True})
        runner.start()
        deadline = time.monotonic() + 60
        while not consumer.metrics.errors:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with redis_server(tmp_path, port, *options):
            runner.join(60)
            assert not runner.is_alive() and source.lag() == 0
        assert contents(bank.snapshot()) == expected(happened)


def test_pending_messages_of_dead_consumers_are_taken_over(url: str, client: Any, fast_path: Path) -> None:
    """Whatever their number; late ones of others as well, while nothing else comes."""
    happened = events(700, seed=6)
    publish(client, "pending", [encode_event(event) for event in happened])
    dead = RedisSource(url, "pending", "g", consumer="dead")
    while dead.receive(200, 0):
        dead._recovering = None
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        source = RedisSource(url, "pending", "g", claim_idle=1.0)
        consumer = StreamConsumer(source, bank, batch_size=300, wait=0.01)
        consumer.run(until_idle=True)
        assert contents(bank.snapshot()) == expected(happened) and drained(client, "pending")
        late = events(3, first=700, seed=6)
        publish(client, "pending", [encode_event(event) for event in late])
        assert len(dead.receive(3, 0)) == 3 and consumer.step() == 0
        deadline = time.monotonic() + 20
        while not drained(client, "pending"):
            assert time.monotonic() < deadline
            consumer.step()
        assert contents(bank.snapshot()) == expected([*happened, *late])


def test_trimmed_messages_are_said_to_be_lost(
    url: str, client: Any, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    happened = events(20, seed=7)
    publish(client, "trimmed", [encode_event(event) for event in happened])
    assert len(RedisSource(url, "trimmed", "g").receive(12, 0)) == 12
    client.xtrim("trimmed", maxlen=13, approximate=False)
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        source = RedisSource(url, "trimmed", "g")
        StreamConsumer(source, bank, wait=0.01).run(until_idle=True)
        assert source.lost == 7 and "7 messages were trimmed" in caplog.text
        assert (
            contents(bank.snapshot()) == expected(happened[7:])
            and source._client.xpending("trimmed", "g")["pending"] == 0
        )


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    "steps",
    [
        [("add", 20), ("read", 5), ("trim", 12), ("lost", 3), ("read", 2), ("read", 50)],
        [
            ("add", 20),
            ("trim", 12),
            ("lost", 8),
            ("read", 50),
            ("add", 9),
            ("trim", 0),
            ("lost", 9),
            ("add", 2),
            ("read", 9),
        ],
        [
            ("add", 9),
            ("read", 4),
            ("trim", 3),
            ("lost", 2),
            ("read", 1),
            ("add", 9),
            ("trim", 4),
            ("lost", 7),
            ("read", 9),
        ],
        [("add", 9), ("read", 9), ("trim", 0), ("lost", 0), ("add", 3), ("read", 1), ("trim", 2), ("read", 9)],
        [("add", 9), ("read", 3), ("other", 3), ("trim", 2), ("lost", 1), ("read", 9)],
    ],
)
def test_messages_that_were_trimmed_before_they_were_delivered_are_said_to_be_lost(
    url: str, client: Any, steps: list[tuple[str, int]], restarted: bool
) -> None:
    """Whether a consumer was there meanwhile or another one goes on; and the lag comes to nothing, as it does not in
    the server's own count."""
    stream = f"undelivered-{next(NUMBERS)}"
    sources = [RedisSource(url, stream, "g")]
    sources[0].recover()
    lost, received, added = 0, 0, 0
    for step, count in steps:
        if restarted and step == "read":
            sources.append(RedisSource(url, stream, "g"))
            sources[-1]._recovering = None
        if step == "add":
            added += count
            publish(client, stream, [b"x"] * count)
        elif step == "read":
            found = sources[-1].receive(count, 0)
            received += len(found)
            sources[-1].acknowledge(found)
        elif step == "other":
            entries = client.xreadgroup("g", "another", {stream: ">"}, count=count)[0][1]
            received += len(entries)
            client.xack(stream, "g", *(id for id, _ in entries))
        elif step == "trim":
            client.xtrim(stream, maxlen=count, approximate=False)
        else:
            lost += count
    assert sources[-1].receive(10, 0) == [] and sources[-1].lag() == 0
    assert sum(source.lost for source in sources) == lost == added - received


def test_what_was_trimmed_before_there_was_a_group_is_not_lost(url: str, client: Any) -> None:
    publish(client, "older", [b"x"] * 9)
    client.xtrim("older", maxlen=4, approximate=False)
    source = RedisSource(url, "older", "g")
    assert source.lag() == 4
    source.acknowledge(source.receive(9, 0))
    assert (source.lost, source.lag()) == (0, 0)


def test_a_server_that_takes_no_writes_for_a_while_is_waited_for(tmp_path: Path, fast_path: Path) -> None:
    """As after a failover, until the address belongs to the new primary; or while its disk is full."""
    happened = events(40, seed=8)
    with (
        redis_server(tmp_path, None, "--save", "") as url,
        contextlib.closing(redis.Redis.from_url(url)) as client,
        BankStore(FakeModel(), fast_path / "bank") as bank,
    ):
        publish(client, "s", [encode_event(event) for event in happened])
        consumer = StreamConsumer(RedisSource(url, "s", "g"), bank, batch_size=8, wait=0.01)
        consumer.step()
        client.replicaof("127.0.0.1", free_port())
        with pytest.raises(StreamUnavailable, match=r"does not take this now: .*read only replica"):
            consumer.step()
        runner = threading.Thread(target=consumer.run, kwargs={"until_idle": True})
        runner.start()
        deadline = time.monotonic() + 60
        while not consumer.metrics.errors:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        client.replicaof("NO", "ONE")
        runner.join(60)
        assert not runner.is_alive() and consumer.source.lag() == 0
        assert contents(bank.snapshot()) == expected(happened)


def test_entries_without_the_field_are_kept_for_those_who_look(url: str, client: Any, fast_path: Path) -> None:
    client.xadd("fields", {"text": b"caf\xe9", "key": "k"})
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        consumer = StreamConsumer(RedisSource(url, "fields", "g", dead_letters="letters"), bank, wait=0.01)
        consumer.run(until_idle=True)
    ((_, fields),) = client.xrange("letters")
    assert fields[b"event"] == repr({b"text": b"caf\xe9", b"key": b"k"}).encode()
    assert fields[b"reason"].startswith(b"not JSON") and fields[b"group"] == b"g"
    assert fields[b"id"].decode() == client.xrange("fields")[0][0].decode()


def test_a_message_that_nobody_keeps_is_not_acknowledged(url: str, client: Any, fast_path: Path) -> None:
    """Dead letters that cannot be written: the consumer stops, and goes on once they can be."""
    source = RedisSource(url, "poison", "g")
    client.xadd("poison", {"event": b"no event"})
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        consumer = StreamConsumer(source, bank, wait=0.01)
        client.set("poison:dead", "no stream")
        with pytest.raises(StreamError, match="'poison:dead' is no stream"):
            consumer.run(until_idle=True)
        client.delete("poison:dead")
        source.recover()
        client.config_set("maxmemory", "1")
        with pytest.raises(StreamError, match="memory is full"):
            consumer.run(until_idle=True)
        client.config_set("maxmemory", "0")
        assert client.xpending("poison", "g")["pending"] == 1
        source.recover()
        consumer.run(until_idle=True)
    assert client.xpending("poison", "g")["pending"] == 0 and client.xlen("poison:dead") == 1


def test_mistakes_are_named(url: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client.set("text", "no stream")
    with pytest.raises(StreamError, match="'text' is no stream; name another key"):
        RedisSource(url, "text", "g")
    with pytest.raises(StreamError, match="is no URL of a Redis server"):
        RedisSource("http://somewhere", "s", "g")
    with pytest.raises(StreamUnavailable, match=r"redis://127\.0\.0\.1:1 within"):
        RedisSource("redis://user:secret@127.0.0.1:1", "s", "g")
    with pytest.raises(StreamError, match=r"'text' at .* is a string, no stream; name another key for dead letters"):
        RedisSource(url, "s", "g", dead_letters="text")
    with pytest.raises(StreamError, match="'s' cannot get its own dead letters"):
        RedisSource(url, "s", "g", dead_letters="s")
    with pytest.raises(StreamError, match="`group` is no Unicode"):
        RedisSource(url, "s", "\ud800")
    source = RedisSource(url, "deleted", "g")
    client.delete("deleted")
    for call in (lambda: source.receive(1, 0), source.lag):
        with pytest.raises(StreamError, match=r"begin again|no such key"):
            call()
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"msa-hf\[redis\]"):
        RedisSource(url, "s", "g")


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    with redis_server(tmp_path, None, "--requirepass", "secret", "--save", "") as url:
        for wrong in (url, url.replace("//", "//:wrong@")):
            with pytest.raises(StreamError, match="refuses the user or password") as caught:
                RedisSource(wrong, "s", "g")
            assert "wrong@" not in str(caught.value)
        RedisSource(url.replace("//", "//:secret@"), "s", "g")


def test_a_server_that_hangs_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(StreamUnavailable, match=r"within 0\.2 s"):
            RedisSource(f"redis://127.0.0.1:{silent.getsockname()[1]}", "s", "g", timeout=0.2)
        assert time.monotonic() - start < 10
