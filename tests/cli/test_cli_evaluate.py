"""`msa-hf eval`, end to end on a tiny model with random weights, and what it says to mistakes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import refusal
from scripted import COMPACT, TEXTS, Script, byte_tokenizer, memory_model
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.cli import evaluate, main
from msa_hf.evaluation.judged_questions import read_judged
from msa_hf.training import diagnose

QUESTIONS = [
    {"question": "How far is the amber?", "answer": "10 miles", "positives": ["amber.txt"], "kind": "far"},
    {"question": "How far is the birch?", "answer": "11 miles", "positives": ["birch.txt"], "kind": "far"},
    {"question": "How far is the moon?", "answer": "unknown", "positives": [], "kind": "none"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with and without a protocol, a folder of documents, a bank by either, and questions."""
    root = tmp_path_factory.mktemp("eval")
    tokenizer = byte_tokenizer()
    (root / "docs").mkdir()
    for text in TEXTS:
        (root / "docs" / f"{text.split()[1]}.txt").write_text(text)
    for name in ("plain", "compact"):
        memory_model(tokenizer, COMPACT).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        if name == "compact":
            COMPACT.save_pretrained(root / name)
        assert main(["encode", str(root / name), str(root / "docs"), str(root / f"{name}-bank")]) == 0
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return root


def arguments(place: Path, *more: object, name: str = "compact") -> list[str]:
    paths = [place / name, place / f"{name}-bank", place / "questions.jsonl"]
    return ["eval", *map(str, paths), "--max-new-tokens", "4", *map(str, more)]


