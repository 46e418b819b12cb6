"""Comparison of a bank with the states that it may be in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .attack import Wrong
from .events import Change, Held, State
from .stub import LAYER, PREFIX, memory_of, numbers_of, open_bank

if TYPE_CHECKING:
    from msa_hf.bank import BankStore, TieredBank
    from msa_hf.model.memory_msa import MemoryBank


def contents(bank: MemoryBank) -> dict[str, Held]:
    """The documents of a bank by key; makes sure that every tensor is that of its text.

    Raises:
        Wrong: for tensors of another text, or two documents of one key.
    """
    found: dict[str, Held] = {}
    for layer, (keys, values) in bank.prefix.items():
        if layer != LAYER or not (torch.equal(keys, PREFIX) and torch.equal(values, -PREFIX)):
            raise Wrong("the prefix is another one")
    for position, document in enumerate(bank.documents):
        row = int(bank.documents.rows_of(torch.tensor(position)))
        chunks = slice(*bank.offsets[row : row + 2].tolist())
        if document.text is None or document.key in found:
            raise Wrong(f"{document.key!r} has no text, or is there twice")
        expected, layer = memory_of(numbers_of(document.text, document.chunks)), bank.layer(LAYER)
        if not torch.equal(layer.routing_keys[chunks], expected.routing_keys):
            raise Wrong(f"{document.key!r} has routing keys that are not of its text")
        if not torch.equal(layer.pooled_kv[chunks], expected.pooled_kv):
            raise Wrong(f"{document.key!r} has content that is not of its text")
        found[document.key] = Held(position if document.id is None else document.id, document.version, document.text)
    return found


def contents_in_tiers(bank: TieredBank) -> dict[str, Held]:
    """The documents of a bank in tiers by key; makes sure that the content of each is that of its text.

    Raises:
        Wrong: for content of another text.
    """
    from msa_hf.model.routing_msa import Selection

    found: dict[str, Held] = {}
    for position, document in enumerate(bank.documents):
        assert document.text is not None
        row = int(bank.documents.rows_of(torch.tensor(position)))
        chosen = Selection(torch.tensor([[row]]), torch.zeros(1, 1))
        rows = bank.layers[LAYER].over(bank.layout).gather(chosen, torch.float32)
        expected = memory_of(numbers_of(document.text, document.chunks)).pooled_kv.permute(1, 2, 0, 3)
        there = rows.row_mask[0]
        if not (
            torch.equal(rows.keys[0, :, there], expected[0]) and torch.equal(rows.values[0, :, there], expected[1])
        ):
            raise Wrong(f"{document.key!r} has content that is not of its text")
        found[document.key] = Held(position if document.id is None else document.id, document.version, document.text)
    return found


def difference(found: dict[str, Held], expected: dict[str, Held]) -> str:
    """The first few differences, in words; empty where there is none."""
    words = []
    for key in sorted(found.keys() | expected.keys()):
        here, there = found.get(key), expected.get(key)
        if here != there:
            words.append(f"{key!r} is {_brief(here)} instead of {_brief(there)}")
    return "; ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _brief(held: Held | None) -> str:
    return "missing" if held is None else f"id {held.id}, version {held.version}, {held.text[:24]!r}"


def match(found: dict[str, Held], states: Sequence[State]) -> int:
    """The number of the state that a bank is in.

    Raises:
        Wrong: where it is in none of them.
    """
    for number, state in enumerate(states):
        if found == state.documents:
            return number
    words = " | ".join(difference(found, state.documents) for state in states)
    raise Wrong(f"none of the {len(states)} states that it may be in: {words}" if len(states) > 1 else words)


def lookups(bank: BankStore, state: State) -> None:
    """Ask for every key that is or was there, and for some that never were.

    Raises:
        Wrong: for a wrong answer.
    """
    for key, held in state.documents.items():
        document = bank.get(key)
        if key not in bank or document is None:
            raise Wrong(f"{key!r} is said not to be there")
        if Held(-1 if document.id is None else document.id, document.version, document.text or "") != held:
            raise Wrong(f"get({key!r}) is {document} instead of {held}")
    for key in (*state.deleted, "never there", "key 999999"):
        if key not in state.documents and (key in bank or bank.get(key) is not None):
            raise Wrong(f"{key!r} is said to be there")


def check(directory: Path, states: Sequence[State], write: bool = True) -> int:
    """Open a bank in each way, and compare it with the states that it may be in; returns the number of its own.

    Args:
        write: also open it to write, and commit once.

    Raises:
        Wrong: where it cannot be opened, or is in none of them.
    """
    from msa_hf.model.memory_msa import MemoryBank

    try:
        number = match(contents(MemoryBank.from_pretrained(directory)), states)
        state = states[number]
        with open_bank(directory, read_only=True) as bank:
            match(contents(bank.snapshot()), [state])
        if write:
            with open_bank(directory) as bank:
                match(contents(bank.snapshot()), [state])
                lookups(bank, state)
                if damage := bank.verify():
                    raise Wrong(f"verify() finds {damage[0].file}: {damage[0].cause}")
    except Wrong:
        raise
    except Exception as error:
        raise Wrong(f"cannot be opened: {type(error).__name__}: {error}") from error
    return number


def commit(bank: BankStore, changes: Sequence[Change]) -> None:
    """Carry one commit out; no changes: compact."""
    if not changes:
        bank.compact()
        return
    with bank.batch():
        for key, text, version in changes:
            if text is None:
                bank.delete(key, version)
            else:
                bank.upsert(key, text, version)
