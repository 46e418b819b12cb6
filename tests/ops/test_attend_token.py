"""`attend_token` on every backend, against the definition in float64."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from battery import FLOATING, around, places, poisoned_memory, surrounded, takes
from setups import batch_of, setup, tokens
from torch import Tensor
from transformers import CompileConfig

from msa_hf.model.cache_msa import MemoryContext
from msa_hf.model.context_attention_msa import context_attention
from msa_hf.ops import adapters, attend_token, dispatch

PLACES = places("attend_token")
EDGES = (16, 32, 64, 128, 256, 600)


@dataclass
class Case:
    """One call on the CPU."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    context_keys: Tensor
    context_values: Tensor
    row_mask: Tensor
    bias: Tensor | None
    scaling: float

    def run(self, place: tuple[str, str], strided: bool) -> Tensor:
        backend, device = place

        def there(item: Tensor | None, rows: bool = False) -> Any:
            if item is None:
                return None
            if not rows or not strided:
                return surrounded(item, device)
            # As a cache hands them out: samples, groups and rows in another order.
            return surrounded(item.transpose(1, 2).contiguous(), device).transpose(1, 2)

        with poisoned_memory():
            return attend_token(
                there(self.query),
                there(self.keys, rows=True),
                there(self.values, rows=True),
                there(self.mask),
                there(self.context_keys, rows=True),
                there(self.context_values, rows=True),
                there(self.row_mask),
                there(self.bias),
                self.scaling,
                backend=backend,
            ).cpu()

    def expected(self) -> Tensor:
        """[B, H, D] float64, sample by sample and head by head."""
        samples, heads, dim = self.query.shape
        shared_by = heads // self.keys.shape[1]
        result = torch.zeros(samples, heads, dim, dtype=torch.float64)
        for sample in range(samples):
            own = torch.ones(self.keys.shape[2], dtype=torch.bool)
            if self.mask is not None:
                own = self.mask[sample % len(self.mask)]
            there = self.row_mask[sample]
            for head in range(heads):
                group = head // shared_by
                keys = torch.cat([self.context_keys[sample, group, there], self.keys[sample, group, own]]).double()
                values = torch.cat([self.context_values[sample, group, there], self.values[sample, group, own]])
                logits = keys @ self.query[sample, head].double() * self.scaling
                if self.bias is not None:
                    logits[: int(there.sum())] += self.bias[sample, there].double()
                result[sample, head] = logits.softmax(0) @ values.double()
        return result


def random_case(pick: random.Random, dtype: torch.dtype) -> Case:
    samples, groups, shared_by = pick.choice((1, 1, 2, 5)), pick.choice((1, 2, 3, 8)), pick.choice((1, 2, 4, 7, 17))
    dim = pick.choice((8, 16, 40, 64, 96, 128, 256))
    rows, own = around(EDGES, pick), around(EDGES, pick)
    if pick.random() < 0.1:
        rows = 0

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    mask = None
    if pick.random() < 0.7:
        mask = torch.rand(pick.choice((1, samples)), own) < 0.6
        mask[:, pick.randrange(own)] = True
    return Case(
        states(samples, groups * shared_by, dim),
        states(samples, groups, own, dim),
        states(samples, groups, own, dim),
        mask,
        states(samples, groups, rows, dim),
        states(samples, groups, rows, dim),
        torch.rand(samples, rows) < pick.choice((0.0, 0.5, 1.0)),
        pick.choice((None, 3 * torch.randn(samples, rows))),
        pick.choice((dim**-0.5, 0.3)),
    )


def features_of(case: Case) -> dict[str, Any]:
    names = ("query", "keys", "values", "context_keys", "context_values")
    shared_by = case.query.shape[1] // case.keys.shape[1]
    return {**{name: getattr(case, name).dtype for name in names}, "dim": case.query.shape[2], "shared_by": shared_by}


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("place", PLACES)
def test_random_calls(place: tuple[str, str], dtype: torch.dtype) -> None:
    """Sizes around the edges of tiles and parts, rows and tokens that are hidden, strides of a cache."""
    for seed in range(8 if place[1] == "cpu" else 24):
        pick = random.Random(seed)
        torch.manual_seed(seed)
        case = random_case(pick, dtype)
        if not takes(place, "attend_token", **features_of(case)):
            continue
        found = case.run(place, strided=pick.random() < 0.5)
        exact = case.expected()
        assert found.dtype == dtype and found.shape == exact.shape
        # A sum of values weighted by what adds up to 1. Logits are summed in float32: a weight is off by their error.
        wide = float(case.query.float().norm(dim=-1).max() * case.keys.float().norm(dim=-1).max()) * case.scaling
        tolerance = 4 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * (wide + 10)
        torch.testing.assert_close(found.double(), exact, atol=tolerance * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_many_rows_of_a_single_head(place: tuple[str, str]) -> None:
    """As many parts as there are, and several tiles in each."""
    torch.manual_seed(0)
    rows = 40_000 if place[1] == "cuda" else 5000
    case = Case(
        torch.randn(1, 1, 64),
        *torch.randn(2, 1, 1, 300, 64),
        None,
        *torch.randn(2, 1, 1, rows, 64),
        torch.rand(1, rows) < 0.9,
        None,
        0.125,
    )
    torch.testing.assert_close(case.run(place, False).double(), case.expected(), atol=4e-6, rtol=0)


@pytest.mark.parametrize("place", PLACES)
def test_a_sample_that_sees_nothing_is_finite(place: tuple[str, str]) -> None:
    case = Case(
        torch.randn(2, 4, 16),
        *torch.randn(2, 2, 2, 20, 16),
        torch.tensor([[False] * 20, [True] * 20]),
        *torch.randn(2, 2, 2, 70, 16),
        torch.zeros(2, 70, dtype=torch.bool),
        None,
        0.25,
    )
    found = case.run(place, False)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1].double(), case.expected()[1], atol=4e-6, rtol=0)


