"""The README's examples run as they stand, one after the other: the first on the shipped checkpoint, the others on a
small model in place of the named one."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[2] / "README.md"
NAMED = "Qwen/Qwen3-0.6B"
SHIPPED = "model_cards/msa-hf-tiny"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model of 28 layers like the named one, but narrow, with a tokenizer of the README's words."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]", README.read_text())))
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_examples_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) >= 5
    assert SHIPPED in examples[0] and NAMED in examples[1], "the first two name the models"
    monkeypatch.chdir(tmp_path)
    names: dict = {}

    def run(example: str) -> str:
        for name, path in ((SHIPPED, README.parent / SHIPPED), (NAMED, checkpoint)):
            example = example.replace(name, str(path))
        exec(compile(example, "README.md", "exec"), names)
        return capsys.readouterr().out

    printed = run(examples[0])
    assert [printed.count(f"  read [{id}]") for id in (0, 1)] == [1, 1] and "Answer: roses\n" in printed
    for example in examples[1:]:
        run(example)


def test_first_example_has_nine_lines() -> None:
    first = re.search(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert first is not None
    assert len([line for line in first[1].splitlines() if line.strip()]) == 9
