"""Models whose weights accelerate keeps elsewhere: they encode, attend and lose as whole ones do."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from setups import batch_of, setup, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*parameters lie on the meta device")

CPU = torch.device("cpu")
PLACES = {
    "model.embed_tokens": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    **{f"model.layers.{layer}": ("disk", "cpu")[layer % 2] for layer in range(4)},
}
OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "cpu": lambda model: cpu_offload(model, execution_device=CPU),
    "disk": lambda model: disk_offload(model, tempfile.mkdtemp(), execution_device=CPU),
    "mixed": lambda model: dispatch_model(model, PLACES, main_device="cpu", offload_dir=tempfile.mkdtemp()),
}


@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_model_encodes_and_attends(how) -> None:
    """The embedding offloaded too: the same bank and logits to the bit, and afterwards the weights are away again."""
    made = setup(score_bias=True)
    whole, offloaded = copy.deepcopy(made.model), OFFLOADS[how](made.model)
    away = {name for name, weight in offloaded.named_parameters() if weight.is_meta}
    assert "model.embed_tokens.weight" in away
    bank = offloaded.encode_documents(made.documents, show_progress=False)
    assert bank.device == CPU
    for layer in whole.config.memory_layers:
        assert torch.equal(bank.layer(layer).pooled_kv, made.bank.layer(layer).pooled_kv)
        assert torch.equal(bank.layer(layer).routing_keys, made.bank.layer(layer).routing_keys)
    batch = batch_of(tokens(6, 3, 9, seed=5))
    with torch.no_grad():
        assert torch.equal(offloaded(**batch, memory=bank).logits, whole(**batch, memory=made.bank).logits)
        pool = {**batch, "documents": made.documents, "positive_docs": torch.zeros(3, 1, dtype=torch.long)}
        assert torch.equal(offloaded(**pool).loss, whole(**pool).loss)
    assert {name for name, weight in offloaded.named_parameters() if weight.is_meta} == away
