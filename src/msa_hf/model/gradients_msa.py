"""Ties in the graph of a training step, for what spreads training over processes and looks at parts of the graph alone.

Routers are part of every layer with a memory, but not of every loss: without documents, without positives or beside
`aux_layers` nothing asks for them. DistributedDataParallel waits in each step for the gradient of every parameter that
is trained, so `join_routers` makes it zero where nothing asks for one.

What a pass records leaves a layer beside its output. FSDP gathers a layer's weights when the backward comes to its
output, so `tie` lets the backward come there before it comes to what was recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROUTER_MODULES = ("router_q_proj", "router_k_proj", "router_score_bias")


class _Join(torch.autograd.Function):
    """The input as it is; in the backward its gradient as it is, and zeros for the weights."""

    @staticmethod
    def forward(states: Tensor, *weights: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Not among the saved tensors, which may be moved to the host or copied: only shapes are looked at.
        ctx.weights = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(weight) for weight in ctx.weights))


class _Tie(torch.autograd.Function):
    """The tensors as they are; in the backward no gradient for the anchor, which is computed first nevertheless."""

    @staticmethod
    def forward(anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *gradients)


def tie(anchor: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """`tensors`, of the same run as `anchor`, its output: a backward that comes to them comes to the output first.

    Themselves where no gradient is computed.
    """
    if not torch.is_grad_enabled() or not anchor.requires_grad:
        return tensors
    return list(_Tie.apply(anchor, *tensors))


def join_routers(module: nn.Module, states: Tensor) -> Tensor:
    """`states` inside a memory layer's attention, through which the weights of its routers get a gradient.

    Bit for bit the same, and so are gradients, where the states have no other reader: queries have none, while hidden
    states may be read by what stands beside the attention, and sums of several gradients depend on their order. Itself
    where no gradient is computed or the routers are not trained.
    """
    if not torch.is_grad_enabled():
        return states
    routers = [module.get_submodule(name) for name in ROUTER_MODULES if hasattr(module, name)]
    weights = [weight for router in routers for weight in router.parameters() if weight.requires_grad]
    return _Join.apply(states, *weights) if weights else states
