"""Commands that make banks, given a name that may be one on the Hub: nothing new hides a bank from other commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from scripted import COMPACT

from msa_hf import MemoryBank
from msa_hf.cli import main, mcp
from msa_hf.cli.command_line import parser
from msa_hf.cli.loading import bank_to_change, tell_hidden_bank
from msa_hf.user_errors import UserError

COMMANDS = {
    "add": "bank add {model} {bank} docs",
    "consume": "consume {bank} --model {model} --redis redis://localhost --stream s --group g",
    "serve": "serve {model} {bank} --create",
    "mcp": "mcp {bank} --model {model} --create",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], command: str, bank: str) -> str:
    """What a command says that ends with a user's mistake."""
    arguments = COMMANDS[command].format(model="model", bank=bank).split()
    if command == "mcp":
        with pytest.raises(UserError) as error:
            mcp.check(parser(arguments[:1]).parse_args(arguments))
        return str(error.value)
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_may_be_on_the_hub_makes_no_directory(
    command: str, hub: FakeHub, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With both remedies, at once, and without asking the Hub."""
    if command == "serve":
        pytest.importorskip("fastapi")
    said = refused(capsys, command, "user/notes")
    assert "Give ./user/notes for a new bank" in said and "a new one would hide a bank of that name on the Hub" in said
    assert "MemoryBank.from_pretrained('user/notes').save_pretrained('notes'), and give notes" in said
    assert not (here / "user").exists() and not hub.requests


@pytest.mark.parametrize(
    "command",
    ["delete {} key", "compact {}", "restore {}", "index {} --lexical english", "verify {} --discard-damaged"],
)
def test_what_changes_a_bank_is_not_for_those_on_the_hub(
    command: str, hub: FakeHub, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bank", *command.format("user/notes").split()]) == 2
    said = capsys.readouterr().err
    assert f"user/notes: no bank: there is no such directory (looked for {here}/user/notes); banks on the Hub" in said
    assert "MemoryBank.from_pretrained('user/notes').save_pretrained('notes'), and give notes" in said
    assert not hub.requests


@pytest.mark.parametrize("name", ["./user/notes", "notes", "out/bank", "a/b/c", "../user/notes", "_a/b", "user/notes/"])
def test_paths_are_paths(name: str, hub: FakeHub, here: Path) -> None:
    (here / "out").mkdir()
    assert bank_to_change(name) == Path(name)
    assert bank_to_change(str(here / "user" / "notes")) == here / "user" / "notes"
    (here / "user" / "notes").mkdir(parents=True)
    assert bank_to_change("user/notes") == Path("user/notes") and not hub.requests


def test_a_bank_that_was_read_here_is_not_hidden(
    hub: FakeHub, bank: MemoryBank, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the folder of that name is here; what `encode` makes is said to hide it, and only once."""
    bank.push_to_hub("user/notes")
    MemoryBank.from_pretrained("user/notes")
    (here / "user").mkdir()
    hub.requests.clear()
    with pytest.raises(UserError, match=re.escape("Give ./user/notes for a new bank")):
        bank_to_change("user/notes")
    capsys.readouterr()
    tell_hidden_bank("user/other")
    tell_hidden_bank("./user/notes")
    assert capsys.readouterr().err == ""
    tell_hidden_bank("user/notes")
    assert "no more the bank of that name on the Hub" in capsys.readouterr().err
    assert not hub.requests
    MemoryBank.from_pretrained("user/notes").save_pretrained("notes")  # as the message says
    assert bank_to_change("notes") == Path("notes") and len(MemoryBank.from_pretrained("notes")) == len(bank)
    capsys.readouterr()
    (here / "user" / "notes").mkdir()
    tell_hidden_bank("user/notes")
    assert capsys.readouterr().err == "" and bank_to_change("user/notes") == Path("user/notes")


def test_encode_makes_what_it_is_told_and_says_what_that_hides(
    hub: FakeHub,
    bank: MemoryBank,
    model: Any,
    tokenizer: Any,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for item in (model, tokenizer, COMPACT):
        item.save_pretrained("model")
    (here / "docs").mkdir()
    (here / "docs" / "a.txt").write_text("The heron stands in the reeds.")
    assert main(["encode", "model", "docs", "out/bank"]) == 0
    assert "on the Hub" not in capsys.readouterr().err
    bank.push_to_hub("user/notes")
    MemoryBank.from_pretrained("user/notes")
    assert main(["encode", "model", "docs", "user/notes"]) == 0
    assert "user/notes is a new directory here, and no more the bank of that name" in capsys.readouterr().err
    assert main(["bank", "add", "model", "out/bank", "docs"]) == 0
    assert main(["bank", "add", "model", "out/more", "docs"]) == 0
    assert [len(MemoryBank.from_pretrained(name)) for name in ("out/bank", "out/more", "user/notes")] == [1, 1, 1]
