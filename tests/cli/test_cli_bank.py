"""`msa-hf bank add | delete | compact | verify | stat`, on a tiny model with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import refusal

from msa_hf import MemoryBank
from msa_hf.bank import BankStore
from msa_hf.cli import main


@pytest.fixture
def bank(place: Path, tmp_path: Path) -> Path:
    """A bank of four documents that may be changed."""
    return Path(shutil.copytree(place / "compact-bank", tmp_path / "bank"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["bank", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(bank: Path) -> dict[str, str | None]:
    return {document.key: document.text for document in MemoryBank.from_pretrained(bank).documents}


def test_documents_are_added_replaced_and_left_alone(
    place: Path,
    bank: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {document.key: document.id for document in MemoryBank.from_pretrained(bank).documents}
    rows = written(
        tmp_path / "new.jsonl",
        {"key": "tea.md", "text": "tea is grown by the sea", "year": 7},
        {"key": "hill", "text": "the hills are cold", "year": 8},
        {"key": "glass", "text": "glass is made in the town", "year": 8},
    )
    add = ("add", place / "compact", bank, rows, "--commit-every", 2)
    assert "2 added, 1 replaced, 0 unchanged; 6 documents" in run(capsys, *add)
    found = MemoryBank.from_pretrained(bank).documents
    assert found[found.position("tea.md")].text == "tea is grown by the sea"
    assert found[found.position("hill")].metadata == {"year": 8}
    assert all(found[found.position(key)].key == key for key in before)
    assert "0 added, 0 replaced, 3 unchanged; 6 documents" in run(capsys, *add)
    answered = run_main(capsys, "ask", place / "compact", bank, "when was the tower built", "--max-new-tokens", 4)
    assert "Sources:" in answered


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(item) for item in arguments]) == 0
    return capsys.readouterr().out


def test_versions_decide_which_text_stays(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = tmp_path / "made"
    rows = [{"key": "k", "text": f"the tower {year}", "at": year} for year in (5, 6)]
    for row, expected in ((rows[1], "1 added"), (rows[0], "1 unchanged")):
        path = written(tmp_path / "rows.jsonl", row)
        assert expected in run(capsys, "add", place / "compact", new, path, "--version-column", "at")
    assert texts(new) == {"k": "the tower 6"}


def test_deleted_documents_leave_the_files_when_compacted(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def holds(text: bytes) -> bool:
        return any(text in path.read_bytes() for path in bank.iterdir())

    keys = bank.parent / "keys.txt"
    keys.write_text("sea.txt\n")
    assert "2 deleted, 2 documents left" in run(capsys, "delete", bank, "tea.md", "--keys-from", keys)
    assert set(texts(bank)) == {"towers/old.txt", "towers/deep/new.TXT"}
    assert holds(b"tea is grown in the hills")
    record = json.loads(run(capsys, "stat", bank, "--json"))
    assert (record["documents"], record["deleted"]) == (2, 2)
    said = run(capsys, "compact", bank)
    assert "2 deleted documents removed" in said and f"{record['bytes']} -> " in said
    assert not holds(b"tea is grown in the hills") and holds(b"the tower was built")
    assert "deleted: 0" in run(capsys, "stat", bank)
    assert "nothing to do" in run(capsys, "compact", bank)


def test_an_unknown_key_deletes_nothing(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = texts(bank)
    said = refusal(capsys, "bank", "delete", bank, "tea.md", "coffee.md", "milk.md")
    assert "'coffee.md' and 1 more" in said and "--missing-ok" in said
    assert texts(bank) == before
    assert "1 deleted, 3 documents left" in run(capsys, "delete", bank, "tea.md", "coffee.md", "--missing-ok")


def test_verify_names_the_damaged_file_and_gives_up_its_documents_when_told(
    bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "every file is as it was written" in run(capsys, "verify", bank)
    with BankStore(None, bank) as opened:
        opened.delete("tea.md")
    path = min(bank.glob("chunks-*"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["bank", "verify", str(bank)]) == 1
    said = capsys.readouterr().out
    assert path.name in said and "1 damaged files" in said and "sea.txt" in said and "tea.md" not in said
    assert path.name in refusal(capsys, "bank", "compact", bank)
    assert main(["bank", "verify", str(bank), "--discard-damaged", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [item["file"] for item in record["damaged"]] == [path.name]
    assert record["given_up"] == record["damaged"][0]["documents"] > 0
    run(capsys, "compact", bank)
    assert "every file is as it was written" in run(capsys, "verify", bank)


def test_mistakes(
    place: Path,
    bank: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nameless = written(tmp_path / "nameless.jsonl", {"text": "the sea"})
    said = refusal(capsys, "bank", "add", place / "compact", bank, nameless)
    assert "nameless.jsonl, line 1" in said and "--key-column" in said
    said = refusal(capsys, "bank", "add", place / "compact", bank, place / "docs", "--version-column", "at")
    assert "'at' (--version-column)" in said
    assert "no keys" in refusal(capsys, "bank", "delete", bank)
    for command in ("delete x", "compact", "verify", "verify --discard-damaged", "stat", "index --lexical"):
        name, *rest = command.split()
        assert "no bank: there is no such directory" in refusal(capsys, "bank", name, tmp_path / "nowhere", *rest)
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "not a bank" in refusal(capsys, "bank", name, tmp_path / "empty", *rest)
        assert "not a directory, which a bank is" in refusal(capsys, "bank", name, nameless, *rest)
        assert "the name of the bank is empty" in refusal(capsys, "bank", name, "", *rest)
    assert not (tmp_path / "nowhere").exists()
    with BankStore(None, bank):
        assert "process" in refusal(capsys, "bank", "compact", bank)
    other = main(["retrofit", str(place / "base"), str(tmp_path / "other"), "--chunk-size", "8"])
    assert other == 0 and "chunk_size" in refusal(capsys, "bank", "add", tmp_path / "other", bank, place / "docs")
