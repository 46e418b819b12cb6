"""Two writers: the second is refused; what one acknowledged, no other overwrites."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .attack import Outcome, Settings, Wrong
from .children import Child, call, killed_at_the_end
from .faults import Bases
from .kills import survivors, write
from .operations import BASES, save
from .shim import Fault, failing

RACERS, EACH = 4, 6  # writers in a race, and documents that each adds
UNSUPPORTED = ("ENOSYS", "ENOLCK", "EOPNOTSUPP")


class Writers:
    """Writers that are not alone."""

    name = "writers"
    title = "two writers"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases

    def cases(self) -> Iterator[str]:
        yield "links:0"
        yield from (f"unsupported:{error}" for error in UNSUPPORTED)
        for number in itertools.count(self._settings.seed * 1000):
            yield from (f"{kind}:{number}" for kind in ("second", "saved", "killed", "closing", "race"))

    def run(self, case: str, place: Path) -> Outcome:
        kind, detail = case.split(":")
        if kind == "unsupported":
            return Outcome(call(unsupported, self._bases.copy("mixed", place), detail))
        if kind == "links":
            return Outcome(call(links, self._bases.copy("mixed", place), place / "precious"))
        seed, directory = int(detail), place / "bank"
        if kind == "race":
            return self._race(directory, seed)
        if kind == "closing":
            return self._closing(directory, seed)
        return self._second(kind, directory, seed)

    def _second(self, kind: str, directory: Path, seed: int) -> Outcome:
        first = Child(write, directory, seed, 0)
        with killed_at_the_end(first):
            said = first.said(60)
            while next(said) < 2:  # it has committed
                pass
            if kind == "second":
                word = call(is_refused, directory)
            elif kind == "saved":
                word = call(save_is_refused, directory)
            else:
                first.kill()
                # What was acknowledged in the pipe as well.
                list(said)
                call(gets_in, directory)
                word = "after SIGKILL of the first the second gets in"
        return Outcome(word)

    def _race(self, directory: Path, seed: int) -> Outcome:
        racers = [Child(race, directory, seed, number) for number in range(RACERS)]
        with killed_at_the_end(*racers):
            keys = [key for racer in racers for key in racer.said(120)]
        call(has_all, directory, keys)
        return Outcome("every acknowledged commit is there", len(keys))

    def _closing(self, directory: Path, seed: int) -> Outcome:
        pick, keys = random.Random(seed), []
        for number in range(3):
            closer = Child(close_meanwhile, directory, f"{number}", pick.uniform(0, 0.06))
            with killed_at_the_end(closer):
                keys += list(closer.said(60))
        call(has_all, directory, keys)
        return Outcome("every commit acknowledged beside close() is there", 3)


# In a child -----------------------------------------------------------------------------------------------------------


def is_refused(directory: Path) -> str:
    """Make sure that a second writer is refused, and a reader is not."""
    from msa_hf.bank import BankLocked

    from .check import contents
    from .stub import open_bank

    try:
        open_bank(directory)
    except BankLocked as error:
        if "process" not in str(error):
            raise Wrong(f"it is not said who has the bank open: {error}") from error
    else:
        raise Wrong("a second writer got in")
    contents(open_bank(directory, read_only=True).snapshot())
    return "the second is refused"


def save_is_refused(directory: Path) -> str:
    """Make sure that `save_pretrained` respects the lock of a writer."""
    from msa_hf.bank import BankError

    try:
        save(directory)
    except BankError:
        return "save_pretrained onto an open bank is refused"
    raise Wrong("save_pretrained replaced a bank that is open for writing")


def gets_in(directory: Path) -> None:
    """Make sure that the next writer can work at once."""
    from .stub import open_bank

    with open_bank(directory) as bank:
        bank.upsert("after", "the first was killed", 10**9)
        if "after" not in bank or bank.verify():
            raise Wrong("the second writer cannot work")


def race(say: Callable[[object], None], directory: Path, seed: int, racer: int) -> None:
    """Open, add one document, close, again and again, against others who do the same; says the keys."""
    from msa_hf.bank import BankLocked

    from .stub import open_bank

    pick, number = random.Random(f"{seed}/{racer}"), 0
    while number < EACH:
        try:
            bank = open_bank(directory)
        except BankLocked:
            time.sleep(pick.uniform(0, 0.02))
            continue
        for _ in range(pick.randint(1, 2)):
            key = f"racer {racer} document {number}"
            bank.add([{"key": key, "text": f"text of {key}"}])
            say(key)
            number += 1
        bank.close()


def close_meanwhile(say: Callable[[object], None], directory: Path, name: str, seconds: float) -> None:
    """Commit in one thread while another closes the bank, and a next writer opens it; says the keys of all commits."""
    from msa_hf.bank import BankLocked

    from .stub import open_bank

    bank = open_bank(directory)
    acknowledged: list[str] = []

    def work() -> None:
        for number in itertools.count():
            key = f"{name} thread {number}"
            try:
                bank.add([{"key": key, "text": f"text of {key}"}])
            except Exception:
                return  # closed: this one was not acknowledged
            acknowledged.append(key)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(seconds)
    bank.close()
    while True:
        try:
            following = open_bank(directory)
            break
        except BankLocked:
            time.sleep(0.001)
    with following:
        for number in range(3):
            key = f"{name} next {number}"
            following.add([{"key": key, "text": f"text of {key}"}])
            acknowledged.append(key)
    thread.join(30)
    for key in acknowledged:
        say(key)


def has_all(directory: Path, keys: list[str]) -> None:
    """Make sure that a bank has every document that was acknowledged, and each once."""
    from .check import contents
    from .stub import open_bank

    with open_bank(directory) as bank:
        found = contents(bank.snapshot())
        if missing := [key for key in keys if key not in found or found[key].text != f"text of {key}"]:
            raise Wrong(f"{len(missing)} of {len(keys)} acknowledged documents are missing: {missing[:3]}")
        if len({held.id for held in found.values()}) < len(found):
            raise Wrong("two documents have the same id")
        if damage := bank.verify():
            raise Wrong(f"verify() finds {damage[0].file}: {damage[0].cause}")


def links(directory: Path, precious: Path) -> str:
    """Make sure that a lock file with another name elsewhere is not written to."""
    from msa_hf.bank import BankError

    from .stub import open_bank

    precious.write_text("of somebody else")
    lock = directory / ".lock"
    lock.unlink(missing_ok=True)
    os.link(precious, lock)
    try:
        with open_bank(directory) as bank:
            bank.upsert("key", "a text", 99)
        word = "a lock file of several names is not written to"
    except BankError:
        word = "a lock file of several names is refused"
    if precious.read_text() != "of somebody else":
        raise Wrong("a lock file of several names was written to: another file is destroyed")
    return word


def unsupported(directory: Path, error: str) -> str:
    """Make sure that a file system without locks is refused in clear words, and nothing changed."""
    from msa_hf.bank import BankError

    from .stub import open_bank

    with failing(directory, Fault(("lock",), 1, error, "on")):
        try:
            open_bank(directory)
        except BankError as refused:
            if "lock" not in str(refused):
                raise Wrong(f"{error} of flock: no word of locks: {refused}") from refused
        except Exception as raised:
            raise Wrong(f"{error} of flock: {type(raised).__name__}: {raised}") from raised
        else:
            raise Wrong(f"{error} of flock: the bank is opened to write without a lock")
    survivors(directory, [BASES["mixed"]])
    return "a file system without locks is refused"
