"""benchmarks/run_check.py: what is right passes, and of what is not the first tensor is named."""

from typing import Any

import pytest
import run_check
import torch
from run_check import runs_are_right
from setups import setup, tokens
from transformers import CompileConfig

from msa_hf.model.dense_layer_msa import DenseLayer


def test_the_first_tensor_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that is asked while a run is compiled gives rows that are not finite in its second layer."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 3, "vocab_size": 2048}, memory_layers=[1, 2])
    banks = [made.bank, made.model.encode_documents(tokens(7, 9, 3, 5, seed=5), show_progress=False)]
    config, said, asked, gather = CompileConfig(mode=None), list[str](), list[int](), DenseLayer.gather
    config._compile_all_devices = True
    monkeypatch.setattr(run_check, "QUESTIONS", (2, 1))
    monkeypatch.setattr(run_check, "TOKENS", 1)

    def spoiled(self: Any, *given: Any) -> Any:
        asked.append(1)
        found = gather(self, *given)
        if len(asked) == 4 + 2:  # two layers, each also uncompiled: the second one of the second question
            found.values[0, 0, 0, 0] = torch.nan
        return found

    monkeypatch.setattr(DenseLayer, "gather", spoiled)
    with torch.no_grad(), pytest.raises(SystemExit):
        runs_are_right(made.model, banks, config, 5, said.append)
    assert said[0].startswith("compiled: question 2, the prompt: values of the context of layer 2: 1 of ")
    assert said[0].endswith("right before: keys of the context of layer 2")
    assert [text.rpartition(": ")[2] for text in said[1:]] == ["right", "right"]
