"""Low-rank updates merged into the weights: what they compute, their gradients, and what they refuse."""

import pytest
import torch
from families import base_model
from torch import nn

from msa_hf import MSAForCausalLM
from msa_hf.training import weights as training_weights
from msa_hf.training.weights import TrainedWeights, add_gradients, linear_ranks


@pytest.fixture
def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4))


def test_gradients_are_those_of_updates_computed_beside_the_weight(linear: nn.Module) -> None:
    weights = TrainedWeights(linear, {"0": 2}, whole=["1.bias"], alpha_per_rank=1.5)
    item = weights.low_rank["0"]
    item.up.data.normal_()
    weights.write()
    x = torch.randn(7, 6)
    linear(x).square().sum().backward()
    weights.take_gradients()

    up, down = item.up.detach().requires_grad_(), item.down.detach().requires_grad_()
    bias = linear[1].bias.detach().requires_grad_()
    hidden = x @ item.base.T + 1.5 * (x @ down.T) @ up.T
    (hidden @ linear[1].weight.T + bias).square().sum().backward()
    torch.testing.assert_close(item.up.grad, up.grad)
    torch.testing.assert_close(item.down.grad, down.grad)
    torch.testing.assert_close(weights.whole_parameters()[0].grad, bias.grad)
    assert linear[0].weight.grad is None and not linear[1].weight.requires_grad


def test_weights_of_one_shape_are_written_and_left_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_weights, "HELD", 2 * 5 * 5)  # two of these five weights at a time
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(4)), nn.Linear(5, 5, bias=False).double())
    weights = TrainedWeights(model, {"0": 2, "1": 2, "2": 3, "3": 2, "4": 2})
    for item in weights.low_rank.values():
        item.up.data.normal_()
    weights.write()
    for item in weights.low_rank.values():
        written = item.base + item.scale * item.up @ item.down
        torch.testing.assert_close(item.weight, written.to(item.weight.dtype))
    given = {}
    for name, item in weights.low_rank.items():
        if name not in ("1", "2"):  # which the loss does not reach
            given[name] = item.weight.grad = torch.randn_like(item.weight)
    weights.take_gradients()
    for name, item in weights.low_rank.items():
        gradient = given.get(name, torch.zeros(5, 5)).float()
        torch.testing.assert_close(item.up.grad, item.scale * gradient @ item.down.T)
        torch.testing.assert_close(item.down.grad, item.scale * item.up.T @ gradient)
        assert item.weight.grad is None


def test_nothing_changes_at_first_and_a_step_changes_the_model(linear: nn.Module) -> None:
    before = linear[0].weight.detach().clone()
    weights = TrainedWeights(linear.to(torch.bfloat16), {"0": 2})
    weights.write()
    torch.testing.assert_close(linear[0].weight.float(), before, atol=2e-3, rtol=2e-2)
    state = {name: value.clone() for name, value in weights.state_dict().items()}
    linear(torch.randn(3, 6, dtype=torch.bfloat16)).sum().backward()
    weights.take_gradients()
    torch.optim.SGD(weights.low_rank_parameters(), lr=1.0).step()
    written = linear[0].weight.detach().clone()
    weights.write()
    assert not torch.equal(linear[0].weight, written)
    weights.load_state_dict(state)
    torch.testing.assert_close(linear[0].weight, written)


def test_layers_get_their_ranks_and_routers_none() -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[2])
    ranks = linear_ranks(model, {0: 4, 2: 3})
    assert ranks["model.layers.0.mlp.up_proj"] == 4 and ranks["model.layers.2.self_attn.q_proj"] == 3
    assert not any(".1." in name or "router" in name for name in ranks) and "lm_head" not in ranks
    TrainedWeights(model, ranks, [name for name, _ in model.named_parameters() if "router_" in name])


def test_what_is_not_there_is_refused(linear: nn.Module) -> None:
    with pytest.raises(ValueError, match="'7' is no linear layer"):
        TrainedWeights(linear, {"7": 2})
    with pytest.raises(ValueError, match="rank of '0' must be at least 1"):
        TrainedWeights(linear, {"0": 0})
    with pytest.raises(ValueError, match=r"'1\.scale' is no parameter"):
        TrainedWeights(linear, {}, ["1.scale"])
    with pytest.raises(ValueError, match="differ"):
        TrainedWeights(linear, {"0": 1}).load_state_dict({})


def test_gradients_are_added_as_a_backward_adds_them(linear: nn.Module) -> None:
    other = nn.Parameter(torch.ones(2))
    linear[1].bias.requires_grad_(False)
    expected = {}
    for way in ("backward", "together"):
        torch.manual_seed(1)
        for number in range(3):
            # The first loss does not reach the second layer.
            outputs = [linear[0](torch.randn(3, 6))] if number == 0 else [linear(torch.randn(3, 6)), linear[0].weight]
            gradients = [torch.randn_like(output) for output in outputs]
            if way == "backward":
                torch.autograd.backward(outputs, gradients)
            else:
                add_gradients([*linear.parameters(), other], outputs, gradients)
        for name, parameter in linear.named_parameters():
            if way == "backward":
                expected[name] = parameter.grad
            elif parameter.grad is None:
                assert expected[name] is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name])
        linear.zero_grad(set_to_none=True)
    assert other.grad is None and expected["1.bias"] is None
    add_gradients(linear.parameters(), [linear(torch.ones(1, 6)).sum()])
    assert linear[0].weight.grad is not None
