"""Damage to any file: opening or verifying a bank finds it, or every answer is right all the same."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attack import Outcome, Settings, Wrong
from .children import ChildFailed, call
from .events import State
from .faults import Bases
from .operations import BASES

HARMLESS = (".lock",)  # no part of the bank
ASKED = ("read", "load", "write")
BANKS = ("mixed", "mixed", "churned", "churned", "copied", "version1")


class Flips:
    """One file of a bank is changed at random, and the bank asked in every way."""

    name = "flips"
    title = "damaged, lost and exchanged files"
    seconds = 0.0

    def __init__(self, settings: Settings, bases: Bases) -> None:
        self._settings, self._bases = settings, bases

    def cases(self) -> Iterator[str]:
        """`bit:17`: a bit is flipped, which one follows from 17."""
        for number in itertools.count(self._settings.seed * 1_000_000):
            yield from (f"{kind}:{number}" for kind in DAMAGE)

    def run(self, case: str, place: Path) -> Outcome:
        kind, number = case.split(":")
        pick = random.Random(case)
        base = pick.choice(BANKS)
        directory = self._bases.copy(base, place)
        said = DAMAGE[kind](directory, pick)
        # A copy for each who asks: what opens a bank to write may mend it.
        copies = {name: Path(shutil.copytree(directory, place / name)) for name in ASKED}
        try:
            words = call(ask, copies, BASES[base], int(number), timeout=60)
        except (Wrong, ChildFailed) as wrong:
            raise Wrong(f"{said}: {wrong}") from wrong
        return Outcome("found" if "found" in words else "every answer was right")


# Damage ---------------------------------------------------------------------------------------------------------------


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in HARMLESS)


def _changed(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Callable[[Path, random.Random], str]:
    def damage(directory: Path, pick: random.Random) -> str:
        path = pick.choice([path for path in _files(directory) if path.stat().st_size])
        before = path.read_bytes()
        after = bytes(change(bytearray(before), pick))
        if after == before:
            after += b"\0"
        path.write_bytes(after)
        place = next((at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        return f"{path.name} ({len(before)} bytes), changed at byte {place}"

    return damage


def _bit(data: bytearray, pick: random.Random) -> bytearray:
    data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    return data


def _run_of(data: bytearray, pick: random.Random, fill: Callable[[int], bytes]) -> bytearray:
    at = pick.randrange(len(data))
    end = min(len(data), at + pick.choice([1, 2, 8, 64, 512]))
    data[at:end] = fill(end - at)
    return data


def _remove(directory: Path, pick: random.Random) -> str:
    # Without its newest commit a bank is what it was before that: nothing tells that there ever was one.
    newest = max(directory.glob("commit-*.json"), default=None)
    path = pick.choice([path for path in _files(directory) if path != newest])
    path.unlink()
    return f"{path.name} removed"


def _exchange(directory: Path, pick: random.Random) -> str:
    one, other = pick.sample(_files(directory), 2)
    if pick.random() < 0.7 and (alike := [p for p in _files(directory) if p.suffix == one.suffix and p != one]):
        other = pick.choice(alike)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name} exchanged"


def _copied(directory: Path, pick: random.Random) -> str:
    one, other = pick.sample(_files(directory), 2)
    shutil.copyfile(one, other)
    return f"{one.name} copied over {other.name}"


DAMAGE: dict[str, Callable[[Path, random.Random], str]] = {
    "bit": _changed(_bit),
    "bytes": _changed(lambda data, pick: _run_of(data, pick, pick.randbytes)),
    "zeros": _changed(lambda data, pick: _run_of(data, pick, bytes)),
    "truncated": _changed(lambda data, pick: data[: pick.randrange(len(data))]),
    "longer": _changed(lambda data, pick: data + pick.randbytes(pick.choice([1, 8, 100]))),
    "doubled": _changed(lambda data, pick: data + data),
    "removed": _remove,
    "exchanged": _exchange,
    "overwritten": _copied,
}


# In a child -----------------------------------------------------------------------------------------------------------


def ask(copies: dict[str, Path], state: State, seed: int) -> list[str]:
    """Ask a bank in every way; returns what each came to."""
    words = []
    for name in ASKED:
        try:
            words.append({"read": read, "load": load, "write": write}[name](copies[name], state, seed))
        except Wrong as wrong:
            raise Wrong(f"{name}: {wrong}") from wrong
    return words


def read(directory: Path, state: State, seed: int) -> str:
    """Open to read: what is wrong is found by opening or by `verify`, and what remains is right."""
    from .check import contents, difference, lookups
    from .stub import open_bank

    bank = _unless_refused(lambda: open_bank(directory, read_only=True))
    if bank is None:
        return "found"
    damaged, wrong = bank.stat()["damaged"], ""
    try:
        wrong = difference(contents(bank.snapshot()), state.documents)
        lookups(bank, state)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    damage = bank.verify()
    if not damage and not damaged and wrong:
        raise Wrong(f"verify() finds nothing, yet {wrong}")
    if damage or damaged:
        _rest_is_right(bank, state)
        return "found"
    return "right"


def _rest_is_right(bank: Any, state: State) -> None:
    """Make sure that what is left out is known, and the rest as it was."""
    from .check import contents

    try:
        found = contents(bank.snapshot())
    except Exception as error:
        if _is_refusal(error):
            return
        raise Wrong(f"after verify(): {type(error).__name__}: {error}") from error
    for key, held in found.items():
        if state.documents.get(key) != held:
            raise Wrong(f"after verify(): {key!r} is {held} instead of {state.documents.get(key)}")
    missing = len(state.documents) - len(found)
    if missing > bank.stat()["damaged"]:
        raise Wrong(f"after verify(): {missing} documents are missing, {bank.stat()['damaged']} are said to be damaged")


def load(directory: Path, state: State, seed: int) -> str:
    """`MemoryBank.from_pretrained` refuses it, or everything is right."""
    from msa_hf.model.memory_msa import MemoryBank

    from .check import contents, match

    bank = _unless_refused(lambda: MemoryBank.from_pretrained(directory))
    if bank is None:
        return "found"
    match(contents(bank), [state])
    return "right"


def write(directory: Path, state: State, seed: int) -> str:
    """Open to write: no presence, version or id is wrong, and no change makes a document twofold or lost."""
    from .check import check
    from .stub import open_bank

    bank = _unless_refused(lambda: open_bank(directory))
    if bank is None:
        return "found"
    keys = list(state.documents)
    gone = [key for key in state.deleted if key not in state.documents]
    random.Random(seed).shuffle(keys)
    with bank:
        damaged = bank.stat()["damaged"]
        try:
            for key in (*keys, *gone):
                if (key in bank) is not (key in keys):
                    raise Wrong(f"{key!r} is said {'not ' if key in keys else ''}to be there")
            expected = _changes(bank, state, keys, gone)
        except Wrong:
            raise
        except Exception as error:
            if _is_refusal(error):
                return "found"
            raise
        if damaged:
            raise Wrong(f"{damaged} documents are in damaged files, yet it can be written to")
        if bank.verify():
            return "found"  # of what no change depends on
    check(directory, [expected])
    return "right"


def _changes(bank: Any, state: State, keys: list[str], gone: list[str]) -> State:
    """Change a bank in every way; returns the state that it must be in."""
    from .events import Change

    replaced, deleted, kept = keys[0], keys[1], keys[2]
    late = state.documents[kept].version
    done: list[Change] = []

    def apply(change: Change, changed: bool, expected: bool = True) -> None:
        if changed is not expected:
            raise Wrong(f"{change} returned {changed}")
        done.append(change)

    apply(Change(deleted, None, 1000), bank.delete(deleted, 1000))
    apply(Change(replaced, "a text in its place", 1000), bank.upsert(replaced, "a text in its place", 1000))
    if late is not None:
        apply(Change(kept, "a late text", late), bank.upsert(kept, "a late text", late), False)
    for key in gone:
        apply(Change(key, "late", 1), bank.upsert(key, "late", 1), False)
    try:
        bank.add([{"key": kept, "text": "a second document of the key", "version": 1001}])
    except ValueError as error:
        if type(error) is not ValueError:
            raise
    else:
        raise Wrong(f"add() put in a second document of the key {kept!r}")
    apply(Change("further", "a further text", 1000), bank.upsert("further", "a further text", 1000))
    if bank.delete("never there"):
        raise Wrong("delete() of a key that was never there returned True")
    bank.compact()
    return state.after(done)


def _unless_refused(act: Callable[[], Any]) -> Any:
    """What a call returns, None where it refuses the bank in words of the package."""
    try:
        return act()
    except Exception as error:
        if _is_refusal(error):
            return None
        raise Wrong(f"{type(error).__name__}: {error}") from error


def _is_refusal(error: Exception) -> bool:
    from msa_hf.bank import BankError

    return isinstance(error, BankError)
