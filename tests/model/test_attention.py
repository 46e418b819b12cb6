"""Attention over a context and own tokens, against softmax attention written out head by head in float64."""

import itertools
from typing import Any

import pytest
import torch
from reference import NEVER, naive_attention
from torch import Tensor

from msa_hf.model import context_attention_msa
from msa_hf.model.attention_msa import ScoreBias
from msa_hf.model.cache_msa import MemoryContext
from msa_hf.model.context_attention_msa import context_attention, fused_context_attention

HEADS = 4
DIM = 6
NO_GPU = not torch.cuda.is_available()
VALID = [[True, True, False, True], [False, False, False, False], [True, True, True, True]]


def states(groups: int, length: int, seen: int, rows: int, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """Random arguments of `context_attention`; contexts of 0, some and all rows, NaN-free but large where not valid."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    valid = torch.tensor(VALID)[:batch, :rows] if rows <= 4 else torch.rand(batch, rows, generator=generator) < 0.7
    keys, values = rand(batch, groups, rows, DIM), rand(batch, groups, rows, DIM)
    absent = ~valid[:, None, :, None]
    context = MemoryContext(keys.masked_fill(absent, 50.0), values.masked_fill(absent, 1e4), valid, prefix_length=0)
    return {
        "query": rand(batch, HEADS, length, DIM),
        "key": rand(batch, groups, seen, DIM),
        "value": rand(batch, groups, seen, DIM),
        "attention_mask": None,
        "context": context,
    }


def padded_causal(batch: int, length: int, seen: int) -> Tensor:
    """[B, 1, T, S] bool: causal to the end; sample b is left-padded by b tokens, which see only themselves."""
    visible = torch.ones(batch, 1, length, seen, dtype=torch.bool).tril(seen - length)
    for sample in range(batch):
        visible[sample, ..., : min(sample, seen - 1)] = False
    own = torch.eye(seen, dtype=torch.bool)[-length:]
    return visible | own


def expected(inputs: dict[str, Any], **options: Any) -> Tensor:
    """[B, T, H, D] float64."""
    query, context, mask = inputs["query"], inputs["context"], inputs["attention_mask"]
    length, seen = query.shape[2], inputs["key"].shape[2]
    scaling = options.pop("scaling", None) or DIM**-0.5
    outputs = []
    for sample in range(query.shape[0]):
        if mask is None:
            own = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
        else:
            own = mask[sample if mask.shape[0] > 1 else 0, 0]
        own = torch.where(own, 0.0, NEVER) if own.dtype == torch.bool else own
        valid = context.row_mask[sample]
        bias = torch.zeros(valid.shape) if context.bias is None else context.bias[sample]
        rows = torch.where(valid, bias, NEVER).expand(length, -1)
        outputs.append(
            naive_attention(
                query[sample],
                torch.cat([context.keys[sample], inputs["key"][sample]], 1),
                torch.cat([context.values[sample], inputs["value"][sample]], 1),
                torch.cat([rows, own], 1),
                scaling,
                **options,
            )
        )
    return torch.stack(outputs).transpose(1, 2)


def check(inputs: dict[str, Any], **options: Any) -> None:
    wanted = expected(inputs, **options)
    for attention in (context_attention, fused_context_attention):
        found = attention(**inputs, **options)
        assert found.is_contiguous() and found.dtype == inputs["value"].dtype
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=["one tile", "row by row", "two rows"])
def tiles(request, monkeypatch) -> None:
    """Tiles of all query rows, of one, and of two."""
    size = {"one tile": 1 << 26, "row by row": 1, "two rows": 3 * HEADS * (4 + 7) * 2}[request.param]
    monkeypatch.setattr(context_attention_msa, "LOGIT_ELEMENTS", size)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "bool", "additive", "shared"])
def test_masks_and_groups(groups, mask, tiles) -> None:
    """Any mask form, any sharing of key/value heads, ragged contexts (one of them empty), in any tiling."""
    for length, seen in ((7, 7), (1, 7), (3, 7), (1, 1)):
        inputs = states(groups, length, seen, rows=4)
        if mask != "none":
            visible = padded_causal(3, length, seen)[: 1 if mask == "shared" else 3]
            smallest = torch.finfo(torch.float32).min
            inputs["attention_mask"] = torch.where(visible, 0.0, smallest) if mask == "additive" else visible
        check(inputs)


@pytest.mark.parametrize("softcap, sinks, scaling", [*itertools.product([None, 0.7], [False, True], [None, 0.9])])
def test_softcap_sinks_and_scaling(softcap, sinks, scaling, tiles) -> None:
    """Softcapped logits, sinks in the denominator and a scaling of the model's own, alone and together."""
    extra = torch.tensor([-1.0, 0.0, 2.0, 0.5]) if sinks else None
    for length, seen in ((7, 7), (1, 7)):
        inputs = states(2, length, seen, rows=4, seed=1)
        inputs["attention_mask"] = padded_causal(3, length, seen)
        check(inputs, softcap=softcap, sinks=extra, scaling=scaling)


def test_bias_of_rows(tiles) -> None:
    """A bias is added after the softcap, per sample and row; rows that are not there stay hidden whatever it is."""
    inputs = states(2, 7, 7, rows=4, seed=2)
    context = inputs["context"]
    bias = torch.randn(3, 4).masked_fill(~context.row_mask, 1e6)
    inputs["context"] = MemoryContext(context.keys, context.values, context.row_mask, 0, bias)
    check(inputs)
    check(inputs, softcap=0.7)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_any_number_of_rows(rows, batch, tiles) -> None:
    """No rows at all, one, and many more than own tokens."""
    check(states(2, 5, 5, rows, batch))
    check(states(2, 1, 5, rows, batch))


@pytest.mark.parametrize("attention", [context_attention, fused_context_attention])
def test_gradients(attention, tiles) -> None:
    """Gradients of queries, keys, values, rows and bias are those of the attention written out."""
    inputs = states(2, 3, 4, rows=4, seed=3)
    context = inputs["context"]
    bias = torch.randn(3, 4)
    inputs["context"] = MemoryContext(context.keys, context.values, context.row_mask, 0, bias)
    leaves = [inputs["query"], inputs["key"], inputs["value"], context.keys, context.values, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    found = attention(**inputs)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), leaves)

    share = HEADS // 2
    key, value = (
        torch.cat(pair, 2).repeat_interleave(share, 1)
        for pair in ((context.keys, inputs["key"]), (context.values, inputs["value"]))
    )
    hidden = torch.where(context.row_mask, bias, NEVER)[:, None, None].expand(3, 1, 3, 4)
    causal = torch.where(torch.ones(3, 4, dtype=torch.bool).tril(1), 0.0, NEVER).expand(3, 1, 3, 4)
    logits = inputs["query"] @ key.transpose(-1, -2) * DIM**-0.5 + torch.cat([hidden, causal], -1)
    plain = (logits.softmax(-1) @ value).transpose(1, 2)
    theirs = torch.autograd.grad((plain * weights).sum(), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_dropout_keeps_the_mean() -> None:
    """Dropout acts on the weights: outputs vary, and their mean over many draws is the output without it."""
    torch.manual_seed(0)
    inputs = states(2, 3, 3, rows=4, seed=4)
    inputs["context"].values.masked_fill_(~inputs["context"].row_mask[:, None, :, None], 0.0)
    plain = context_attention(**inputs)
    draws = torch.stack([context_attention(**inputs, dropout=0.2) for _ in range(1500)])
    assert (draws[0] != plain).any()
    error = (draws.mean(0) - plain).abs() / (draws.std(0) / 1500**0.5 + 1e-6)
    assert error.max() < 6


def test_bfloat16_is_as_good_as_pytorch() -> None:
    """In bfloat16 the error against float64 stays within a small multiple of that of PyTorch's own attention."""
    inputs = states(4, 5, 5, rows=33, batch=2, seed=5)
    context = inputs["context"]
    everything = torch.ones_like(context.row_mask)
    keys, values = torch.randn_like(context.keys).bfloat16(), torch.randn_like(context.values).bfloat16()
    low = {name: inputs[name].bfloat16() for name in ("query", "key", "value")}
    low |= {"attention_mask": None, "context": MemoryContext(keys, values, everything, 0)}
    exact = expected(low)
    visible = torch.cat([torch.ones(5, 33, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).tril()], 1)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        low["query"], torch.cat([keys, low["key"]], 2), torch.cat([values, low["value"]], 2), visible
    )
    found = context_attention(**low)
    assert found.dtype == torch.bfloat16
    allowed = 3 * (torchs.transpose(1, 2).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA device")])],
)
@pytest.mark.parametrize("dim", [6, 64, 128])
def test_fused_kernels_keep_the_digits_of_a_bias(dim, device) -> None:
    """Without a mask the bias travels in bfloat16 beside the queries; outputs and gradients are as good as with a bias
    in float32, for sizes of heads that kernels like and that they do not. Keys are small, so that the bias decides."""
    generator = torch.Generator().manual_seed(6)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    valid = torch.rand(2, 40, generator=generator) < 0.7
    bias = -30 * torch.rand(2, 40, generator=generator)
    exact = [rand(2, 4, 9, dim), rand(2, 2, 9, dim), rand(2, 2, 9, dim), rand(2, 2, 40, dim), rand(2, 2, 40, dim), bias]
    exact[1:4:2] = [0.01 * exact[1], 0.01 * exact[3]]
    weights = rand(2, 9, 4, dim)

    def run(attention: Any, dtype: torch.dtype, where: str) -> list[Tensor]:
        leaves = [leaf.bfloat16().to(where, dtype) for leaf in exact[:5]] + [bias.to(where)]
        query, key, value, keys, values, added = [leaf.requires_grad_() for leaf in leaves]
        context = MemoryContext(keys, values, valid.to(where), 0, added)
        found = attention(query, key, value, None, context)
        return [found.detach(), *torch.autograd.grad((found * weights.to(where, dtype)).sum(), leaves)]

    wanted = run(context_attention, torch.float32, "cpu")
    plain, fused = (
        run(attention, torch.bfloat16, device) for attention in (context_attention, fused_context_attention)
    )
    for right, theirs, ours in zip(wanted, plain, fused, strict=True):
        allowed = 3 * (theirs.cpu().float() - right).abs().max()
        assert (ours.cpu().float() - right).abs().max() <= allowed


def test_score_bias() -> None:
    """`beta * (s_i - max_j s_j) / tau` over the chosen documents; 0 for the best and for those that are not there."""
    module = ScoreBias(temperature=0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
    scores = torch.tensor([[0.4, 0.9, 0.1], [5.0, 0.2, 0.3], [1.0, 2.0, 3.0]])
    chosen = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    expected = torch.tensor([[-3.0, 0.0, -4.8], [0.0, -0.6, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(module(scores, chosen).detach(), expected)
