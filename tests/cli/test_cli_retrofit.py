"""`msa-hf retrofit`: every option reaches the model, and what cannot be is refused."""

import json
from pathlib import Path

import pytest
import torch
from commands import QUESTION, loaded, refusal, tokenizer_of_words
from families import base_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.cli import main


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
