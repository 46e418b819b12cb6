"""benchmarks/torture_bank.py: its oracle, what it finds, and its reports. scripts/test.sh runs it for five minutes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import churn
import pytest
from fake_model import FakeModel
from torture.attack import Wrong
from torture.check import check
from torture.events import State, events
from torture.operations import BASES, make_base

from msa_hf.bank import BankStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ATTACKS = ["kills", "flips", "hostile", "commits"]
TINY = f"--minutes 0.05 --commits 40 --only {' '.join(ATTACKS)}"
# What so short a run can tell: commits are too few to say whether their cost is flat.
HOLD = ["kills", "flips", "hostile"]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def contents(bank: BankStore) -> dict[str, tuple[int | None, int | None, str | None]]:
    return {item.key: (item.id, item.version, item.text) for item in bank.documents}


def test_the_oracle_says_what_a_bank_does() -> None:
    """A bank in memory, which no attack concerns, and one oracle agree with the other."""
    state, plain, bank, late = State(), {}, BankStore(FakeModel()), 0
    for number in range(120):
        changes = events(3, number)
        late += any(version < number for _, _, version in changes)
        state, plain = state.after(changes), churn.apply(plain, list(changes))
        churn.commit(bank, list(changes))
        assert contents(bank) == state.documents
        assert {key: held.text for key, held in state.documents.items()} == {
            key: text for key, (_, text) in plain.items() if text is not None
        }
    assert late > 20 and state.next_id > len(state.documents) > 2


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    state = BASES["mixed"]
    make_base("mixed", tmp_path)
    assert check(tmp_path, [State(), state]) == 1
    held = state.documents["k3"]
    for other, words in [
        ({"k3": held._replace(text="another")}, "'k3' is id 3, version 1, 'text k3"),
        ({"k3": held._replace(id=4)}, "instead of id 4"),
        ({"k3": held._replace(version=2)}, "instead of id 3, version 2"),
        ({"lost": held}, "'lost' is missing"),
    ]:
        with pytest.raises(Wrong, match=words):
            check(tmp_path, [State({**state.documents, **other}, state.deleted, state.next_id)])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(Wrong, match="cannot be opened: BankFormatError"):
        check(tmp_path, [state])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    command = [sys.executable, str(BENCHMARKS / "torture_bank.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


def test_attacks_are_carried_out_and_reported(tmp_path: Path) -> None:
    ran = run(*TINY.split(), "--out", str(tmp_path / "table.md"), "--json", str(tmp_path / "results.json"))
    assert ran.returncode in (0, 1), ran.stderr
    found = {score["name"]: score for score in json.loads((tmp_path / "results.json").read_text())["attacks"]}
    table = (tmp_path / "table.md").read_text()
    assert list(found) == ATTACKS and ran.stdout.strip() == table.strip()
    for name, score in found.items():
        assert score["title"] in table
        assert score["tried"] or score["skipped"]
        if name in HOLD:
            assert score["failures"] == {}
    assert re.search(r"^[\d,]+ trials of 4 attacks, \d+ failed$", ran.stderr, re.M)
    assert ran.returncode == any(score["failures"] for score in found.values())
