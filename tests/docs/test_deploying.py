"""What docs/deploying.md says about copies of a bank holds, and its commands are such as there are."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model

from msa_hf.bank import BankStore
from msa_hf.cli import main
from msa_hf.cli.command_line import parser

PAGE = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
KEYS = [f"k{number}" for number in range(6)]


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    """A bank that is open to be written to, at `my-bank`."""
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    with BankStore(model, tmp_path / "my-bank", tokenizer, COMPACT) as bank:
        bank.add({"key": key, "text": text} for key, text in zip(KEYS, TEXTS, strict=False))
        yield bank


def keys_of(directory: Path) -> list[str]:
    with BankStore(None, directory, read_only=True) as bank:
        return [document.key for document in bank.documents]


def test_commands_are_taken() -> None:
    lines = [line for block in BLOCKS for line in block.splitlines()] + re.findall(r"`(msa-hf [^`]*)`", PAGE)
    commands = [part for line in lines for part in re.findall(r"msa-hf bank \w+ [\w/.-]+|msa-hf plan [^`#]+", line)]
    assert len(commands) == 4
    for command in commands:
        arguments = shlex.split(command)[1:]
        parser(arguments).parse_args(arguments)


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed: apt-get install util-linux")
def test_flock_keeps_writers_out_while_a_bank_is_copied(writer: Any, tmp_path: Path) -> None:
    (line,) = [line for block in BLOCKS for line in block.splitlines() if line.startswith("flock ")]
    command = line.partition("#")[0].replace("flock ", "flock -n ")
    (tmp_path / "backups").mkdir()
    copied = tmp_path / "backups" / "monday"
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 1 and not copied.exists()
    writer.close()
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 0
    assert keys_of(copied) == KEYS and main(["bank", "verify", str(copied)]) == 0
    with subprocess.Popen(["flock", tmp_path / "my-bank" / ".lock", "sleep", "60"]) as holder:
        while subprocess.run(["flock", "-n", tmp_path / "my-bank" / ".lock", "true"]).returncode == 0:
            pass  # it has not begun yet
        with pytest.raises(RuntimeError, match="open for writing"):
            BankStore(None, tmp_path / "my-bank")
        holder.kill()


def test_a_writer_copies_its_bank_between_two_commits(writer: Any, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "my-bank", tmp_path / "copy")
    writer.delete("k0")
    writer.compact()
    assert keys_of(tmp_path / "copy") == KEYS and main(["bank", "verify", str(tmp_path / "copy")]) == 0
    with BankStore(writer.model, tmp_path / "copy", writer.tokenizer, COMPACT) as restored:  # its lock is its own
        assert restored.upsert("k0", "The amber stands elsewhere.")


def test_a_copy_that_was_disturbed_is_found(writer: Any, tmp_path: Path, capsys: Any) -> None:
    """A writer that compacts removes files which a copy that began before has yet to reach."""
    before = sorted(path.name for path in (tmp_path / "my-bank").iterdir())
    copy = tmp_path / "copy"
    copy.mkdir()
    names = ["manifest.json", *(item for item in before if item.startswith("commit-"))]
    for item in names:
        shutil.copy(tmp_path / "my-bank" / item, copy / item)
    writer.delete("k0")
    writer.compact()
    for path in (tmp_path / "my-bank").iterdir():
        if path.is_file() and path.name not in names:
            shutil.copy(path, copy / path.name)
    capsys.readouterr()
    assert main(["bank", "verify", str(copy)]) != 0
    shutil.rmtree(copy)
    shutil.copytree(tmp_path / "my-bank", copy)
    assert main(["bank", "verify", str(copy)]) == 0 and keys_of(copy) == KEYS[1:]
