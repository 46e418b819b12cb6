"""Faults at every system call: when an operation raises, nothing has changed, or it says that this is not known."""

from __future__ import annotations

import random
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .attack import Outcome, Settings, Wrong
from .children import Child, call
from .events import State
from .operations import BASES, ERASED, OPERATIONS, Operation, make_base
from .shim import CHANGING, ERRORS, INTERRUPT, KILL, KINDS, Fault, Trace, failing

UNKNOWN = "CommitOutcomeUnknown"
DAMAGE = ("BankFormatError", "BankDamaged")
READS = ("read", "load", "place", "place_open", "verify", "refresh")


class Bases:
    """Banks that lie there before, made once."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._counts: dict[str, dict[str, int]] = {}

    def copy(self, name: str, to: Path) -> Path:
        """Copy one, into a folder of `to`; returns that."""
        made = self.place / name
        if not made.exists():
            made.mkdir(parents=True)
            call(make_base, name, made)
        return Path(shutil.copytree(made, to / "bank"))

    def counts(self, operation: str) -> dict[str, int]:
        """System calls of each kind that an operation makes."""
        if operation not in self._counts:
            place = self.place / "counted"
            self._counts[operation] = call(_count, operation, self.copy(base_of(operation), place))
            shutil.rmtree(place)
        return self._counts[operation]


def round_robin(*lists: Iterator[str]) -> Iterator[str]:
    """One item of each in turn, so that a run that is cut short has tried some of each."""
    left = deque(lists)
    while left:
        items = left.popleft()
        if (item := next(items, None)) is not None:
            yield item
            left.append(items)


def shuffled(items: Iterable[str], seed: object) -> Iterator[str]:
    """All of them in random order, which follows from the seed."""
    chosen = list(items)
    random.Random(str(seed)).shuffle(chosen)
    yield from chosen


class Faults:
    """Every system call of every operation fails once, with every error that it may give."""

    name = "faults"
    title = "a fault at any system call"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases

    def cases(self) -> Iterator[str]:
        """`add:write:ENOSPC:once:3`: the third write of `add` has no space."""
        return round_robin(*(self._cases_of(operation) for operation in (*OPERATIONS, *READS)))

    def _cases_of(self, operation: str) -> Iterator[str]:
        counted = self._bases.counts(operation)
        cases = (
            f"{operation}:{kind}:{error}:{how}:{number + 1}"
            for kind, error, how in ways()
            for number in range(counted[kind])
        )
        yield from shuffled(cases, f"{self._settings.seed}/{operation}")

    def run(self, case: str, place: Path) -> Outcome:
        operation, kind, error, how, number = case.split(":")
        directory = self._bases.copy(base_of(operation), place)
        fault = Fault((kind,), int(number), error, how)
        work = attack_reading if operation in READS else attack_writing
        return Outcome(call(work, operation, directory, fault, timeout=60))


def ways() -> Iterator[tuple[str, str, str]]:
    """Kind of call, error, and how it fails."""
    for kind in KINDS:
        for error in ERRORS[kind]:
            yield kind, error, "once"
            if error in ("EMFILE", "ENOSPC", "EIO", "EACCES"):
                yield kind, error, "on"
        if kind in CHANGING:
            yield kind, INTERRUPT, "once"
        if kind in ("rename", "link", "sync", "unlink", "mkdir"):
            yield kind, "EIO", "after"
    yield "write", "EIO", "short"


def base_of(operation: str) -> str:
    return OPERATIONS[operation].base if operation in OPERATIONS else "mixed"


def _count(operation: str, directory: Path) -> dict[str, int]:
    fault = Fault(tuple(KINDS), 0)
    if operation in READS:
        act = reader(operation, directory)
        with failing(directory, fault) as hit:
            act()
    else:
        chosen = OPERATIONS[operation]
        bank = opened(chosen, directory) if not chosen.opening else None
        with failing(directory, fault) as hit:
            if chosen.opening:
                bank = opened(chosen, directory)
            for step in chosen.steps:
                step.act(bank, directory)
    assert hit.counted is not None
    return hit.counted


def opened(operation: Operation, directory: Path) -> Any:
    """The bank that an operation works on, None where it works on the directory."""
    from .stub import open_bank

    return None if operation.options is None else open_bank(directory, **operation.options)


# In a child -----------------------------------------------------------------------------------------------------------


def attack_writing(name: str, directory: Path, fault: Fault) -> str:
    """Carry an operation out under a fault, and judge what came of it; returns that in a word."""
    from .check import check

    operation = OPERATIONS[name]
    states, done, error, bank = operation.states(), 0, None, None
    if not operation.opening:
        bank = opened(operation, directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with failing(directory, fault) as hit:
        try:
            if operation.opening:
                bank = opened(operation, directory)
            for step in operation.steps:
                step.act(bank, directory)
                done += 1
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
    if not hit.times:
        return "not reached"
    try:
        if error is None:
            word, possible = "carried out all the same", states[-1:]
        elif type(error).__name__ == UNKNOWN:
            word, possible = "outcome unknown, and said so", states[done : done + 2]
            _refuses(bank)
        else:
            word, possible = "raised, and nothing had changed", states[done : done + 1]
            if bank is None and isinstance(error, KeyboardInterrupt):  # saving promises the old bank or the new one
                word, possible = "interrupted: the bank before or after, whole", states[done : done + 2]
            _no_damage(error)
            if bank is not None and "close" not in name:
                if not _goes_on(bank, operation, directory, states, done):
                    word = "raised, nothing had changed, to be opened again"
                else:
                    possible = states[-1:]
        if bank is not None:
            bank.close()
        # The bank that `create` was to make may not be there yet.
        if possible[0] is BASES["none"] and operation.base == "none":
            _creates(directory, possible)
        else:
            check(directory, possible)
        if operation.erases and error is None:
            erased(directory)
    except Wrong as wrong:
        raise Wrong(f"{hit.call}: {_said(error)}: {wrong}") from error
    return word


def _said(error: BaseException | None) -> str:
    return "no error" if error is None else f"{type(error).__name__} ({str(error)[:160]})"


def _no_damage(error: BaseException) -> None:
    if type(error).__name__ in DAMAGE:
        raise Wrong("an error that is not damage is called damage")


def _refuses(bank: Any) -> None:
    if bank is None:
        return
    try:
        bank.upsert("late", "written with a handle that must be reopened", 99)
    except Exception:
        return
    raise Wrong("the handle goes on writing though the outcome is unknown")


def _goes_on(bank: Any, operation: Operation, directory: Path, states: list[State], done: int) -> bool:
    """Whether an open bank still has the state before, and can carry the rest out now."""
    from .check import contents, match

    try:
        match(contents(bank.snapshot()), states[done : done + 1])
    except Wrong as wrong:
        raise Wrong(f"the open bank: {wrong}") from wrong
    try:
        for step in operation.steps[done:]:
            step.act(bank, directory)
    except Exception as error:
        if type(error).__name__ in (UNKNOWN, "BankNotWritable"):
            return False
        raise Wrong(f"the open bank cannot go on: {_said(error)}") from error
    return True


def _creates(directory: Path, possible: list[State]) -> None:
    """Make sure that a bank can be made where it was about to be, or is there already."""
    from .check import check
    from .stub import open_bank

    try:
        open_bank(directory).close()
    except Exception as error:
        raise Wrong(f"cannot be created afterwards: {_said(error)}") from error
    check(directory, possible)


def erased(directory: Path) -> None:
    """Make sure that no file has a text that no document has."""
    for path in directory.rglob("*"):
        if path.is_file() and any(text.encode() in path.read_bytes() for text in ERASED):
            raise Wrong(f"compact() returned, yet {path.name} has the text of a deleted document")


def reader(name: str, directory: Path) -> Callable[[], dict[str, Any] | None]:
    """What is done under attack; returns the contents of the bank."""
    from msa_hf.model.memory_msa import MemoryBank

    from .check import contents
    from .stub import open_bank

    if name == "read":
        return lambda: contents(open_bank(directory, read_only=True).snapshot())
    if name == "load":
        return lambda: contents(MemoryBank.from_pretrained(directory))
    if name in ("place", "place_open"):
        return lambda: placed(directory if name == "place" else open_bank(directory, read_only=True))
    bank = open_bank(directory, read_only=True)
    if name == "verify":

        def verify() -> dict[str, Any]:
            # It goes on past a file that cannot be read now, and tells of it, but takes no document for lost.
            if damage := [item for item in bank.verify() if "no damage" not in item.cause or item.documents]:
                raise Wrong(f"verify() calls it damage: {damage[0].file}: {damage[0].cause}")
            return contents(bank.snapshot())

        return verify
    with open_bank(directory) as writer:
        OPERATIONS["batch"].steps[0].act(writer, directory)

    def refresh() -> dict[str, Any]:
        bank.refresh()
        return contents(bank.snapshot())

    return refresh


def placed(bank: Any) -> dict[str, Any]:
    """The contents of a bank whose content stays on the disk, of which one file at a time is open."""
    from msa_hf.bank import place_bank
    from msa_hf.bank.tiered.plan import PlacementOptions
    from msa_hf.model import open_files_msa

    from .check import contents_in_tiers

    open_files_msa.MOST_OPEN = 1
    return contents_in_tiers(place_bank(bank, "cpu", PlacementOptions(content_on="disk")))


def attack_reading(name: str, directory: Path, fault: Fault) -> str:
    """Read under a fault: what is read is right, or an error that does not call anything damaged is raised."""
    from .check import match

    act, error, found = reader(name, directory), None, None
    expected = OPERATIONS["batch"].states() if name == "refresh" else [BASES["mixed"]]
    try:
        with failing(directory, fault) as hit:
            try:
                found = act()
            except Wrong:
                raise
            except Exception as raised:
                error = raised
        if not hit.times:
            return "not reached"
        if error is not None:
            _no_damage(error)
        else:
            match(found or {}, expected[-1:])
        if name in ("verify", "refresh"):
            match(act() or {}, expected[-1:])  # the same object, once the fault is over
    except Wrong as wrong:
        raise Wrong(f"{hit.call}: {_said(error)}: {wrong}") from error
    except Exception as raised:
        raise Wrong(f"{hit.call}: {_said(error)}: afterwards {_said(raised)}") from raised
    return "read all the same" if error is None else "raised without calling it damage"


# Kills ----------------------------------------------------------------------------------------------------------------


def attack_killed(
    say: Callable[[object], None], name: str, directory: Path, number: int, how: str, trace: Trace | None
) -> None:
    """Carry an operation out until SIGKILL at a system call; says how many steps are done."""
    operation = OPERATIONS[name]
    bank = None if operation.opening else opened(operation, directory)
    say(0)
    with failing(directory, Fault(CHANGING, number, KILL, how), trace):
        if operation.opening:
            bank = opened(operation, directory)
        for done, step in enumerate(operation.steps, 1):
            step.act(bank, directory)
            say(done)


def killed(name: str, directory: Path, number: int, how: str, trace: Trace | None = None) -> int:
    """Have a child killed; returns how many steps it acknowledged."""
    return max(Child(attack_killed, name, directory, number, how, trace).said(60), default=0)
