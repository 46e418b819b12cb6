"""`msa-hf ask`: with a protocol and without, from the command line and the standard input."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import QUESTION, TEXTS, loaded, records, refusal

from msa_hf.bank.tiered import bank as tiers
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.cli import main
from msa_hf.cli.answers import snippet
from msa_hf.cli.characters import shown
from msa_hf.generation import COMPACT, PUBLISHED, DirectAsker, MemoryInterleave


def test_asking_untrained_routers_is_said_in_one_line(place: Path, tmp_path: Path, capsys) -> None:
    model, tokenizer = loaded(place / "plain")
    for state, lines in ((False, 1), (True, 0), (None, 0)):
        model.config.routers_trained = state
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        capsys.readouterr()
        assert main(["ask", str(tmp_path), str(place / "plain-bank"), QUESTION, "--max-new-tokens", "1"]) == 0
        assert capsys.readouterr().err.count("routers of") == lines


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


def test_ask_says_what_was_found_and_does_not_fit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("the sea is deep " * 61)
    assert main(["encode", str(place / "compact"), str(tmp_path / "long.txt"), str(tmp_path / "bank")]) == 0
    capsys.readouterr()
    command = ["ask", str(place / "compact"), str(tmp_path / "bank"), QUESTION, "--max-new-tokens", "2"]
    assert main(command) == 0
    sources, unread = capsys.readouterr().out.splitlines()[-2:]
    assert sources == "Sources: none"
    assert unread.startswith("Not read, for lack of room in the model's positions: ids 0. `msa-hf encode --too-long")
    split = ["encode", str(place / "compact"), str(tmp_path / "long.txt"), str(tmp_path / "bank"), "--too-long=split"]
    assert main(split) == 0 and main(command) == 0
    assert "  1. long.txt#" in capsys.readouterr().out, "parts are read"


def test_ask_reads_no_more_documents_than_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("ask", place / "compact", place / "compact-bank", QUESTION, "--max-rounds", 1, "--max-new-tokens", 2)
    for most in (1, 3):
        (record,) = records(capsys, *command, "--documents-per-round", most)
        assert len(record["sources"]) == most
    assert "at least 1" in refusal(capsys, *command, "--documents-per-round", 0)


@pytest.mark.parametrize("model", ["plain", "compact"])
def test_ask_prints_the_answer_and_its_sources(place: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    command = ["ask", str(place / model), str(place / f"{model}-bank"), QUESTION, "--max-new-tokens", "4"]
    (record,) = records(capsys, *command)
    assert record["sources"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [record["answer"] or "(no answer)", "Sources:"]
    for line, source in zip(printed[2:], record["sources"], strict=True):
        assert line == f"  {source['rank']}. {source['key']} ({source['score']:.3f}) {source['snippet']}"
        assert source["snippet"] == " ".join(TEXTS[source["key"]].split())
    assert main([*command, "--stream"]) == 0
    assert capsys.readouterr().out.splitlines() == printed
    assert main([*command, "--why"]) == 0
    why = capsys.readouterr().out.splitlines()
    assert why[: len(printed)] == printed and f"Question: {QUESTION}" in why[len(printed) :]
    assert any(line.startswith("  layer 2 chose [") for line in why)
    assert any(line.startswith("  prefill: ") and line.endswith(" ms") for line in why)


def test_ask_without_a_protocol_generates(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("ask", place / "plain", place / "plain-bank", QUESTION, "--max-new-tokens", 5)
    (record,) = records(capsys, *command)
    model, tokenizer = loaded(place / "plain")
    bank = model.load_memory(place / "plain-bank", tokenizer)
    wanted = DirectAsker(model, tokenizer, bank, max_new_tokens=5).ask(QUESTION)
    assert (record["answer"], record["trace"]["answer"]) == (wanted.text, wanted.text)
    assert record["stages"][1]["tokens"] == len(wanted.token_ids)
    assert [item["key"] for item in record["sources"]] == [item.key for item in wanted.documents]
    assert "--max-rounds: is about rounds" in refusal(capsys, *command, "--max-rounds", 1)


def test_ask_puts_questions_by_the_chat_template(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded(place / "plain")
    tokenizer.chat_template = "{% for item in messages %}tea {{ item['content'] }} sea{% endfor %}"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    command = ("ask", tmp_path, place / "plain-bank", QUESTION, "--max-new-tokens", 5)
    bank = model.load_memory(place / "plain-bank", tokenizer)
    wanted = DirectAsker(model, tokenizer, bank, max_new_tokens=5).ask(QUESTION)
    for options in ((), ("--protocol", "chat")):
        (record,) = records(capsys, *command, *options)
        assert record["answer"] == wanted.text
        assert record["stages"][0]["tokens"] == len(QUESTION.split()) + 2
    (plain,) = records(capsys, *command, "--protocol", "none")
    assert plain["stages"][0]["tokens"] == len(QUESTION.split())
    assert "has no chat template" in refusal(
        capsys, "ask", place / "plain", place / "plain-bank", QUESTION, "--protocol", "chat"
    )


def test_what_is_not_there_is_named_at_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before torch is imported, and without asking a Hub that cannot be reached again and again."""
    code = (
        "import sys; from msa_hf.cli import main; c = main(sys.argv[1:]); sys.exit(9 if 'torch' in sys.modules else c)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    for model, bank, problem in (
        ("msa-hf/my-model", place, f"msa-hf/my-model: no such directory (looked for {tmp_path}/msa-hf/my-model), and"),
        (place / "plian", place, f"{place}/plian: no such directory"),
        (place / "plain", "my-bnak", f"my-bnak: no bank: there is no such directory (looked for {tmp_path}/my-bnak)"),
    ):
        command = [sys.executable, "-c", code, "ask", str(model), str(bank), QUESTION]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"msa-hf: error: {problem}") and done.stderr.count("\n") == 1, done.stderr
        if str(model).startswith("msa-hf"):
            assert "the Hub cannot be reached (http://127.0.0.1:9" in done.stderr