def test_old_gpus_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for none below 8.0."""
    features = dict.fromkeys(("query", "keys", "values", "context_keys", "context_values"), torch.float16)
    limit, sizes = dispatch.OPERATIONS["attend_token"].limits["triton"], {"dim": 64, "shared_by": 4}
    for capability, taken in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert (limit(device="cuda", **features, **sizes) is None) == taken
        assert limit(device="cpu", **features, **sizes) is None


def test_contradictions_are_refused() -> None:
    states, row_mask = torch.zeros(1, 2, 3, 8), torch.ones(1, 3, dtype=torch.bool)
    good: list[Any] = [torch.zeros(1, 4, 8), states, states, None, states, states, row_mask, None, 1.0]
    attend_token(*good)
    for place, wrong, words in (
        (0, torch.zeros(1, 3, 8), "cannot share"),
        (2, states[:, :, :2], "`values`"),
        (3, torch.ones(2, 3, dtype=torch.bool), "`mask`"),
        (3, torch.ones(1, 3), "`mask`"),
        (5, states[..., :4], "`context_values`"),
        (6, row_mask[:, :2], "`row_mask`"),
        (7, torch.zeros(1, 2), "`bias`"),
        (1, states.long(), "`keys` must be floating"),
    ):
        with pytest.raises(ValueError, match=words):
            attend_token(*good[:place], wrong, *good[place + 1 :])
    empty = torch.zeros(1, 2, 0, 8)
    with pytest.raises(ValueError, match="nothing to attend to"):
        attend_token(good[0], empty, empty, None, empty, empty, row_mask[:, :0], None, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_use_it_on_a_gpu() -> None:
    """The seam of the model gives what PyTorch gives, where it takes a call."""
    torch.manual_seed(0)
    given: Any = {"scaling": None, "softcap": None, "sinks": None, "dropout": 0.0}
    query = torch.randn(2, 8, 1, 64, device="cuda")
    key, value = torch.randn(2, 2, 4, 50, 64, device="cuda")
    context = MemoryContext(
        *torch.randn(2, 2, 4, 90, 64, device="cuda"), torch.rand(2, 90, device="cuda") < 0.5, prefix_length=0
    )
    mask = torch.rand(2, 1, 1, 50, device="cuda") < 0.9
    found = adapters.attend(query, key, value, mask, context, **given)
    torch.testing.assert_close(found, context_attention(query, key, value, mask, context, **given))
    found = adapters.attend(query, key, value, mask, None, **given)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert adapters.attend(query, key, value, mask, context, **{**given, "softcap": 5.0}) is None


def test_a_model_with_it_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and as it is, with a growing cache and with a static one, over two banks; and no gradient is lost."""
    made = setup("qwen3", "sdpa", base={"num_hidden_layers": 3}, memory_layers=[1, 2], score_bias=True)
    other = made.model.encode_documents(tokens(70, 9, 130, 4, 66, seed=5), show_progress=False)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static", "compile_config": config}]
    calls: list[torch.Size] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return attend_token(*args, **kwargs)

    questions: list[dict[str, Any]] = [
        {**batch_of(tokens(length, seed=length), tokens(length - 2, seed=1)), "memory": bank, "do_sample": False}
        | {"max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
        for bank, length in ((made.bank, 9), (other, 5))
    ]
    answers = [made.model.generate(**question) for question in questions]
    monkeypatch.setattr(adapters, "TOKEN_DEVICES", {"cpu"})
    monkeypatch.setattr(adapters, "attend_token", counted)
    torch._dynamo.reset()
    for way in ways:
        calls.clear()
        for question, expected in zip(questions, answers, strict=True):
            found = made.model.generate(**question, **way)
            assert torch.equal(found.sequences, expected.sequences)
            for ours, theirs in zip(found.logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert calls


def test_what_it_leaves_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, masks that add, logits of other kinds; and all that lies on a CPU."""
    query, states = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8)
    context = MemoryContext(states, states, torch.ones(1, 6, dtype=torch.bool), prefix_length=0)
    options: Any = {"scaling": None, "softcap": None, "sinks": None, "dropout": 0.0}
    assert adapters.attend(query, states, states, None, context, **options) is None
    monkeypatch.setattr(adapters, "TOKEN_DEVICES", {"cpu"})
    assert adapters.attend(query, states, states, None, context, **options) is not None
    for name, value in (("softcap", 5.0), ("sinks", torch.zeros(4)), ("dropout", 0.1)):
        assert adapters.attend(query, states, states, None, context, **{**options, name: value}) is None
    assert adapters.attend(query, states, states, torch.zeros(1, 1, 1, 6), context, **options) is None
    assert adapters.attend(query, states, states.double(), None, context, **options) is None
    assert adapters.attend(query, states, states[..., :4], None, None, **options) is None  # narrower values
    each_head = torch.ones(1, 4, 1, 6, dtype=torch.bool)
    assert adapters.attend(query, states, states, each_head, None, **options) is None
    assert adapters.attend(query, states, states, each_head[:, :1], None, **options) is not None
    assert adapters.attend(query.clone().requires_grad_(), states, states, None, context, **options) is None
