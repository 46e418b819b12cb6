"""Products of single rows in compiled graphs: those with the same row in one launch, at the rate of the memory.

A token of one sample multiplies a row by every matrix of a layer, which is all that its time goes into. Compilers write
a kernel that waits for itself, or call the library of the device once for every matrix.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from .surroundings import Norm, example_of, gate_of, norm_of, residual_of

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
Compiled = Callable[..., Any]


class Product(Protocol):
    """`triton.row_products`."""

    def __call__(
        self,
        row: Tensor,
        matrices: list[Tensor],
        norm: Tensor | None,
        epsilon: float,
        residual: Tensor | None,
        gated: bool,
        /,
    ) -> Tensor: ...


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


class _Row(NamedTuple):
    """A row whose products can be one.

    Attributes:
        states: the row, or what it is the norm of.
        norm: None where it is none.
        writes: operations that may write, before them.
    """

    states: fx.Node
    norm: Norm | None
    writes: int


def replace_products(graph: fx.GraphModule, product: Product, device: str = "cuda") -> int:
    """Replace linear layers of a single row by `product`, those of the same row by one, with what stands around them.

    They are joined where the first of them stands, or the gate or sum behind them, so none is moved to before or behind
    an operation that may write. The norm stays in the graph for whoever else reads the row; nobody, most often.

    Args:
        graph: as torch.compile traces it, with examples of its values.
        product: of a row [..., D] and up to three matrices [N, D]: [..., sum of N].
        device: the type of those that have it.

    Returns:
        how many calls of it there are now.
    """
    before: dict[fx.Node, int] = {}  # operations that may write
    writes = 0
    of_row: dict[_Row, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        before[node] = writes
        writes += _may_write(node)
        if _is_product(node, device):
            row = _arguments(node)[0]
            norm = norm_of(row)
            if norm is not None and before[norm.first] == before[node]:
                of_row.setdefault(_Row(norm.states, norm, writes), []).append(node)
            else:
                of_row.setdefault(_Row(row, None, writes), []).append(node)
    calls = 0
    for row, nodes in of_row.items():
        for gate in list(nodes):
            found = None if _arguments(gate)[2] is not None else gate_of(gate)
            if found is None or gate not in nodes:
                continue
            silu, other, times = found
            same = other in nodes and example_of(other).shape == example_of(gate).shape
            if same and _arguments(other)[2] is None and before[times] == row.writes:
                _put(graph.graph, row, [gate, other], product, times, None, gated=True)
                for node in (silu, gate, other):
                    graph.graph.erase_node(node)
                nodes = [node for node in nodes if node not in (gate, other)]
                calls += 1
        for start in range(0, len(nodes), MOST):
            _replace(graph.graph, row, nodes[start : start + MOST], product, before)
            calls += 1
    graph.graph.lint()
    graph.recompile()
    return calls


def _put(
    graph: fx.Graph,
    row: _Row,
    nodes: list[fx.Node],
    product: Product,
    place: fx.Node,
    residual: fx.Node | None,
    gated: bool = False,
) -> None:
    """Put one product in the place of an operation that reads those of `nodes`."""
    with graph.inserting_before(place):
        call = graph.call_function(product, _given(row, nodes, residual, gated))
    call.meta.update(place.meta)
    place.replace_all_uses_with(call)
    graph.erase_node(place)


def _given(row: _Row, nodes: list[fx.Node], residual: fx.Node | None, gated: bool) -> tuple[Any, ...]:
    """The arguments of a product, of nodes that are there now: what a row was made by may have been replaced."""
    states, weights = _arguments(nodes[0])[0], [_arguments(node)[1] for node in nodes]
    norm = None if row.norm is None else norm_of(states)
    if norm is None:
        return states, weights, None, 0.0, residual, gated
    return norm.states, weights, norm.weight, norm.epsilon, residual, gated


def _replace(graph: fx.Graph, row: _Row, nodes: list[fx.Node], product: Product, before: Mapping[fx.Node, int]) -> None:
    """Replace linear layers of one row by one product. Their weights are inputs of the graph, there from the start."""
    if len(nodes) == 1 and _arguments(nodes[0])[2] is None:
        found = residual_of(nodes[0])
        if found is not None and before[found[1]] == row.writes:
            _put(graph, row, nodes, product, found[1], found[0])
            graph.erase_node(nodes[0])
            return
    sizes = [example_of(node).shape[-1] for node in nodes]
    with graph.inserting_before(nodes[0]):
        parts = [graph.call_function(product, _given(row, nodes, None, False))]
        if len(nodes) > 1:
            split = graph.call_function(torch.split, (parts[0], sizes, -1))
            parts = [graph.call_function(operator.getitem, (split, number)) for number in range(len(nodes))]
    for node, part in zip(nodes, parts, strict=True):
        bias = _arguments(node)[2]
        if bias is not None:
            with graph.inserting_before(node):
                part = graph.call_function(torch.add, (part, bias))
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    """Row, weight and bias of a linear layer."""
    found = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return found["input"], found["weight"], found.get("bias")


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
    given, matrix = example_of(row), example_of(weight)
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
