"""Documents, keys and characters on the command line: the same options and one line for every mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TEXTS, loaded, refusal

from msa_hf import MemoryBank
from msa_hf.cli import main
from msa_hf.cli.characters import check_arguments
from msa_hf.user_errors import UserError


def keys(bank: Path) -> list[str]:
    return [item.key for item in MemoryBank.from_pretrained(bank).documents]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with something of several kinds, some of it bad."""
    root = tmp_path / "folder"
    root.mkdir()
    (root / "rows.csv").write_text("key,text,version\nsea,the sea is deep,7\n")
    (root / "tea.md").write_text(TEXTS["tea.md"])
    (root / "old.txt").write_bytes("the café".encode("latin-1"))
    (root / "photo.png").write_bytes(b"\x89PNG")
    return root


def test_options_of_encode(place: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["encode", str(place / "plain"), str(folder), str(tmp_path / "bank")]
    assert "old.txt: not UTF-8 text" in refusal(capsys, *command) and not (tmp_path / "bank").exists()
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "skipped 1 not of a kind that is read (.png): photo.png" in said and "as bad: " in said
    assert keys(tmp_path / "bank") == ["sea", "tea.md"]
    assert main([*command, "--encoding", "latin-1"]) == 0
    bank = MemoryBank.from_pretrained(tmp_path / "bank")
    assert (bank.documents[0].key, bank.documents[0].text) == ("old.txt", "the café")
    assert main([*command, "--glob", "*.csv", "--glob", "*.md"]) == 0
    assert keys(tmp_path / "bank") == ["sea", "tea.md"]
    model, tokenizer = loaded(place / "plain")
    for documents in (folder / "rows.csv", [folder / "rows.csv"]):
        found = model.encode_documents(documents, tokenizer, show_progress=False).documents
        assert [(item.key, item.metadata) for item in found] == [("sea", {"version": "7"})]
    with pytest.raises(ValueError, match=r"old.txt: not UTF-8"):
        model.encode_documents(folder, tokenizer, show_progress=False)


def test_options_of_add(place: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add = ["bank", "add", str(place / "plain"), str(tmp_path / "bank"), str(folder / "rows.csv")]
    assert main([*add, "--version-column", "version"]) == 0
    assert MemoryBank.from_pretrained(tmp_path / "bank").documents[0].version == 7
    (folder / "rows.csv").write_text("key,text,version\nsea,the sea is cold,new\n")
    assert "rows.csv, line 2: 'version'" in refusal(capsys, *add, "--version-column", "version")
    (folder / "more.jsonl").write_text('{"text": "the sea"}')
    assert "more.jsonl, line 1: no 'key'" in refusal(capsys, *add[:-1], folder, "--glob", "*.jsonl")


def test_a_name_that_the_protocol_needs_is_refused_before_parts_are_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the sea {number}", "id": number} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["encode", str(place / "compact"), str(tmp_path / "rows.jsonl"), str(tmp_path / "bank")]
    assert main([*command, "--part-size", "1"]) == 0, "these are the numbers themselves"
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "the sea", "id": "x"}\n')
    command[-1] = str(tmp_path / "other")
    assert "rows.jsonl, line 5: the field 'id'" in refusal(capsys, *command, "--part-size", "1")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["plain", "compact"])
