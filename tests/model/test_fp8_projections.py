"""Documents encoded with projections of 8-bit floats: near to those of the model's dtype, by what such floats lose."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_compiled_layers import graphs, model_with_layers
from test_encoding import encode, random_documents
from torch import nn

from msa_hf.model import fp8_projections_msa
from msa_hf.model.fp8_projections_msa import Fp8Linear, Fp8Projections, to_fp8

__all__ = ["graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection(dtype: torch.dtype, bias: bool) -> None:
    """Against the product of the rounded numbers, and the exact one; rows and outputs of very different sizes."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias, dtype=dtype)
    linear.weight.data *= torch.logspace(-6, 6, 32)[:, None]
    states = torch.randn(3, 5, 48, dtype=dtype) * torch.logspace(-5, 3, 15, dtype=dtype).view(3, 5, 1)
    states[0, 0] = 0
    found = Fp8Linear(linear).product(states)
    assert found.dtype == dtype and found.shape == (3, 5, 32)
    (rows, scales), (weight, outputs) = to_fp8(states.flatten(0, 1)), to_fp8(linear.weight)
    rounded = (rows.double() * scales) @ (weight.double() * outputs).T
    exact = states.double().flatten(0, 1) @ linear.weight.double().T
    offset = 0 if linear.bias is None else linear.bias.double()
    product = (found.double() - offset).view(15, 32)
    if not bias:
        torch.testing.assert_close(product, rounded, atol=0, rtol=2 * torch.finfo(torch.bfloat16).eps)
    # Half a unit of three bits of each factor, a little more where both are rounded, or subnormal.
    assert (
        (rounded - exact).abs() <= 0.15 * (states.double().flatten(0, 1).abs() @ linear.weight.double().abs().T)
    ).all()
    assert torch.equal(found[0, 0].double(), torch.zeros(32).double() + offset)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bank(compiled: bool, graphs: list[Any]) -> None:
    """Keys and values are near, the model is afterwards as it was, and a further window makes no graphs anew."""
    model = model_with_layers(3)
    documents = random_documents([5, 9, 30, 5, 9, 30], seed=1)
    before = dict(model.named_modules())
    plain = encode(documents, model=model, batch_tokens=64)
    narrow = functools.partial(encode, model=model, batch_tokens=64, fp8_projections=True, compile_layers=compiled)
    found = narrow(documents)
    assert dict(model.named_modules()) == before
    for layer, ours in found.layers.items():
        theirs = plain.layers[layer]
        for name in ("routing_keys", "pooled_kv"):
            one, other = getattr(ours, name), getattr(theirs, name)
            apart = float((one - other).norm() / other.norm())
            assert 1e-4 < apart < 0.15, (layer, name, apart)
    known = len(graphs)
    narrow(random_documents([7, 12, 31, 6, 9, 31], seed=2))
    assert len(graphs) == known
    question = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(model(question, memory=found).logits).all()


def test_what_stays_as_it_is() -> None:
    """Routers, layers behind the last memory, odd sizes; all of it again after an error."""
    model = model_with_layers(3)
    model.model.layers[0].mlp.up_proj = nn.Linear(model.config.hidden_size, 40)
    with pytest.raises(RuntimeError, match="stop"), Fp8Projections(model).lent():
        narrow = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
        assert "model.layers.0.mlp.down_proj" in narrow and "model.layers.0.mlp.up_proj" not in narrow
        assert "lm_head" not in narrow and not any("router_" in name for name in narrow)
        raise RuntimeError("stop")
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_a_gpu_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_projections_msa, "input_device", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"8\.9 or newer\), but A100 has 8\.0\. Leave it out"):
        encode([[5, 6]], model=model_with_layers(3), fp8_projections=True)


def in_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_other_threads_ask_meanwhile(compiled: bool, graphs: list[Any]) -> None:
    """It is answered by the model's own projections, to the bit; this thread has the others."""
    model, question = model_with_layers(3), torch.tensor([[5, 6, 7]])
    expected = model(question).logits
    with model.encoding_layers(compiled, fp8_projections=True).lent():
        assert torch.equal(in_thread(lambda: model(question).logits), expected)
        if not compiled:
            assert not torch.equal(model(question).logits, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_threads_that_encode(compiled: bool, graphs: list[Any]) -> None:
    """The first one ends while the second still encodes, which keeps its projections."""
    model, rows = model_with_layers(3), random_documents([30] * 4, seed=1)
    before = dict(model.named_modules())
    narrow = functools.partial(encode, model=model, fp8_projections=True, compile_layers=compiled)
    expected = narrow(rows)
    first, second = (Fp8Projections(model).lent() for _ in range(2))
    with ThreadPoolExecutor(1) as other:
        other.submit(first.__enter__).result()
        with second:
            other.submit(first.__exit__, None, None, None).result()
            assert any(isinstance(module, Fp8Linear) for module in model.modules())
            found = narrow(rows)
    for layer, item in expected.layers.items():
        assert torch.equal(found.layers[layer].pooled_kv, item.pooled_kv)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_are_rounded_once_and_lent_to_windows(
    compiled: bool, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many windows there are; who makes the documents between them finds the model as it was, to the bit, and
    so does who gives up on them."""
    model, made = model_with_layers(3), []
    whole = Fp8Linear.__init__

    def init(self: Fp8Linear, linear: nn.Linear) -> None:
        made.append(linear)
        whole(self, linear)

    monkeypatch.setattr(Fp8Linear, "__init__", init)
    question, before = torch.tensor([[5, 6, 7]]), dict(model.named_modules())
    expected = model(question).logits

    def documents(stop: int) -> Any:
        for number, ids in enumerate(random_documents([30] * 20, seed=1)):
            assert torch.equal(model(question).logits, expected) and dict(model.named_modules()) == before
            if number == stop:
                raise RuntimeError("stop")
            yield ids

    narrow = functools.partial(encode, model=model, batch_tokens=32, fp8_projections=True, compile_layers=compiled)
    assert len(narrow(documents(-1))) == 20  # windows of 1, 2, 4, 8 and 5 documents
    assert len(made) == len(set(made)) == 21
    with pytest.raises(RuntimeError, match="stop"):
        narrow(documents(9))
    assert dict(model.named_modules()) == before
    assert all(module._compiled_call_impl is None for module in model.modules())
