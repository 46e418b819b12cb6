"""Operations around the product of a single row in a traced graph that go into its launch.

The norm of the row before it, the gate or the sum with a residual behind it; as models of transformers write them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Norm:
    """`weight * (states / sqrt(mean(states ** 2) + epsilon))`, computed in float32.

    Attributes:
        states: what is normed.
        weight: an input of the graph.
        epsilon: is added to the mean square.
        first: the operation that it begins with.
    """

    states: fx.Node
    weight: fx.Node
    epsilon: float
    first: fx.Node


def example_of(node: fx.Node) -> Tensor:
    """The example of a node's value that tracing leaves."""
    found: Tensor = node.meta["example_value"]
    return found


def _called(node: object, *targets: Callable[..., Any] | str) -> tuple[Any, ...] | None:
    """The arguments of a call of one of these functions or methods; None for anything else."""
    if isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets:
        return node.args
    return None


def norm_of(row: fx.Node) -> Norm | None:
    """The norm that a row comes out of; None where it comes out of anything else."""
    scaled = _called(row, operator.mul, torch.mul)
    if scaled is None or len(scaled) != 2:
        return None
    weight, cast = scaled if _called(scaled[1], "to") else scaled[::-1]
    of_cast = _called(cast, "to")
    if of_cast is None or of_cast[1:] != (example_of(row).dtype,) or not isinstance(weight, fx.Node):
        return None
    normed = _called(of_cast[0], operator.mul, torch.mul)
    if normed is None or len(normed) != 2:
        return None
    wide, root = normed
    of_root = _called(root, torch.rsqrt)
    sum_ = None if of_root is None else _called(of_root[0], operator.add, torch.add)
    of_wide = _called(wide, "to", "float")
    if sum_ is None or len(sum_) != 2 or not isinstance(sum_[1], float) or of_wide is None:
        return None
    mean = _called(sum_[0], "mean")
    if mean is None or mean[1:] != (-1,) or sum_[0].kwargs != {"keepdim": True}:
        return None
    square = _called(mean[0], "pow")
    states = of_wide[0]
    if square is None or square != (wide, 2) or not isinstance(states, fx.Node):
        return None
    given, result, factors = example_of(states), example_of(row), example_of(weight)
    fits = (
        weight.op == "placeholder"
        and example_of(wide).dtype == torch.float32
        and given.dtype == result.dtype == factors.dtype
        and given.shape == result.shape
        and factors.shape == result.shape[-1:]
        and given.is_contiguous()
        and factors.is_contiguous()
    )
    return Norm(states, weight, sum_[1], wide) if fits else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def gate_of(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The silu, the other factor and the multiplication of a gate `silu(product) * other`; None for other products."""
    silu = _only_user(product)
    if silu is None or _called(silu, torch.nn.functional.silu) != (product,):
        return None
    times = _only_user(silu)
    pair = None if times is None else _called(times, operator.mul, torch.mul)
    if times is None or pair is None or len(pair) != 2:
        return None
    other = pair[1] if pair[0] is silu else pair[0]
    if not isinstance(other, fx.Node) or other is silu or _only_user(other) is not times:
        return None
    return silu, other, times


def residual_of(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The residual that a product is added to, of its shape, and the sum; None where there is none."""
    total = _only_user(product)
    pair = None if total is None else _called(total, operator.add, torch.add)
    if total is None or pair is None or len(pair) != 2 or total.kwargs:
        return None
    residual = pair[1] if pair[0] is product else pair[0]
    if not isinstance(residual, fx.Node) or residual is product:
        return None
    given, wanted = residual.meta.get("example_value"), example_of(product)
    fits = (
        isinstance(given, Tensor)
        and given.shape == wanted.shape
        and given.dtype == wanted.dtype
        and given.device == wanted.device
        and given.is_contiguous()
    )
    return (residual, total) if fits else None
