"""`msa-hf inspect`: what a bank holds, and whether it is as it was written."""

from pathlib import Path

import pytest
from commands import TEXTS, records, refusal

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.cli import main


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
