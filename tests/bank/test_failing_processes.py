"""Processes that hang, are killed or raise: the others end in time, and say which one it was and why."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from connected import together
from helpers.fake_model import FakeModel

from msa_hf.bank import RankFailed, shard_bank
from msa_hf.bank.encode_corpus import agreed, connected
from msa_hf.bank.sharded import collectives, notices
from msa_hf.bank.sharded.collectives import Collectives
from msa_hf.bank.sharded.notices import Notices, StoreSilent

FORK = get_context("fork")
LIMIT = 10.0  # seconds of a test's processes
TIMEOUT = timedelta(seconds=1.5)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def ended(
    work: Callable[[int], Any], size: int = 3, lost: int = -1, store: str = "tcp", connect: bool = True
) -> dict[int, Any]:
    """What `work(rank)` returned or raised, as text, in each of `size` processes but the one that is to be `lost`.

    Fails where another one does not come to its end in time.
    """
    where = f"tcp://127.0.0.1:{free_port()}" if store == "tcp" else f"file://{os.environ['TEST_STORE']}"

    # A process that is through may still be needed by another one to get through, which waits without a deadline.
    connected_all = FORK.Barrier(size)

    def run(rank: int, sender: Any) -> None:
        try:
            if connect:
                dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
                connected_all.wait(LIMIT)
            result: Any = work(rank)
        except BaseException as error:
            result = type(error), str(error)
        sender.send_bytes(pickle.dumps(result))
        os._exit(0)  # at once: the store of process 0 is gone with it

    processes, waiting, results = [], {}, {}
    for rank in range(size):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=run, args=(rank, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        if rank != lost:
            waiting[receiver] = rank
    deadline = time.monotonic() + LIMIT
    while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0))):
        for pipe in ready:
            rank = waiting.pop(pipe)
            results[rank] = pickle.loads(pipe.recv_bytes())
    for process in processes:
        process.kill()
        process.join()
    assert not waiting, f"processes {sorted(waiting.values())} hang"
    return results


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for module in (notices, collectives):
        monkeypatch.setattr(module, "PATIENCE", 1.5)


def exchange(ranks: Collectives) -> None:
    ranks.gather(torch.ones(3))


class Boom(Exception):
    pass


def out_of_luck() -> None:
    raise Boom("out of luck")


@pytest.mark.parametrize(
    ("lost", "sent", "store"),
    [
        (0, signal.SIGSTOP, "tcp"),
        (1, signal.SIGSTOP, "tcp"),
        (0, signal.SIGSTOP, "file"),
        (0, signal.SIGKILL, "tcp"),
        (1, signal.SIGKILL, "tcp"),
    ],
)
def test_a_process_that_is_stopped_or_killed_is_named(lost: int, sent: signal.Signals, store: str) -> None:
    def work(rank: int) -> None:
        ranks = Collectives(None, TIMEOUT if sent == signal.SIGSTOP else timedelta(minutes=10))
        exchange(ranks)
        if rank == lost:
            os.kill(os.getpid(), sent)
        exchange(ranks)

    for kind, text in ended(work, lost=lost, store=store).values():
        assert kind is RankFailed
        assert text.startswith(f"Process {lost}") and "waited" in text and "seconds" in text
        assert ("which holds the store" in text) == (store == "tcp" and lost == 0)
        assert sent == signal.SIGKILL or "stopped or out of reach" in text


@pytest.mark.parametrize(("failing", "store"), [(0, "tcp"), (1, "file")])
def test_the_first_traceback_reaches_a_process_that_is_busy(failing: int, store: str) -> None:
    """Process 0, and with it the store, is gone by the time that process 2 looks."""

    def work(rank: int) -> None:
        ranks = Collectives(None, timedelta(minutes=10))
        exchange(ranks)
        try:
            if rank == failing:
                out_of_luck()
            time.sleep(2 if rank == 2 else 0)
            exchange(ranks)
        except Boom as error:
            ranks.fail(error)
            raise

    results = ended(work, store=store)
    assert results.pop(failing) == (Boom, "out of luck")
    for kind, text in results.values():
        assert kind is RankFailed
        assert text.startswith(f"Process {failing} of this shared memory failed:") and "in out_of_luck" in text


def test_none_goes_on_before_all_are_connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed at once would be gone while another still connects to it, and could not say why."""
    connect, late = dist.new_group, tmp_path / "late"

    def new_group(*given: Any, **options: Any) -> Any:
        group = connect(*given, **options)
        time.sleep(0.5)
        late.touch()
        return group

    def work(rank: int) -> bool:
        if rank == 2:
            monkeypatch.setattr(dist, "new_group", new_group)
        ranks = Collectives(None, timedelta(minutes=1))
        found = late.exists()
        ranks.part()
        return found

    assert together(3, work) == [True] * 3


