"""Few file descriptors: a bank of thousands of segments and shards is opened, read, changed and compacted with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .attack import Outcome, Settings, Wrong
from .children import call
from .commits import DESCRIPTORS, held_below

LIMITS = (64, 96, 128, 256)


class Descriptors:
    """The limit of descriptors is far below the number of files."""

    name = "descriptors"
    title = "few file descriptors, many segments"
    seconds = 0.0

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def cases(self) -> Iterator[str]:
        """`shards:64:3000`: documents each of a file of their own; `commits:64:3000`: as many commits."""
        for limit in LIMITS:
            yield f"shards:{limit}:{self._settings.segments}"
            # With more commits than that, `commits` counts what is open.
            yield f"commits:{limit}:{min(self._settings.segments, 4 * limit)}"

    def run(self, case: str, place: Path) -> Outcome:
        kind, limit, count = case.split(":")
        directory = place / "bank"
        if kind == "shards":
            call(make, directory, int(count), timeout=600)
        else:
            call(commit_all, directory, int(limit), int(count), timeout=600)
        held = call(use, directory, int(limit), int(count), timeout=600)
        if held > DESCRIPTORS:
            raise Wrong(f"{held} descriptors and mappings of {count} files, {DESCRIPTORS} are allowed")
        return Outcome(f"works with {limit} descriptors")


# In a child -----------------------------------------------------------------------------------------------------------


def make(directory: Path, count: int) -> None:
    """A bank of so many shards."""
    from .stub import open_bank

    with open_bank(directory, max_shard_size=1) as bank:
        bank.add([{"key": f"key {number}", "text": f"text of key {number}"} for number in range(count)])


def limit_descriptors(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def commit_all(directory: Path, limit: int, count: int) -> None:
    """So many commits of a document each, with few descriptors."""
    from .stub import open_bank

    limit_descriptors(limit)
    done = 0
    try:
        with open_bank(directory) as bank:
            for number in range(count):
                bank.add([{"key": f"key {number}", "text": f"text of key {number}"}])
                done += 1
    except Exception as error:
        raise Wrong(f"commit {done} of {count} raises {type(error).__name__}: {error}") from error


def use(directory: Path, limit: int, count: int) -> int:
    """Read, change and compact a bank with few descriptors; returns how many it had open at once, mappings included."""
    from msa_hf.model.memory_msa import MemoryBank

    from .check import contents
    from .stub import open_bank

    limit_descriptors(limit)
    held, at = 0, "open to read"
    try:
        with open_bank(directory, read_only=True) as bank:
            held = max(held, held_below(directory))
            if len(contents(bank.snapshot())) != count or bank.verify():
                raise Wrong("documents are missing, or said to be damaged")
            held = max(held, held_below(directory))
        at = "from_pretrained"
        if len(MemoryBank.from_pretrained(directory)) != count:
            raise Wrong("from_pretrained: documents are missing")
        at = "open to write"
        with open_bank(directory) as bank:
            at = "a commit"
            bank.upsert("key 0", "another text")
            bank.delete("key 1")
            held = max(held, held_below(directory))
            at = "verify"
            if damage := bank.verify():
                raise Wrong(f"verify() calls it damage: {damage[0].cause}")
            at = "compact"
            bank.compact()
            held = max(held, held_below(directory))
            if len(contents(bank.snapshot())) != count - 1:
                raise Wrong("documents are missing after compact()")
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"{at}: {type(error).__name__}: {error}") from error
    return held
