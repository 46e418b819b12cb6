"""Recall of quantized routing keys, on a tiny model."""

from typing import Any

import pytest
import torch
from families import base_model

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.evaluation import quantized_recall
from msa_hf.model.attention_msa import OPERATIONS
from msa_hf.model.memory_msa import DenseLayer
from msa_hf.ops import quantize_keys

K, DOCUMENTS = 4, 37


def model_and_bank(**options: Any) -> tuple[Any, MemoryBank]:
    torch.manual_seed(0)
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=4, top_k=K, **options).eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 90, (3 + length,), generator=generator).tolist() for length in range(DOCUMENTS)]
    return model, model.encode_documents(rows, show_progress=False)


def questions() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 90, (24, 7), generator=torch.Generator().manual_seed(2))}


def test_recall_is_the_share_that_rounded_keys_find_too() -> None:
    """Of one layer, against a bank that holds the rounded keys."""
    model, bank = model_and_bank(memory_layers=[1])
    found = quantized_recall(model, bank, questions())
    assert {kind: list(shares) for kind, shares in found.items()} == {
        kind: [K, 2 * K, 4 * K, 8 * K] for kind in ("fp8", "int8", "int4")
    }
    numbers, scales = quantize_keys(bank.layers[1].routing_keys, "fp8")
    layers = {1: DenseLayer(numbers.float() * scales[:, None], bank.layers[1].pooled_kv)}
    rounded = MemoryBank(layers, bank.offsets, bank.prefix, bank.documents, bank.origin)
    with torch.no_grad():
        exact, rough = (model(**questions(), memory=memory).routing[1].documents for memory in (bank, rounded))
    shared = (exact[:, :, None] == rough[:, None]).any(2).float().mean().item()
    assert shared < 1, "the questions must tell the two apart"
    assert found["fp8"][K] == pytest.approx(shared, abs=1.5 / exact.numel())
    assert found["int4"][K] < found["fp8"][K] < found["int8"][K]


def test_the_worst_layer_counts_and_routing_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(OPERATIONS)
    shares = iter([0.9, 0.7, 0.8])
    scripted = lambda *_, **__: {K: next(shares), DOCUMENTS: 1.0}  # noqa: E731
    model, bank = model_and_bank(memory_layers=[0, 1, 2])
    monkeypatch.setattr("msa_hf.evaluation.quantized.recall_of_candidates", scripted)
    assert quantized_recall(model, bank, questions(), ["fp8"]) == {"fp8": {K: 0.7, DOCUMENTS: 1.0}}
    with pytest.raises(StopIteration):
        quantized_recall(model, bank, questions(), ["fp8"])
    assert before == OPERATIONS


def test_a_model_that_scores_in_another_way_is_refused() -> None:
    model, bank = model_and_bank()
    model.config.query_reduction = "mean"
    with pytest.raises(ValueError, match="did not route"):
        quantized_recall(model, bank, questions())