def test_the_first_of_two_errors_is_the_one_that_is_told() -> None:
    def work(rank: int) -> None:
        ranks = Collectives(None, timedelta(minutes=10))
        exchange(ranks)
        try:
            if rank < 2:
                time.sleep(rank)
                raise Boom(f"by {rank}")
            exchange(ranks)
        except Boom as error:
            ranks.fail(error)
            raise

    results = ended(work)
    assert [results[rank] for rank in (0, 1)] == [(Boom, "by 0"), (Boom, "by 1")]
    assert results[2][0] is RankFailed and "Boom: by 0" in results[2][1]


def test_a_process_that_is_busy_for_too_long_is_told_from_one_that_is_gone() -> None:
    def work(rank: int) -> None:
        ranks = Collectives(None, TIMEOUT)
        exchange(ranks)
        time.sleep(3.5 if rank == 1 else 0)
        exchange(ranks)

    for kind, text in ended(work).values():
        assert kind is RankFailed
        assert text.startswith("Process 1 of this shared memory is alive, but did not come to an exchange: process ")
        assert "with a timeout of 1.5 seconds" in text


def test_an_error_is_raised_though_the_store_hangs() -> None:
    def work(rank: int) -> None:
        ranks = Collectives(None, timedelta(minutes=10))
        exchange(ranks)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)
        ranks.fail(Boom("own"))
        raise Boom("own")

    assert ended(work, size=2, lost=0) == {1: (Boom, "own")}


@pytest.mark.parametrize(("late", "store"), [(0, "tcp"), (1, "file")])
def test_a_process_that_does_not_connect_is_not_waited_for(late: int, store: str) -> None:
    def work(rank: int) -> None:
        if rank == late:
            os.kill(os.getpid(), signal.SIGSTOP)
        Collectives(None, TIMEOUT)

    for kind, text in ended(work, lost=late, store=store).values():
        assert kind is RankFailed and "could not be connected, with a timeout of 1.5 seconds" in text


