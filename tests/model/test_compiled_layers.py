"""Documents are encoded by compiled layers as by plain ones: traced by torch.compile, run without a compiler."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from families import base_model
from test_encoding import CHUNK, VOCABULARY, assert_same_bank, encode, random_documents

from msa_hf import MSAForCausalLM
from msa_hf.model.encoded_batches_msa import EncodingLayers
from msa_hf.training import peft_config


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were made, which run without being compiled to machine code."""
    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return made


def model_with_layers(count: int) -> Any:
    base = base_model("qwen3", vocab_size=VOCABULARY, num_hidden_layers=count, layer_types=None)
    return MSAForCausalLM.from_base(
        base, chunk_size=CHUNK, prefix_token_ids=[3, 4], memory_layers=[1, count - 1]
    ).eval()


def test_lengths_and_layers_share_graphs(graphs: list[Any]) -> None:
    """The bank is that of plain layers; batches of other sizes make no graphs, nor do more layers than torch.compile
    would make graphs of; afterwards the model is as it was."""
    model = model_with_layers(10)
    documents = random_documents([5, 9, 30, 5, 9, 30], seed=1)
    plain = encode(documents, model=model, batch_tokens=64)
    assert not graphs
    assert_same_bank(encode(documents, model=model, batch_tokens=64, compile_layers=True), plain)
    known = len(graphs)
    assert 0 < known < 20
    others = random_documents([*range(2, 60, 7)] * 2, seed=2)
    found = encode(others, model=model, batch_tokens=128, compile_layers=True)
    assert len(graphs) == known
    assert_same_bank(found, encode(others, model=model, batch_tokens=128))
    assert len(graphs) == known
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_with_an_adapter() -> None:
    model = peft.get_peft_model(model_with_layers(3), peft_config(model_with_layers(3), r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    documents = random_documents([9, 9], seed=3)
    plain = encode(documents, model=model)
    assert_same_bank(encode(documents, model=model, compile_layers=True), plain)
    with model.disable_adapter():
        other = encode(documents, model=model)
    layer = next(reversed(plain.layers))
    assert not torch.allclose(other.layers[layer].pooled_kv, plain.layers[layer].pooled_kv, atol=1e-3)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = model_with_layers(3)
    model.get_input_embeddings().weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="Document '1' has NaN"):
        encode([[5, 6], [7]], model=model, compile_layers=True)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_what_another_thread_asks_meanwhile(graphs: list[Any]) -> None:
    """Is answered as ever, prefix and memory included, and compiles nothing; so are plain forwards without a memory."""
    model = model_with_layers(3)
    bank, ids = encode(random_documents([5, 9, 30], seed=1), model=model), torch.tensor([[5, 9, 7, 6]])
    with torch.no_grad():
        expected = model(ids, memory=bank).logits, model(ids).logits
        with EncodingLayers(model, compiled=True).lent(), ThreadPoolExecutor(1) as other:
            found = [other.submit(torch.no_grad()(model), ids, **given).result() for given in ({"memory": bank}, {})]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.logits, theirs)
    assert not graphs