def test_what_is_too_long_is_found_before_anything_is_encoded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Wherever it stands: a run would lose the hours before it, and a bank be changed in part."""
    rows = [{"key": f"k{number}", "text": "the sea"} for number in range(3)]
    rows[2]["text"] = "the sea " * 300
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command, remedy in (
        (["encode", place / name, tmp_path / "rows.jsonl", tmp_path / "bank", "--part-size", "1"], "--too-long split"),
        (["bank", "add", place / name, tmp_path / "bank", tmp_path / "rows.jsonl", "--commit-every", "1"], "Cut it"),
    ):
        said = refusal(capsys, *command)
        assert "(key 'k2') has 6" in said and "above the limit of 256 (" in said and "rows.jsonl, line 3). " in said
        assert remedy in said
        assert not (tmp_path / "bank").exists()
    encode = ["encode", place / name, tmp_path / "rows.jsonl", tmp_path / "bank", "--too-long", "split"]
    assert main([str(item) for item in encode]) == 0 and keys(tmp_path / "bank")[1:3] == ["k1", "k2#0"]

    model, tokenizer = loaded(place / "plain")
    runs: list[object] = []
    hook = model.register_forward_pre_hook(lambda *given: runs.append(given))
    for documents in (rows, [row["text"] for row in rows], tmp_path / "rows.jsonl"):
        with pytest.raises(ValueError, match="above the limit of 256"):
            model.encode_documents(documents, tokenizer, batch_tokens=2, show_progress=False)
    hook.remove()
    assert not runs


def test_names_that_are_empty_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a variable of the shell that is not set, which is no name of the folder that this runs in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the sea")
    for command in (
        ["encode", place / "plain", "a.txt", ""],
        ["encode", place / "plain", "", "bank"],
        ["encode", "", "a.txt", "bank"],
        ["bank", "add", place / "plain", "", "a.txt"],
        ["ask", place / "plain", "", "where"],
        ["retrofit", place / "base", ""],
    ):
        assert "is empty" in refusal(capsys, *command), command
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_of_keys(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "docs.jsonl").write_text('{"key": "café", "text": "the sea"}\n{"key": "b", "text": "the town"}\n')
    bank = tmp_path / "bank"
    assert main(["bank", "add", str(place / "plain"), str(bank), str(tmp_path / "docs.jsonl")]) == 0
    (tmp_path / "keys").write_bytes("café\r\n".encode("latin-1"))
    delete = ["bank", "delete", str(bank), "--keys-from"]
    assert "keys, line 1: not UTF-8 text" in refusal(capsys, *delete, tmp_path / "keys")
    assert keys(bank) == ["café", "b"]
    assert main([*delete, str(tmp_path / "keys"), "--encoding", "latin-1"]) == 0
    assert keys(bank) == ["b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfb\r\n\r\n")))
    assert main([*delete, "-"]) == 0


def test_arguments_are_text_or_there(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    for arguments in (["ask", "m", "b", name], ["chain", f"--question={name}"], ["bank", "delete", "b", name]):
        with pytest.raises(UserError, match=rf"argument {len(arguments)} is not UTF-8 text: .*caf\\xe9"):
            check_arguments(arguments)
    (tmp_path / name).mkdir()
    check_arguments(["encode", "m", str(tmp_path / name), "été"])


def test_names_and_texts_do_not_command_the_terminal(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors, reports and lists of documents are lines, whatever names and texts hold."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "\x1b[2J.png").touch()
    (folder / "two\nlines.png").touch()
    (folder / "\x1b]0;x\x07.txt").write_text("the \x1b[31msea")
    command = ["encode", str(place / "plain"), str(folder), str(tmp_path / "bank")]
    assert main(command) == 0 and main(["inspect", str(tmp_path / "bank")]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out and "\x07" not in printed.out
    assert "�[2J.png, two lines.png" in printed.err and "�]0;x�.txt (" in printed.out
    (folder / "\x1b]0;x\x07.txt").write_bytes(b"caf\xe9")
    assert "�]0;x�.txt: not UTF-8" in refusal(capsys, *command)


def test_any_terminal_shows_any_character(tmp_path: Path) -> None:
    """What it cannot show is an escape, which JSON reads as the character."""
    code = (
        "import json, sys\nfrom msa_hf.cli import main\nfrom msa_hf.cli import doctor\n"
        "text = 'caf\\xe9 \\u20ac \\U0001f600 \\udce9'\n"
        "doctor.run = lambda args: print(json.dumps(text, ensure_ascii=False)) or print(text, file=sys.stderr) or 0\n"
        "sys.exit(main(['doctor']))"
    )
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.decode(encoding)) == "caf\xe9 \u20ac \U0001f600 \udce9"
        assert b"\\udce9" in done.stderr
