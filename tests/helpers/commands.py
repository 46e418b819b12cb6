"""Commands on a tiny model with random weights: what they print, and the one line that they refuse with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.cli import main
from msa_hf.generation import COMPACT

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
