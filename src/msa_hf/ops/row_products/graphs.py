"""Products of single rows in compiled graphs: those with the same row in one launch, at the rate of the memory.

A token of one sample multiplies a row by every matrix of a layer, which is all that its time goes into. Compilers write
a kernel that waits for itself, or call the library of the device once for every matrix.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

LEAST = 2**18  # numbers of a matrix; smaller ones, as of adapters, are not worth a launch
WIDEST = 2**15  # numbers of a row, which the kernel's code is written out for
MOST = 3  # matrices of one launch
# Functions of `operator` that write to what they are given.
IN_PLACE = {
    "setitem",
    "iadd",
    "isub",
    "imul",
    "imatmul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "ilshift",
    "irshift",
    "iand",
    "ior",
    "ixor",
    "iconcat",
}
Product = Callable[[Tensor, list[Tensor]], Tensor]
Compiled = Callable[..., Any]


@functools.cache
def _operation() -> Product:
    from . import triton  # registers the operation

    # A graph names what it calls, for which the definition in Python has no name in some versions of PyTorch.
    operation: Product = getattr(torch.ops, triton.NAMESPACE).row_products.default
    return operation


@dataclass(frozen=True)
class InductorWithRowProducts:
    """A backend of torch.compile, and of `CompileConfig`: Inductor, but for products of single rows on a GPU.

    Takes the mode and the options of Inductor. Graphs with such products have their other products tuned as well,
    unless the options say otherwise; graphs without, as those of prompts, are Inductor's alone.

    Raises:
        ImportError: from torch.compile, where Triton is missing and a graph has such products.
    """

    def __call__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Tensor],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        given = {**({} if mode is None else torch._inductor.list_mode_options(mode)), **(options or {})}
        if any(_is_product(node) for node in graph.graph.nodes):
            replace_products(graph, _operation())
            given = {"coordinate_descent_tuning": True, **given}
        return torch._inductor.compile(graph, list(inputs), options=given)


def replace_products(graph: fx.GraphModule, product: Product, device: str = "cuda") -> int:
    """Replace linear layers of a single row by `product`, those of the same row by one.

    They are joined where the first of them stands, so none is moved to before an operation that may write.

    Args:
        graph: as torch.compile traces it, with examples of its values.
        product: of a row [..., D] and up to three matrices [N, D]: [..., sum of N].
        device: the type of those that have it.

    Returns:
        how many calls of it there are now.
    """
    of_row: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    writes = 0
    for node in graph.graph.nodes:
        writes += _may_write(node)
        if _is_product(node, device):
            of_row.setdefault((_arguments(node)[0], writes), []).append(node)
    calls = 0
    for (row, _), nodes in of_row.items():
        for start in range(0, len(nodes), MOST):
            _replace(graph.graph, row, nodes[start : start + MOST], product)
            calls += 1
    graph.graph.lint()
    graph.recompile()
    return calls


def _replace(graph: fx.Graph, row: fx.Node, nodes: list[fx.Node], product: Product) -> None:
    """Replace linear layers of one row by one product. Their weights are inputs of the graph, there from the start."""
    weights, sizes = [_arguments(node)[1] for node in nodes], [_example(node).shape[-1] for node in nodes]
    with graph.inserting_before(nodes[0]):
        parts = [graph.call_function(product, (row, weights))]
        if len(nodes) > 1:
            split = graph.call_function(torch.split, (parts[0], sizes, -1))
            parts = [graph.call_function(operator.getitem, (split, number)) for number in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        bias = _arguments(node)[2]
        if bias is not None:
            with graph.inserting_before(node):
                part = graph.call_function(torch.add, (part, bias))
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """Row, weight and bias of a linear layer."""
    found = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return found["input"], found["weight"], found.get("bias")


def _example(node: fx.Node) -> Tensor:
    found: Tensor = node.meta["example_value"]
    return found


def _may_write(node: fx.Node) -> bool:
    """Tell whether an operation may change what it is given, as far as its name, its schema and `out` show."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module" or "out" in node.kwargs:
        return True
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # a kernel, or a graph of its own
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, str):  # a method
        return target == "__setitem__" or (target.endswith("_") and not target.endswith("__"))
    name: str = getattr(target, "__name__", "_")
    if getattr(operator, name, None) is target:
        return name in IN_PLACE
    return name.endswith("_") or bool(node.kwargs.get("inplace"))


def _is_product(node: fx.Node, device: str = "cuda") -> bool:
    """Tell whether a node is a linear layer of a single row whose weight is an input of the graph, and large."""
    if node.op != "call_function" or node.target is not torch.nn.functional.linear:
        return False
    row, weight, _ = _arguments(node)
    if not (isinstance(weight, fx.Node) and weight.op == "placeholder"):
        return False
    given, matrix = _example(row), _example(weight)
    return (
        given.device.type == matrix.device.type == device
        and given.dtype == matrix.dtype
        and given.is_floating_point()
        and all(type(size) is int and size == 1 for size in given.shape[:-1])
        and type(given.shape[-1]) is int
        and given.shape[-1] <= WIDEST
        and given.is_contiguous()
        and matrix.is_contiguous()
        and matrix.numel() >= LEAST
    )
