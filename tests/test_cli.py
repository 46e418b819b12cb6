"""The command line, end to end on a tiny model with random weights, and what it says to mistakes."""

import errno
import importlib.metadata
import io
import json
import os
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank.tiered import bank as tiers
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.cli import main
from msa_hf.generation import COMPACT, PUBLISHED, MemoryInterleave

TEXTS = {
    "towers/old.txt": "the tower was built in the old town",
    "tea.md": "tea is grown in the hills",
    "towers/deep/new.TXT": "a new tower stands by the sea\n\nit is made of glass",
    "sea.txt": "the sea is deep and cold",
}
QUESTION = "when was the tower built"


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    words = sorted({word for text in TEXTS.values() for word in text.split()} | set(QUESTION.split()))
    special = ["<pad>", "<bos>", "<eos>", "<unk>", *COMPACT.special_tokens]
    vocabulary = {word: number for number, word in enumerate([*special, "[", "]", *map(str, range(10)), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=list(COMPACT.special_tokens),
        padding_side="left",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a retrofit of it with and one without a protocol, a folder of documents and a bank by either."""
    root = tmp_path_factory.mktemp("cli")
    base_model("qwen3").save_pretrained(root / "base")
    tokenizer_of_words().save_pretrained(root / "base")
    for name, text in TEXTS.items():
        (root / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "docs" / name).write_text(text)
    (root / "docs" / "notes.csv").write_text("not a document")
    for name in ("plain", "compact"):
        assert main(["retrofit", str(root / "base"), str(root / name), "--chunk-size", "4", "--top-k", "2"]) == 0
        if name == "compact":
            COMPACT.save_pretrained(root / name)
        assert main(["encode", str(root / name), str(root / "docs"), str(root / f"{name}-bank")]) == 0
    return root


def loaded(directory: Path) -> tuple[Any, Any]:
    return MSAForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run what must fail; the one line that it says."""
    capsys.readouterr()
    assert main([str(item) for item in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("msa-hf: error: ")]
    assert len(lines) == 1 and printed.err.rstrip().endswith(lines[0]) and "Traceback" not in printed.err
    return lines[0]


def records(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What a command with --json prints: nothing but one object per line."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def same_bank(ours: MemoryBank, theirs: MemoryBank) -> None:
    """What the command encoded, and the same in memory, where a protocol keeps the ids among the metadata."""
    wanted = []
    for number, document in enumerate(theirs.documents):
        metadata = dict(document.metadata or {})
        assert metadata.pop("id", number) == number
        wanted.append(replace(document, id=number, metadata=metadata or None))
    assert list(ours.documents) == wanted
    for layer, memory in theirs.layers.items():
        torch.testing.assert_close(ours.layers[layer].pooled_kv, memory.pooled_kv)
        torch.testing.assert_close(ours.layers[layer].routing_keys, memory.routing_keys)


def test_asking_untrained_routers_is_said_in_one_line(place: Path, tmp_path: Path, capsys) -> None:
    model, tokenizer = loaded(place / "plain")
    for state, lines in ((False, 1), (True, 0), (None, 0)):
        model.config.routers_trained = state
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        capsys.readouterr()
        assert main(["ask", str(tmp_path), str(place / "plain-bank"), QUESTION, "--max-new-tokens", "1"]) == 0
        assert capsys.readouterr().err.count("routers of") == lines


# retrofit -------------------------------------------------------------------------------------------------------------


def test_retrofit_passes_every_option_on(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--memory-layers 1,3 --chunk-size 5 --top-k 3 --similarity dot --router-init random --score-bias"
    assert main(["retrofit", str(place / "base"), str(tmp_path / "out"), *options.split()]) == 0
    config = MSAForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.memory_layers, config.chunk_size, config.top_k) == ([1, 3], 5, 3)
    assert (config.similarity, config.score_bias) == ("dot", True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    attention = "model.layers.3.self_attn"
    assert not torch.equal(weights[f"{attention}.router_q_proj.weight"], weights[f"{attention}.q_proj.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(QUESTION) == tokenizer_of_words()(QUESTION)
    assert "1, 3" in capsys.readouterr().out


def test_retrofit_copies_routers_by_default(place: Path) -> None:
    weights = load_file(place / "plain" / "model.safetensors")
    attention = "model.layers.3.self_attn"
    assert torch.equal(weights[f"{attention}.router_q_proj.weight"], weights[f"{attention}.q_proj.weight"])


def test_retrofit_whitens_routers_by_documents(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": " ".join(f"word{(7 * row + word) % 50}" for word in range(12))} for row in range(30)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--whiten", str(tmp_path / "docs.jsonl"), "--memory-layers", "3", "--chunk-size", "4")
    assert main(["retrofit", str(place / "base"), str(tmp_path / "out"), *options]) == 0
    assert "whitened, not trained" in capsys.readouterr().out
    made, _ = loaded(tmp_path / "out")
    assert made.config.query_reduction == "mean"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    query, key = (weights[f"model.layers.3.self_attn.router_{name}_proj.weight"] for name in ("q", "k"))
    torch.testing.assert_close(query.unflatten(0, (2, 2, -1))[:, 0].flatten(0, 1), key)  # heads share their group's
    few = refusal(capsys, "retrofit", place / "base", tmp_path / "few", "--whiten", place / "docs")
    assert "take more or longer documents" in few and not (tmp_path / "few").exists()
    assert "no such file" in refusal(capsys, "retrofit", place / "base", tmp_path / "few", "--whiten", tmp_path / "no")


def test_retrofit_chooses_positions(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once for all texts, where the base's depend on the longest of a batch; elsewhere there is nothing to choose."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base_model("qwen3", rope_parameters=rope).save_pretrained(tmp_path / "base")
    tokenizer_of_words().save_pretrained(tmp_path / "base")
    for name, options, length in (("default", (), 512), ("chosen", ("--rope-length", "300"), 300)):
        assert main(["retrofit", str(tmp_path / "base"), str(tmp_path / name), *options]) == 0
        assert MSAForCausalLM.from_pretrained(tmp_path / name).config.rope_length == length
    assert "leave it out" in refusal(capsys, "retrofit", place / "base", tmp_path / "out", "--rope-length=64")


@pytest.mark.parametrize("option", ["--top-k", "--chunk-size", "--rope-length"])
def test_retrofit_refuses_counts_below_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("0", "-1", "two"):
        assert f"argument {option}: must be an integer of at least 1, got '{value}'" in refusal(
            capsys, "retrofit", "base", "out", f"{option}={value}"
        )


def test_retrofit_refuses_a_base_that_cannot_hold_a_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, reason in (("t5", "is an encoder-decoder"), ("mamba", "has no attention heads")):
        AutoConfig.for_model(family).save_pretrained(tmp_path / family)
        assert f"'{family}' {reason}" in refusal(capsys, "retrofit", tmp_path / family, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_retrofit_refuses_what_it_cannot_read_or_must_not_overwrite(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = place / "base"
    assert "/none: no such directory" in refusal(capsys, "retrofit", tmp_path / "none", tmp_path / "out")
    assert "has a memory already" in refusal(capsys, "retrofit", place / "plain", tmp_path / "out")
    assert "is BASE itself" in refusal(capsys, "retrofit", base, base)
    (tmp_path / "file").write_text("")
    assert "/file: not a directory" in refusal(capsys, "retrofit", base, tmp_path / "file")
    assert "`memory_layers`" in refusal(capsys, "retrofit", base, tmp_path / "out", "--memory-layers", "9")
    assert "separated by commas" in refusal(capsys, "retrofit", base, tmp_path / "out", "--memory-layers", "a")


# encode ---------------------------------------------------------------------------------------------------------------


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
    assert "'long') has 4" in refusal(capsys, *command)
    assert main([*map(str, command), "--too-long", "split"]) == 0
    documents = MemoryBank.from_pretrained(tmp_path / "bank").documents
    assert [item.key for item in documents][:2] == ["long#0", "long#1"]
    assert all(item.tokens <= 256 for item in documents)


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
    assert "docs: no .txt or .md file with text" in refusal(capsys, *command)
    (tmp_path / "docs" / "empty.md").write_text("\n")
    assert "docs: no .txt or .md file with text" in refusal(capsys, *command)
    (tmp_path / "docs" / "latin.txt").write_bytes("café".encode("latin-1"))
    assert "latin.txt: not UTF-8 text (byte 0xe9 at 3)" in refusal(capsys, *command)
    assert "none: no such file or directory" in refusal(
        capsys, "encode", place / "plain", tmp_path / "none", tmp_path / "bank"
    )
    (tmp_path / "docs.csv").write_text("a")
    assert "docs.csv: not a folder" in refusal(
        capsys, "encode", place / "plain", tmp_path / "docs.csv", tmp_path / "bank"
    )


def test_encode_says_that_it_leaves_empty_files_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "empty.txt").write_text("")
    (tmp_path / "docs" / "tea.txt").write_text(TEXTS["tea.md"])
    assert main(["encode", str(place / "plain"), str(tmp_path / "docs"), str(tmp_path / "bank")]) == 0
    assert "skipping 1 empty files, such as empty.txt" in capsys.readouterr().err
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


# ask ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["router", "generate", "constrained"])
def test_ask_with_a_protocol_interleaves(place: Path, capsys: pytest.CaptureFixture[str], select: str) -> None:
    options = ("--select", select, "--max-rounds", 1, "--max-new-tokens", 6)
    asked = (QUESTION, "tea")
    found = records(capsys, "ask", place / "compact", place / "compact-bank", *asked, *options)
    model, tokenizer = loaded(place / "compact")
    bank = model.load_memory(place / "compact-bank", tokenizer)
    asker = MemoryInterleave(model, tokenizer, bank, COMPACT, max_rounds=1, select=select, max_new_tokens=6)
    assert [record["question"] for record in found] == list(asked)
    for record, wanted in zip(found, asker.ask(asked, batch_size=1), strict=True):
        assert record["answer"] == wanted.text
        assert [item["key"] for item in record["sources"]] == [item.key for item in wanted.documents]
        assert [item["score"] for item in record["sources"]] == pytest.approx([item.score for item in wanted.documents])
        assert [stage["stage"] for stage in record["stages"]] == [
            *["prefill", "select"] * len(wanted.trace.rounds),
            "answer",
        ]
        assert all(stage["seconds"] >= 0 for stage in record["stages"])
        assert len(record["trace"]["rounds"]) == len(wanted.trace.rounds)


def test_ask_reads_no_more_documents_than_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("ask", place / "compact", place / "compact-bank", QUESTION, "--max-rounds", 1, "--max-new-tokens", 2)
    for most in (1, 3):
        (record,) = records(capsys, *command, "--documents-per-round", most)
        assert len(record["sources"]) == most
    assert "at least 1" in refusal(capsys, *command, "--documents-per-round", 0)


def test_ask_prints_answer_sources_and_times(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ask", str(place / "compact"), str(place / "compact-bank"), QUESTION, "--max-new-tokens", "4"]
    (record,) = records(capsys, *command)
    assert record["sources"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (record["answer"] or "(no answer)")
    for source in record["sources"]:
        line = f"  [{source['id']}] {source['key']} (score {source['score']:.3f}, round {source['round'] + 1})"
        assert line in printed
    assert any(line.startswith("  round 1 prefill: ") and " ms, " in line for line in printed)
    assert any(line.startswith("  answer: ") for line in printed)


def test_ask_without_a_protocol_generates_and_lists_the_routing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("ask", place / "plain", place / "plain-bank", QUESTION, "--max-new-tokens", 5)
    (record,) = records(capsys, *command)
    model, tokenizer = loaded(place / "plain")
    bank = model.load_memory(place / "plain-bank", tokenizer)
    inputs = tokenizer(QUESTION, return_tensors="pt", return_token_type_ids=False)
    wanted = model.generate(**inputs, memory=bank, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert record["answer"] == tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert record["stages"][1]["tokens"] == len(wanted)
    routing = model(**inputs, memory=bank).routing
    assert list(record["routing"]) == [str(layer) for layer in routing]
    for layer, found in routing.items():
        listed = record["routing"][str(layer)]
        assert [item["position"] for item in listed] == found.documents[0].tolist()
        assert [item["key"] for item in listed] == [bank.documents[i].key for i in found.documents[0].tolist()]
        assert [item["score"] for item in listed] == pytest.approx(found.scores[0].tolist())
    assert main([*map(str, command)]) == 0
    first = record["routing"]["2"][0]
    assert f"Layer 2: {first['key']} ({first['score']:.3f})" in capsys.readouterr().out


def test_ask_is_greedy_whatever_the_checkpoint_says(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "plain", tmp_path / "model")
    sampling = {"do_sample": True, "temperature": 100.0, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(sampling))
    rest = (place / "plain-bank", QUESTION, "--max-new-tokens", 20)
    (wanted,) = records(capsys, "ask", place / "plain", *rest)
    (found,) = records(capsys, "ask", tmp_path / "model", *rest)
    assert found["answer"] == wanted["answer"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_ask_reads_questions_from_the_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    monkeypatch.setattr("sys.stdin", kind(f"{QUESTION}\n\n  tea \n"))
    command = ("ask", place / "compact", place / "compact-bank", "--max-new-tokens", 3, "--json")
    capsys.readouterr()
    assert main([*map(str, command)]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["question"] for line in printed.out.splitlines()] == [QUESTION, "tea"]
    assert printed.err.count("? ") == (4 if kind is Terminal else 0)


@pytest.mark.parametrize("model", ["plain", "compact"])
def test_ask_goes_on_after_a_question_that_does_not_fit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'sea ' * 300}\ntea\n"))
    command = ("ask", place / model, place / f"{model}-bank", "--max-new-tokens", 3, "--json")
    capsys.readouterr()
    assert main([*map(str, command)]) == 2
    printed = capsys.readouterr()
    assert [json.loads(line)["question"] for line in printed.out.splitlines()] == ["tea"]
    assert printed.err.count("msa-hf: error: ") == 1


@pytest.mark.parametrize("placement", ["auto", "fp8@device,@disk", "@host,"])
def test_ask_of_a_bank_in_tiers(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    monkeypatch.setattr(tiers, "measured_tiers", lambda *_: Tiers(10**12, 10**12, 10**12))
    command = ("ask", place / "compact", place / "compact-bank", QUESTION)
    expected, (found,) = records(capsys, *command), records(capsys, *command, "--placement", placement)
    assert found["answer"] == expected[0]["answer"] and found.keys() == expected[0].keys()
    assert main([*map(str, command), "--placement", placement]) == 0
    said = capsys.readouterr().err
    assert ("routing keys  fp8     device" in said) == ("fp8@" in placement) and "routing 32 tokens" in said


def test_ask_refuses_a_placement_that_cannot_be(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "measured_tiers", lambda *_: Tiers(None, 10, 10))
    command = ("ask", place / "compact", place / "compact-bank", QUESTION, "--placement")
    assert "do not fit. Routing keys need" in refusal(capsys, *command, "auto")
    assert "there is no device" in refusal(capsys, *command, "fp8@device,@host")
    assert "must be auto, or keys and content such as" in refusal(capsys, *command, "fp8@device")


def test_ask_refuses_banks_and_questions(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = (place / "plain", place / "plain-bank")
    other = tmp_path / "other"
    assert main(["retrofit", str(place / "base"), str(other), "--chunk-size", "3"]) == 0
    message = refusal(capsys, "ask", other, plain[1], QUESTION)
    assert "This bank was not made with this model" in message and "chunk_size: the bank has 4, the model 3" in message
    assert "manifest.json: there is no such file" in refusal(capsys, "ask", plain[0], tmp_path / "none", QUESTION)
    assert "question is empty" in refusal(capsys, "ask", *plain, "")
    assert "not empty" in refusal(capsys, "ask", place / "compact", place / "compact-bank", " ")
    assert "at least 1" in refusal(capsys, "ask", *plain, QUESTION, "--max-new-tokens", "0")
    assert "invalid choice: 'best'" in refusal(capsys, "ask", *plain, QUESTION, "--select", "best")
    assert "has no token" in refusal(capsys, "ask", *plain, QUESTION, "--protocol", "published")


def test_ask_refuses_a_damaged_protocol_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = loaded(place / "plain")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    PUBLISHED.save_pretrained(tmp_path / "model")
    command = ("ask", tmp_path / "model", place / "plain-bank", QUESTION)
    assert "has no token '<|im_" in refusal(capsys, *command)
    (tmp_path / "model" / "memory_protocol.json").write_text("{")
    assert "memory_protocol.json: " in refusal(capsys, *command)


# inspect --------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_the_bank_holds(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = MemoryBank.from_pretrained(place / "plain-bank")
    monkeypatch.setattr(MSAForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    (record,) = records(capsys, "inspect", place / "plain-bank", "--documents", 2)
    assert (record["documents"], record["tokens"], record["chunks"]) == (4, bank.num_tokens, bank.num_chunks)
    assert record["dtype"] == "float32" and record["origin"] == bank.origin.to_dict()
    assert record["bytes"] == sum(path.stat().st_size for path in (place / "plain-bank").iterdir())
    assert [item["key"] for item in record["first_documents"]] == sorted(TEXTS)[:2]
    assert main(["inspect", str(place / "plain-bank"), "--documents", "1"]) == 0
    printed = capsys.readouterr().out
    assert "documents: 4\n" in printed and "memory layers: [2, 3]\n" in printed and "base model type: qwen3" in printed
    assert f"  sea.txt (6 tokens): {TEXTS['sea.txt']}\n" in printed and "tea.md" not in printed


def test_inspect_compares_checksums_where_asked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MemoryBank.from_pretrained(place / "plain-bank").save_pretrained(tmp_path / "bank")
    path = next((tmp_path / "bank").glob("layer*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["inspect", str(tmp_path / "bank")]) == 0
    assert "is corrupted: its SHA-256" in refusal(capsys, "inspect", tmp_path / "bank", "--verify")
    path.write_bytes(content[:-1])
    assert "truncated or overwritten" in refusal(capsys, "inspect", tmp_path / "bank")
    assert "so this is not a bank" in refusal(capsys, "inspect", tmp_path)


# All ------------------------------------------------------------------------------------------------------------------


def test_wrong_commands_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in refusal(capsys)
    assert "invalid choice: 'frobnicate'" in refusal(capsys, "frobnicate")
    assert "unrecognized arguments: --colour" in refusal(capsys, "inspect", "bank", "--colour")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("retrofit", "encode", "ask", "inspect"))


def test_an_interrupt_exits_with_130(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msa_hf.cli.ask.load", interrupt)
    assert main(["ask", str(place / "plain"), str(place / "plain-bank"), QUESTION]) == 130


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_faults_keep_their_traceback(place: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """Also a ValueError that no check of this package raised."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("a fault")

    monkeypatch.setattr(MSAForCausalLM, "generate", fail)
    with pytest.raises(error, match="a fault"):
        main(["ask", str(place / "plain"), str(place / "plain-bank"), QUESTION])


def test_the_package_declares_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entry = importlib.metadata.EntryPoint("msa-hf", project["scripts"]["msa-hf"], "console_scripts")
    assert entry.load() is main
