"""Sampling beside production: bounded, counted, out of the way of answers."""

import threading
import time

import pytest
from findings import FakeMonitor

from msa_hf.hybrid.monitoring import MonitorMetrics, Watched


def answer(question: str, suffix: str = "") -> str:
    if "broken" in question:
        raise KeyError(question)
    return question.upper() + suffix


def test_answers_pass_through_and_samples_are_checked() -> None:
    monitor = FakeMonitor()
    watched = Watched(answer, monitor, rate=1.0)
    assert watched("one", suffix="!") == "ONE!" and watched("two") == "TWO"
    assert watched.waiting == 2 and monitor.batches == [], "nothing is checked during a call"
    found = watched.work()
    assert [item.answer for item in found] == ["ONE!", "TWO"] and list(watched.findings) == found
    assert monitor.batches == [["one", "two"]] and watched.waiting == 0 and watched.work() == []


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_rate_is_kept(rate: float) -> None:
    watched = Watched(answer, FakeMonitor(), rate=rate, queue=10_000, seed=3)
    for number in range(2000):
        watched(f"question {number}")
    spread = 4 * (2000 * rate * (1 - rate)) ** 0.5
    assert watched.seen == 2000 and abs(watched.sampled - 2000 * rate) <= spread
    assert watched.waiting == watched.sampled and watched.dropped == 0


def test_a_full_queue_drops_and_counts() -> None:
    pytest.importorskip("prometheus_client")
    metrics = MonitorMetrics()
    watched = Watched(answer, FakeMonitor(batch_size=2), rate=1.0, queue=3, kept=2, metrics=metrics)
    for number in range(5):
        watched(f"question {number}")
    assert (watched.seen, watched.sampled, watched.dropped, watched.waiting) == (5, 5, 2, 3)
    assert "msa_hf_monitor_dropped_total 2.0" in metrics.text() and "msa_hf_monitor_queue 3.0" in metrics.text()
    watched.work()
    assert [item.question for item in watched.findings] == ["question 1", "question 2"], "the newest are kept"
    assert "msa_hf_monitor_checked_total 3.0" in metrics.text() and "msa_hf_monitor_queue 0.0" in metrics.text()


def test_a_question_that_fails_takes_no_other_along() -> None:
    watched = Watched(answer, FakeMonitor(), rate=1.0)
    for question in ("one", "fail", "three"):
        watched(question)
    assert [item.question for item in watched.work()] == ["one", "three"] and watched.failed == 1
    with pytest.raises(KeyError):
        watched("broken")
    assert watched.seen == 3 and watched.waiting == 0


def test_a_thread_checks_while_answers_are_given() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(FakeMonitor):
        def check(self, questions, answers):
            entered.set()
            assert go_on.wait(10)
            return super().check(questions, answers)

    with Watched(answer, Slow(), rate=1.0) as watched:
        with pytest.raises(RuntimeError, match="runs already"):
            watched.start()
        assert watched("one") == "ONE" and entered.wait(10)
        assert watched("two") == "TWO", "although a check is under way"
        go_on.set()
        end = time.monotonic() + 10
        while len(watched.findings) < 2 and time.monotonic() < end:
            time.sleep(0.001)
        assert [item.question for item in watched.findings] == ["one", "two"]
    watched("three")
    assert watched.waiting == 1, "nobody checks after the end"
    assert len(watched.work()) == 1


def test_from_many_threads_nothing_is_lost() -> None:
    watched = Watched(answer, FakeMonitor(), rate=1.0, queue=1000)
    threads = [
        threading.Thread(target=lambda: [watched(f"{place}") for place in range(50)], daemon=True) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert watched.seen == watched.sampled == 400 and len(watched.work()) == 400


def test_work_ends_with_its_time() -> None:
    class Slow(FakeMonitor):
        def check(self, questions, answers):
            time.sleep(0.03)
            return super().check(questions, answers)

    watched = Watched(answer, Slow(batch_size=1), rate=1.0, queue=100)
    for number in range(100):
        watched(f"question {number}")
    assert 1 <= len(watched.work(seconds=0.1)) <= 5 and watched.waiting >= 95


@pytest.mark.parametrize("options", [{"rate": 1.1}, {"rate": -0.1}, {"queue": 0}, {"kept": 0}])
def test_options_out_of_range(options: dict) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        Watched(answer, FakeMonitor(), **options)