def record(capsys: pytest.CaptureFixture[str], command: list[str]) -> dict[str, Any]:
    """What a command with --json prints: one line."""
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("name", ["plain", "compact"])
def test_eval_is_the_diagnosis_of_the_library(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """With every option that changes figures or answers."""
    options = {"max_rounds": 2, "documents_per_round": 2, "select": "constrained", "max_new_tokens": 4}
    command = arguments(place, "--k", 3, "--refusal", "unknown", "--batch-size", 2, name=name)
    command += ["--max-rounds", "2", "--documents-per-round", "2", "--select", "constrained"]
    printed = record(capsys, command)
    model = MSAForCausalLM.from_pretrained(place / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / name)
    bank = model.load_memory(place / f"{name}-bank", tokenizer)
    questions = read_judged(place / "questions.jsonl")
    protocol = COMPACT if name == "compact" else None
    found = diagnose(
        model, tokenizer, bank, questions, protocol, k=3, refusal="unknown", show_progress=False, **options
    )
    assert printed == found.to_dict()
    assert printed["router"]["k"] == 3
    assert set(printed["settings"]) == {"conditions", "max_new_tokens"} | (set(options) if protocol else set())


def test_eval_counts_right_answers(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A model that says the right thing to two of three questions, in words and as a file."""
    load = evaluate.load

    def scripted(*args: Any) -> Any:
        model, tokenizer = load(*args)
        answers = {"amber": "10 miles", "birch": "12 miles", "moon": "unknown"}
        hook = Script(model, tokenizer, COMPACT, {name: [] for name in answers}, answers)
        override = hook._override
        hook._override = lambda m, a, k, o: None if o.past_key_values is None else override(m, a, k, o)  # type: ignore[method-assign]
        hook.__enter__()
        return model, tokenizer

    monkeypatch.setattr(evaluate, "load", scripted)
    out = place / "report.json"
    command = arguments(place, "--conditions", "no_memory,gold_text", "--refusal", "unknown", "--out", out)
    command[command.index("--max-new-tokens") + 1] = "20"
    assert main(command) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["condition"][:3] == ["far", "none", "all"]
    assert rows["no_memory"] == ["0.500", "1.000", "0.667", "0.000", "0.333", "0.000"]
    assert rows["gold_text"] == ["0.500", "-", "0.500", "0.000", "0.000", "1.000"]
    written = json.loads(out.read_text())
    assert written["answers"]["no_memory"]["all"]["exact"] == pytest.approx(2 / 3)
    assert written["predictions"]["gold_text"] == ["10 miles", "12 miles", None]


@pytest.mark.parametrize("name", ["plain", "compact"])
def test_documents_are_encoded_where_no_bank_is_given(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = arguments(place, "--conditions", "routed", name=name)
    banked = record(capsys, command)
    command[2] = str(place / "docs")
    assert record(capsys, command) == banked


def test_what_is_wrong_is_said_in_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: object, replace: dict[int, Path] | None = None, name: str = "compact") -> str:
        command = arguments(place, *more, name=name)
        for number, path in (replace or {}).items():
            command[number] = str(path)
        return refusal(capsys, *command)

    lines = {
        "unknown": {**QUESTIONS[0], "positives": ["nowhere.txt"]},
        "untyped": {**QUESTIONS[0], "answer": 3},
        "unjudged": {"question": "how far", "kind": "far"},
        "long": {**QUESTIONS[0], "question": "how far " * 3000},
    }
    files = {name: tmp_path / f"{name}.jsonl" for name in (*lines, "broken", "empty")}
    for name, row in lines.items():
        files[name].write_text(json.dumps(row))
    files["broken"].write_text("{")
    files["empty"].write_text("")
    (tmp_path / "nothing").mkdir()

    assert "'routed', got" not in said("--conditions", "magic") and "got 'magic'" in said("--conditions", "magic")
    assert "'single_round' needs a protocol" in said("--conditions", "single_round", name="plain")
    assert "missing.jsonl: No such file" in said(replace={3: tmp_path / "missing.jsonl"})
    assert "broken.jsonl, line 1: not valid JSON" in said(replace={3: files["broken"]})
    assert "empty.jsonl: holds no questions" in said(replace={3: files["empty"]})
    assert "no question has an 'answer' or 'positives'" in said(replace={3: files["unjudged"]})
    assert "untyped.jsonl, line 1: 'answer' must be text" in said(replace={3: files["untyped"]})
    assert "'nowhere.txt', which the bank does not hold" in said(replace={3: files["unknown"]})
    for name in ("plain", "compact"):
        assert "The question 'how far how far" in said(replace={3: files["long"]}, name=name)
    assert "no such file or directory" in said(replace={2: tmp_path / "missing"})
    assert "no documents" in said(replace={2: tmp_path / "nothing"})
    assert "no such directory" in said(replace={1: tmp_path / "missing"})
    assert "must be an integer of at least 1" in said("--k", 0)
    assert "not a file in a directory that is there" in said("--out", tmp_path / "missing" / "out.json")
    assert "not a file in a directory that is there" in said("--out", tmp_path)


def test_conditions_that_no_question_is_about_are_said(place: Path, tmp_path: Path, capsys: Any) -> None:
    """Those that show the right documents, where no question names any."""
    command = arguments(place, "--conditions", "routed,gold_text")
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "how far", "answer": "10 miles"}))
    command[3] = str(tmp_path / "asked.jsonl")
    capsys.readouterr()
    assert main(command) == 0
    assert "gold_text: left out, as no question has positives" in capsys.readouterr().out


def test_a_bank_of_another_model_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = memory_model(byte_tokenizer(), COMPACT, chunk_size=4)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    command = arguments(place, "--conditions", "routed")
    command[1] = str(tmp_path / "other")
    assert "chunk_size" in refusal(capsys, *command)


def test_bm25_that_is_not_installed_is_said_before_anything_is_loaded(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(evaluate, "load", lambda *args: pytest.fail("loaded"))
    line = refusal(capsys, *arguments(place))
    assert "pip install msa-hf[eval], or leave it out of --conditions" in line


def test_a_document_that_is_too_long_has_a_remedy_of_the_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not that of Python: none of these commands stores documents in parts."""
    rows = [{"key": f"{text.split()[1]}.txt", "text": text} for text in TEXTS]
    rows[0]["text"] = "the sea is deep " * 1000
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, documents = str(place / "questions.jsonl"), str(tmp_path / "long.jsonl")
    ways = [
        ["eval", place / "compact", documents, questions],
        ["bench", "scaling", place / "compact", "--documents", documents, "--questions", questions, "--sizes", "20K"],
    ]
    for command in ways:
        said = refusal(capsys, *command)
        assert "tokens" in said and said.endswith("Cut it into shorter documents."), said
