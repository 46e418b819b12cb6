"""The quickstart: its files are what its script makes, and it runs from installed package to compared answers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import base_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.evaluation import UNANSWERABLE
from msa_hf.generation import COMPACT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "quickstart"
NOTES = ROOT / "examples" / "notes"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def quickstart(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), *map(str, arguments)]
    variables = {**os.environ, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)


# Files ----------------------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the prose that they hold: another Python has other prose."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import make_quickstart

    documents, questions = rows(EXAMPLES / "documents.jsonl"), rows(EXAMPLES / "questions.jsonl")
    count = round(make_quickstart.DOCUMENTS * make_quickstart.PROSE_SHARE)
    numbered, _ = make_quickstart.make([str(number) for number in range(count)])
    prose = {int(row["text"]): place for place, row in enumerate(numbered) if row["text"].isdigit()}
    made = make_quickstart.make([documents[prose[number]]["text"] for number in range(count)])
    assert made == (documents, questions)


def test_questions_are_answered_by_their_documents_or_by_none() -> None:
    texts = {row["key"]: row["text"] for row in rows(EXAMPLES / "documents.jsonl")}
    assert len(texts) == 300
    questions = rows(EXAMPLES / "questions.jsonl")
    assert [row["kind"] for row in questions] == ["one_hop", "one_hop", "two_hop", "two_hop", "unanswerable"]
    for row in questions:
        positives = row["positives"]
        assert len(positives) == {"one_hop": 1, "two_hop": 2, "unanswerable": 0}[row["kind"]]
        if positives:
            assert row["answer"] in texts[positives[-1]] and positives[0] in row["question"]
            assert positives[-1] in texts[positives[0]]  # which leads there
            assert all(row["answer"] not in texts[key] for key in positives[:-1])
        else:
            assert row["answer"] == UNANSWERABLE
            assert not any(key in row["question"] for key in texts)


# The script -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, its tokenizer and its protocol: what it says does not matter here."""
    place = tmp_path_factory.mktemp("quickstart") / "a model"
    text = (EXAMPLES / "documents.jsonl").read_text() + (EXAMPLES / "questions.jsonl").read_text()
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)) | set("0123456789[]"))
    special = ["<pad>", "<eos>", "<unk>", *COMPACT.special_tokens]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=list(COMPACT.special_tokens),
        padding_side="left",
    ).save_pretrained(place)
    COMPACT.save_pretrained(place)
    # Every second token ends an answer, so that few take as long as they may.
    ends = list(range(0, len(vocabulary), 2))
    base = base_model("qwen3", vocab_size=len(vocabulary), max_position_embeddings=4096, eos_token_id=ends)
    MSAForCausalLM.from_base(base).save_pretrained(place)
    return place


def test_it_encodes_and_asks_and_compares(checkpoint: Path, tmp_path: Path) -> None:
    """The notes; tests/model_cards/test_shipped.py has the other corpus."""
    done = quickstart("--real", "--no-install", "--model", checkpoint, "--dir", tmp_path / "my bank")
    assert done.returncode == 0, done.stderr
    documents, questions = rows(NOTES / "documents.jsonl"), rows(NOTES / "questions.jsonl")
    asked = re.findall(r"^\d+\. (.+) \([a-z-]+\)\n   answer    ", done.stdout, flags=re.MULTILINE)
    assert asked == [row["question"] for row in questions]
    assert re.search(rf"^\d+ of {len(questions)} answers are right\.$", done.stdout, flags=re.MULTILINE)
    bank = MemoryBank.from_pretrained(tmp_path / "my bank")
    assert [document.key for document in bank.documents] == [row["key"] for row in documents]
    texts = {row["key"]: row["text"].lower() for row in documents}
    for row in questions:
        assert any(answer.lower() in texts[row["positives"][0]] for answer in (row["answer"], *row["also"]))


def compared(tmp_path: Path, answers: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """What is shown of two questions."""
    questions = [
        {"question": "Who?", "answer": "Anna", "also": ["Ann"], "kind": "one_hop", "positives": ["a"]},
        {"question": "When?", "answer": "1900", "kind": "two_hop", "positives": ["b", "c"]},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    command = [sys.executable, str(ROOT / "scripts" / "compare_answers.py"), str(tmp_path / "questions.jsonl")]
    given = "".join(json.dumps(row) + "\n" for row in answers)
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)


def test_answers_are_judged(tmp_path: Path) -> None:
    sources = [{"id": 4, "key": "a", "score": 0.5, "round": 0}, {"id": 7, "key": "b", "score": None, "round": 1}]
    stages = [{"seconds": 0.5}, {"seconds": 1.0}]
    answers = [
        {"question": "Who?", "answer": "Ann.", "sources": sources, "stages": stages},
        {"question": "When?", "answer": "", "sources": [], "stages": stages},
    ]
    done = compared(tmp_path, answers)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "",
        "1. Who? (one-hop)",
        "   answer    Ann.",
        "   expected  Anna (right)",
        "   source    [4] a (score 0.500, round 1, needed)",
        "   source    [7] b (not routed, round 2)",
        "   time      1.50 s",
        "",
        "2. When? (two-hop)",
        "   answer    (none)",
        "   expected  1900 (WRONG)",
        "   time      1.50 s",
        "",
        "1 of 2 answers are right.",
    ]


def test_a_missing_answer_is_an_error(tmp_path: Path) -> None:
    done = compared(tmp_path, [{"question": "Who?", "answer": "Ann", "sources": [], "stages": []}])
    assert done.returncode == 1 and done.stderr.splitlines() == ["error: no answer to question 2: When?"]


def test_mistakes_are_told_in_a_line(checkpoint: Path, tmp_path: Path) -> None:
    def refusal(*arguments: object, **environment: str) -> str:
        done = quickstart(*arguments, **environment)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        return done.stderr

    (tmp_path / "file").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    own = ("--no-install", "--model", checkpoint)
    assert "error: unknown argument: --fast (see --help)" in refusal("--fast")
    assert "error: --dir needs a directory" in refusal("--no-install", "--dir")
    assert f"error: {tmp_path}/config.json is missing" in refusal("--no-install", "--model", tmp_path)
    assert f"error: {tmp_path}/file is not a directory" in refusal(*own, "--dir", tmp_path / "file")
    assert f"error: no environment at {tmp_path}/none" in refusal(*own, VIRTUAL_ENV=f"{tmp_path}/none")
    bare = {"VIRTUAL_ENV": str(tmp_path), "PATH": "/usr/bin:/bin"}
    assert f"error: msa-hf is not installed in {tmp_path}" in refusal(*own, **bare)
