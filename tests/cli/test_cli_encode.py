"""`msa-hf encode`: all that documents may lie in, and what is said of mistakes in them."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import TEXTS, loaded, refusal, same_bank
from safetensors import SafetensorError

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.cli import main
from msa_hf.generation import COMPACT


def test_encode_reads_a_folder_with_all_its_folders(place: Path) -> None:
    model, tokenizer = loaded(place / "plain")
    bank = model.load_memory(place / "plain-bank", tokenizer)
    rows = [{"key": name, "text": TEXTS[name]} for name in sorted(TEXTS)]
    same_bank(bank, model.encode_documents(rows, tokenizer, show_progress=False))


@pytest.mark.parametrize("choice", ["auto", "compact", "none"])
def test_encode_wraps_documents_as_the_protocol_says(place: Path, tmp_path: Path, choice: str) -> None:
    source = [str(place / "compact"), str(place / "docs"), str(tmp_path / "bank")]
    assert main(["encode", *source, "--protocol", choice]) == 0
    model, tokenizer = loaded(place / "compact")
    rows = [{"key": name, "text": TEXTS[name]} for name in sorted(TEXTS)]
    wanted = rows if choice == "none" else COMPACT.encode_corpus(rows, tokenizer)
    same_bank(
        model.load_memory(tmp_path / "bank", tokenizer),
        model.encode_documents(wanted, tokenizer, show_progress=False),
    )


def test_encode_projects_in_fp8_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    assert main(["encode", str(place / "plain"), str(place / "docs"), str(tmp_path / "bank"), "--fp8"]) == 0
    model, tokenizer = loaded(place / "plain")
    bank, rows = model.load_memory(tmp_path / "bank", tokenizer), [{"key": n, "text": TEXTS[n]} for n in sorted(TEXTS)]
    options = {"show_progress": False, "fp8_projections": True}
    same_bank(bank, model.encode_documents(rows, tokenizer, **options))
    with pytest.raises(AssertionError):
        same_bank(bank, model.encode_documents(rows, tokenizer, show_progress=False))


def test_encode_reads_json_lines_and_saved_datasets_alike(place: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"name": name, "body": text, "year": year} for year, (name, text) in enumerate(TEXTS.items())]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    columns = ["--text-column", "body", "--key-column", "name"]
    for source in ("rows.jsonl", "rows"):
        assert main(["encode", str(place / "plain"), str(tmp_path / source), str(tmp_path / "bank"), *columns]) == 0
        documents = MemoryBank.from_pretrained(tmp_path / "bank").documents
        assert [(item.key, item.text) for item in documents] == list(TEXTS.items())
        assert [item.metadata for item in documents] == [{"year": year} for year in range(len(rows))]


@pytest.mark.parametrize("model", ["plain", "compact"])
def test_encode_splits_what_is_too_long_or_refuses_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"key": "long", "text": "the sea is deep " * 100}))
    command = ["encode", place / model, tmp_path / "long.jsonl", tmp_path / "bank"]
    said = refusal(capsys, *command)
    assert "'long') has 4" in said and said.endswith("Pass --too-long split to store it in parts.")
    added = refusal(capsys, "bank", "add", place / model, tmp_path / "other", tmp_path / "long.jsonl")
    assert "'long') has 4" in added and added.endswith("Cut it into parts with keys of their own.")
    assert main([*map(str, command), "--too-long", "split"]) == 0
    documents = MemoryBank.from_pretrained(tmp_path / "bank").documents
    assert [item.key for item in documents][:2] == ["long#0", "long#1"]
    assert all(item.tokens <= (256 if model == "plain" else 128) for item in documents), "beside a question if read"


def test_encode_takes_no_documents_above_the_length_that_is_given(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"key": "long", "text": "the sea is deep " * 30}))
    command = ["encode", place / "compact", tmp_path / "long.jsonl", tmp_path / "bank"]
    assert "above the limit of 100 " in refusal(capsys, *command, "--max-length", "100")
    said = refusal(capsys, *command, "--max-length", "257")
    assert said.endswith("`max_length` (--max-length) must be from 1 to 256, the model's positions, got 257.")
    assert not (tmp_path / "bank").exists()
    assert main([*map(str, command), "--max-length", "40", "--too-long", "split"]) == 0
    documents = MemoryBank.from_pretrained(tmp_path / "bank").documents
    assert len(documents) > 3 and all(item.tokens <= 40 for item in documents)
    assert "".join(item.text or "" for item in documents) == "the sea is deep " * 30


MISTAKES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"text": "a"}\n\n{"text": \n', "docs.jsonl, line 3: not valid JSON"),
    "a number that is not JSON": (b'{"text": "a", "x": NaN}', "docs.jsonl, line 1: not valid JSON (NaN"),
    "no object": (b'{"text": "a"}\n["a"]', "docs.jsonl, line 2: not a JSON object but list"),
    "no text": (b'{"body": "a"}', "docs.jsonl, line 1: no field 'text' (--text-column); there are: body"),
    "another type": (b'{"text": 3}', "docs.jsonl, line 1: 'text' is not a text but int"),
    "empty text": (b'{"text": " "}', "docs.jsonl, line 1: 'text' is empty"),
    "a key twice": (b'{"text": "a", "key": 1}\n{"text": "b", "key": "1"}', "line 2: the key '1' is that of"),
    "undecodable": (b'{"text": "a"}\n{"text": "\xff"}', "docs.jsonl, line 2: not UTF-8 text (byte 0xff at 10)"),
    "nothing": (b"\n", "docs.jsonl: no documents"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_encode_names_file_and_line_of_a_mistake(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = MISTAKES[name]
    (tmp_path / "docs.jsonl").write_bytes(content)
    assert message in refusal(capsys, "encode", place / "plain", tmp_path / "docs.jsonl", tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_encode_refuses_folders_without_documents(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    command = ("encode", place / "plain", tmp_path / "docs", tmp_path / "bank")
    assert "docs: no documents" in refusal(capsys, *command)
    (tmp_path / "docs" / "empty.md").write_text("\n")
    (tmp_path / "docs" / "photo.png").write_text("\n")
    said = refusal(capsys, *command)
    assert (
        "docs: no documents, skipped 1 " in said and "no text in it: empty.md" in said and "(.png): photo.png" in said
    )
    (tmp_path / "docs" / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "latin.txt: not UTF-8 text (byte 0xe9 at 3)" in refusal(capsys, *command)
    assert "none: no such file or directory" in refusal(
        capsys, "encode", place / "plain", tmp_path / "none", tmp_path / "bank"
    )
    (tmp_path / "docs.xyz").write_text("a")
    assert "docs.xyz: not a kind of file that is read" in refusal(
        capsys, "encode", place / "plain", tmp_path / "docs.xyz", tmp_path / "bank"
    )


def test_encode_says_that_it_leaves_empty_files_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "empty.txt").write_text("")
    (tmp_path / "docs" / "tea.txt").write_text(TEXTS["tea.md"])
    assert main(["encode", str(place / "plain"), str(tmp_path / "docs"), str(tmp_path / "bank")]) == 0
    assert "skipped 1 empty, nothing in it: empty.txt" in capsys.readouterr().err
    assert [item.key for item in MemoryBank.from_pretrained(tmp_path / "bank").documents] == ["tea.txt"]


def test_encode_refuses_a_dataset_of_several_splits_and_a_missing_key(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "the sea"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    command = ("encode", place / "plain", tmp_path / "splits", tmp_path / "bank")
    assert "splits: holds the splits train, test" in refusal(capsys, *command)
    rows.save_to_disk(tmp_path / "rows")
    assert "rows, row 0: no field 'name' (--key-column); there are: text" in refusal(
        capsys, "encode", place / "plain", tmp_path / "rows", tmp_path / "bank", "--key-column", "name"
    )


def test_encode_refuses_models_that_do_not_fit(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = (place / "docs", tmp_path / "bank")
    assert "is a plain 'qwen3' checkpoint" in refusal(capsys, "encode", place / "base", *rest)
    assert "/none: no such directory" in refusal(capsys, "encode", tmp_path / "none", *rest)
    (tmp_path / "empty").mkdir()
    assert "/empty: " in refusal(capsys, "encode", tmp_path / "empty", *rest)
    assert "has no token '<|im_" in refusal(capsys, "encode", place / "plain", *rest, "--protocol", "published")
    assert "no device 'warp'" in refusal(capsys, "encode", place / "plain", *rest, "--device", "warp")
    assert "at least 1" in refusal(capsys, "encode", place / "plain", *rest, "--batch-tokens", "0")


def test_encode_refuses_a_damaged_bank_before_the_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "manifest.json").write_text("{")
    monkeypatch.setattr(MSAForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    message = refusal(capsys, "encode", place / "plain", place / "docs", tmp_path / "bank")
    assert "manifest.json: not valid JSON" in message


FULL = (
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL, ids=["OSError", "SafetensorError"])
def test_a_full_disk_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("msa_hf.model.bank_writer_msa.BankWriter.segment", full)
    monkeypatch.setattr(MSAForCausalLM, "save_pretrained", full)
    for command in (("encode", place / "plain", place / "docs"), ("retrofit", place / "base")):
        assert "No space left on device" in refusal(capsys, *command, tmp_path / "out")