def test_what_is_no_checkpoint_or_bank_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = place / "plain-bank"
    assert "no checkpoint there (no config.json)" in refusal(capsys, "ask", tmp_path, bank, "where")
    (tmp_path / "adapter_config.json").write_text("{}")
    said = refusal(capsys, "ask", tmp_path, bank, "where")
    assert "an adapter of PEFT, whose base its adapter_config.json does not name" in said
    assert f"`python scripts/merge_adapter.py --base BASE --adapter {tmp_path} --out OUT`" in said
    file = tmp_path / "adapter_config.json"
    assert "not a directory, which a bank is" in refusal(capsys, "ask", place / "plain", file, "where")


def test_documents_do_not_command_the_terminal() -> None:
    assert shown("a\x1b[2Jb\x9b1m\n\tc\r") == "a\ufffd[2Jb\ufffd1m\n\tc\ufffd"
    assert snippet("one\x1b\n\n two " + "x" * 200) == "one\ufffd two " + "x" * 88 + "..."


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
    dash = () if kind is Terminal else ("-",)
    command = ("ask", place / "compact", place / "compact-bank", *dash, "--max-new-tokens", 3, "--json")
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


def test_compiling_is_for_accelerators(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["ask", str(place / "compact"), str(place / "compact-bank"), QUESTION, "--compile", "--device", "cpu"])
        == 2
    )
    assert (
        "--compile: makes accelerators faster, but the model computes on cpu; leave it out" in capsys.readouterr().err
    )


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
    assert "none: no bank: there is no such directory" in refusal(capsys, "ask", plain[0], tmp_path / "none", QUESTION)
    assert "choose one of them" in refusal(capsys, "ask", *plain, QUESTION, "--stream", "--json")
    assert "leave the others out" in refusal(capsys, "ask", *plain, QUESTION, "-")
    assert "question is empty" in refusal(capsys, "ask", *plain, "")
    assert "not empty" in refusal(capsys, "ask", place / "compact", place / "compact-bank", " ")
    assert "at least 1" in refusal(capsys, "ask", *plain, QUESTION, "--max-new-tokens", "0")
    assert "invalid choice: 'best'" in refusal(capsys, "ask", *plain, QUESTION, "--select", "best")
    assert "--select hybrid puts together" in refusal(capsys, "ask", *plain, QUESTION, "--fusion", "reciprocal")
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