def test_a_launcher_that_starts_too_few_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    def work(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with connected(TIMEOUT):
            pass

    for rank, (kind, text) in ended(work, size=2, connect=False).items():
        assert rank in (0, 1) and kind is RankFailed and "could not be connected, with a timeout of 1.5 seconds" in text


def test_a_shared_bank_ends_with_its_hung_process() -> None:
    bank = FakeModel().encode_documents([{"text": f"text {number}"} for number in range(5)])

    def work(rank: int) -> None:
        with shard_bank(bank, timeout=TIMEOUT):
            if rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    for kind, text in ended(work, lost=0).values():
        assert kind is RankFailed and text.startswith("Process 0, which holds the store")


def test_encoding_ends_with_its_hung_process() -> None:
    def work(rank: int) -> None:
        with connected(TIMEOUT) as ranks:
            for turn in range(3):
                with agreed(ranks):
                    if rank == 0 and turn == 1:
                        os.kill(os.getpid(), signal.SIGSTOP)

    for kind, text in ended(work, lost=0).values():
        assert kind is RankFailed and text.startswith("Process 0, which holds the store")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_interrupted_encoding_tells_the_others(failing: int) -> None:
    """What is no `Exception` is not told by `agreed`."""

    def work(rank: int) -> None:
        with connected(timedelta(minutes=10)) as ranks:
            with agreed(ranks):
                pass
            with agreed(ranks):
                time.sleep(2 if rank == 2 else 0)
                if rank == failing:
                    raise KeyboardInterrupt("by hand")

    results = ended(work)
    assert results.pop(failing) == (KeyboardInterrupt, "by hand")
    for kind, text in results.values():
        assert kind is RankFailed and f"Process {failing} of this shared memory failed:" in text
        assert "KeyboardInterrupt: by hand" in text


def noticed(ranks: Collectives) -> float:
    """Seconds until a process that exchanges nothing knows of an error; raises what an exchange raises then."""
    began = time.monotonic()
    while ranks.error is None and time.monotonic() < began + 8:
        time.sleep(0.05)
    ranks.check_open()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("lost", "sent", "store"),
    [(1, signal.SIGKILL, "file"), (0, signal.SIGKILL, "tcp")],
)
def test_a_lost_process_is_noticed_beside_the_work(
    lost: int, sent: signal.Signals, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the timeout, by processes that exchange nothing; what waits for it on a device is ended."""
    monkeypatch.setattr(notices, "SILENCE", 1.0)
    monkeypatch.setattr(notices, "BEATS", 0.2)

    def work(rank: int) -> Any:
        ranks = Collectives(None, timedelta(minutes=10))
        assert ranks.control is not None
        released = Event()
        watching = Notices(ranks.control.get_group_store().clone(), rank, 3, released.set)
        exchange(ranks)
        if rank == lost:
            os.kill(os.getpid(), sent)
        try:
            noticed(ranks)
        finally:
            assert released.wait(5) and watching.error is not None

    for kind, text in ended(work, lost=lost, store=store).values():
        assert kind is RankFailed and text.startswith(f"Process {lost}")


def test_processes_that_only_compute_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped for a while itself, such as with its machine, blames nobody."""
    store = dist.HashStore()
    known, lost = notices._Known(), []

    class Owner:
        def explain(self) -> None:
            lost.append(True)

    owner = Owner()
    watch = notices._Watch(0, 2, notices.SILENCE, weakref.WeakMethod(owner.explain))
    clock = [0.0]
    monkeypatch.setattr(notices.time, "monotonic", lambda: clock[0])
    watch._since = 0.0
    for now, beat in ((1, 1), (5, 2), (18, 2), (100, 2), (110, 2), (119, 3), (130, 3), (138, 3)):
        clock[0] = float(now)
        store.set(notices.BEAT.format(1), str(beat))
        watch.look(store, known)
    assert not lost
    for now in (139, 145):
        clock[0] = float(now)
        watch.look(store, known)
    assert lost == [True]


SCRIPT = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from msa_hf.bank.sharded import notices
from msa_hf.bank.sharded.collectives import Collectives
notices.PATIENCE = 1.0
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=1, world_size=2)
ranks = Collectives(None, timedelta(seconds=2))
ranks.gather(torch.ones(3))
print("connected", flush=True)
ranks.gather(torch.ones(3))
"""


def test_an_interpreter_comes_to_its_end_beside_a_hung_one() -> None:
    """With a thread that still waits for the store, and the groups of torch.distributed."""
    port = free_port()

    def hang() -> None:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
        exchange(Collectives(None, timedelta(minutes=1)))
        os.kill(os.getpid(), signal.SIGSTOP)

    hung = FORK.Process(target=hang, daemon=True)
    hung.start()
    command = [sys.executable, "-c", SCRIPT, str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"connected\n"
        _, error = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert b"RankFailed: Process 0, which holds the store" in error
    finally:
        process.kill()
        process.communicate()
        hung.kill()
        hung.join()


def test_a_store_that_is_slow_is_given_up_and_one_that_is_gone_too() -> None:
    class Broken:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def check(self, keys: list[str]) -> bool:
            time.sleep(self.seconds)
            raise RuntimeError("Broken pipe")

    for seconds, words in ((0.0, "is gone"), (4.0, "does not answer")):
        notices = Notices(Broken(seconds), 1, 2)  # type: ignore[arg-type]
        started = time.monotonic()
        with pytest.raises(StoreSilent, match=words):
            notices._ask(lambda store: store.check(["x"]))
        text = notices.explain(RuntimeError("timed out"), started, 1.0)
        assert text.startswith(f"Process 0, which holds the store of this shared memory's processes, {words}")
        assert time.monotonic() - started < 6
        notices.close()
