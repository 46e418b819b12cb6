"""Many small commits: what each costs, from the first to the last, and what the bank is like to use after them."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attack import Outcome, Settings, Wrong
from .children import Child, call, killed_at_the_end

CPU_MS, WRITTEN = 10.0, 64 * 1024  # per commit, on average
OPEN_MS, LOOKUP_US = 1000.0, 1000.0
DESCRIPTORS = 64  # and mappings
FLAT = 1.5  # the last commits may cost so many times what the first ones did
LEAST = 20  # commits, however little time there is
CHURNED = 500  # documents that a bank has whose commits replace and delete


class Commits:
    """One-document commits: adding alone, and replacing and deleting in turn."""

    name = "commits"
    title = "many one-document commits"
    seconds = 60.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def cases(self) -> Iterator[str]:
        yield f"churn:{max(self._settings.commits // 10, 10)}"
        yield f"add:{self._settings.commits}"

    def run(self, case: str, place: Path) -> Outcome:
        kind, count = case.split(":")
        directory = place / "bank"
        child = Child(work, kind, directory, int(count), self.seconds * (0.85 if kind == "add" else 0.12))
        with killed_at_the_end(child):
            windows = list(child.said(self.seconds + 120))
        done = int(windows[-1]["commits"])
        after = call(use, directory, kind, done, timeout=600)
        first, last, whole = windows[0], windows[-2] if len(windows) > 2 else windows[-1], windows[-1]
        figures = {
            f"{kind}: CPU ms per commit": whole["cpu_ms"],
            f"{kind}: first window, CPU ms": first["cpu_ms"],
            f"{kind}: last window, CPU ms": last["cpu_ms"],
            f"{kind}: bytes per commit": whole["bytes"],
            f"{kind}: descriptors and mappings at most": max(window["descriptors"] for window in windows),
            f"{kind}: files": after["files"],
            f"{kind}: MB": after["mb"],
            f"{kind}: open CPU ms": after["open_ms"],
            f"{kind}: present key µs": after["present_us"],
            f"{kind}: absent key µs": after["absent_us"],
            f"{kind}: RSS MB": after["rss_mb"],
        }
        wrong = [
            f"{whole['cpu_ms']:.1f} ms of CPU per commit" if whole["cpu_ms"] > CPU_MS else "",
            f"{whole['bytes']:,.0f} bytes written per commit" if whole["bytes"] > WRITTEN else "",
            f"{last['cpu_ms']:.1f} ms per commit at the end, {first['cpu_ms']:.1f} at the beginning"
            if len(windows) > 3 and last["cpu_ms"] / last["pace"] > FLAT * first["cpu_ms"] / first["pace"]
            else "",
            f"{max(window['descriptors'] for window in windows)} descriptors and mappings"
            if max(window["descriptors"] for window in windows) > DESCRIPTORS
            else "",
            f"{after['open_ms']:.0f} ms of CPU to open" if after["open_ms"] > OPEN_MS else "",
            f"{after['absent_us']:.0f} µs to find that a key is absent" if after["absent_us"] > LOOKUP_US else "",
            f"{after['present_us']:.0f} µs to find a key" if after["present_us"] > LOOKUP_US else "",
        ]
        if any(wrong):
            raise Wrong(f"after {done:,} commits: {', '.join(filter(None, wrong))}; {figures}")
        short = "" if done == int(count) else f" (of {int(count):,}, then the time was up)"
        return Outcome(f"commits at a flat cost{short}", done, figures)


# In a child -----------------------------------------------------------------------------------------------------------


def held_below(directory: Path) -> int:
    """Descriptors and mappings of this process that lie in a directory."""
    place, count = f"{directory.resolve()}/", 0
    for link in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{link}").startswith(place)
        except OSError:
            continue  # the one that lists
    mapped = set()
    with open("/proc/self/maps") as lines:
        for line in lines:
            if place in line:
                mapped.add(line.split(maxsplit=5)[5].strip())
    return count + len(mapped)


def _written() -> int:
    """Bytes that this process wrote: as it says, or as they came to the disk in whole pages, whichever is more."""
    with open("/proc/self/io") as lines:
        values = {name: int(value) for name, value in (line.split(":") for line in lines)}
    return max(values["wchar"], values["write_bytes"] - values["cancelled_write_bytes"])


def work(say: Callable[[Any], None], kind: str, directory: Path, count: int, seconds: float) -> None:
    """Commit `count` times, or until the time is up; says the costs of each window, at last those of all."""
    from .stub import open_bank

    window = max(min(1000, count // 4), 1)
    begin, done = time.monotonic(), 0

    def is_over() -> bool:
        return done >= LEAST and time.monotonic() - begin > seconds

    bank = open_bank(directory)
    if kind == "churn":
        bank.add([{"key": f"key {row}", "text": f"text {row}", "version": 0} for row in range(CHURNED)])
    costs = (time.process_time(), _written())
    start = costs
    while done < count and not is_over():
        for _ in range(min(window, count - done)):
            if is_over():
                break
            change(bank, kind, done)
            done += 1
        now = (time.process_time(), _written())
        if done % window == 0:
            say(_costs(costs, now, window, held_below(directory)))
        costs = now
    say({**_costs(start, costs, max(done, 1), held_below(directory)), "commits": done})
    bank.close()


def change(bank: Any, kind: str, number: int) -> None:
    """The commit of a number."""
    if kind == "add":
        bank.add([{"key": f"key {number}", "text": f"text {number}", "version": number + 1}])
        return
    key = f"key {number * 7 % CHURNED}"
    if number % 3 == 1:
        bank.delete(key, number + 1)
    else:
        bank.upsert(key, f"text {number} of {key}", number + 1)


def _costs(before: tuple[float, int], after: tuple[float, int], commits: int, descriptors: int) -> dict[str, float]:
    cpu, written = after[0] - before[0], after[1] - before[1]
    costs = {"cpu_ms": 1e3 * cpu / commits, "bytes": written / commits, "descriptors": descriptors}
    # The same work always, which takes longer while others use the machine, also by the clock of this process.
    begin = time.process_time()
    for _ in range(20):
        sorted(hashlib.sha256(bytes([number]) * 1000).digest() for number in range(250))
    return {**costs, "pace": time.process_time() - begin}


def use(directory: Path, kind: str, done: int) -> dict[str, float]:
    """Open the bank, look keys up, and make sure that all is there; returns what it took."""
    from .stub import open_bank

    files = [path for path in directory.rglob("*") if path.is_file()]
    start = time.process_time()
    bank = open_bank(directory)
    opened = time.process_time() - start
    if kind == "add":
        if len(bank) != done:
            raise Wrong(f"{len(bank)} documents instead of {done}")
        present = [f"key {number * 7919 % done}" for number in range(300)]
    else:
        documents: dict[str, str | None] = {f"key {row}": f"text {row}" for row in range(CHURNED)}
        for number in range(done):
            key = f"key {number * 7 % CHURNED}"
            documents[key] = None if number % 3 == 1 else f"text {number} of {key}"
        for key, text in documents.items():
            document = bank.get(key)
            if (document and document.text) != text:
                raise Wrong(f"{key!r} is {document} instead of {text!r}")
        present = [key for key, text in documents.items() if text is not None][:300]
    times = []
    for keys, there in ((present, True), ([f"absent {number}" for number in range(300)], False)):
        start = time.process_time()
        answers = [key in bank for key in keys]
        times.append(1e6 * (time.process_time() - start) / len(keys))
        if answers != [there] * len(keys):
            raise Wrong(f"a key is said to be {'absent' if there else 'present'} that is not")
    if damage := bank.verify():
        raise Wrong(f"verify() finds {damage[0].file}: {damage[0].cause}")
    return {
        "files": len(files),
        "mb": sum(path.stat().st_size for path in files) / 1e6,
        "open_ms": 1e3 * opened,
        "present_us": times[0],
        "absent_us": times[1],
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
