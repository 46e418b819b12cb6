"""Products of single rows: found in graphs, those of one row joined, and right to the dtype's tolerance."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from msa_hf.ops import adapters
from msa_hf.ops.row_products import InductorWithRowProducts, graphs, replace_products


def by_definition(
    row: Tensor,
    matrices: Sequence[Tensor],
    norm: Tensor | None = None,
    epsilon: float = 0.0,
    residual: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`row_products` in the dtype of the row."""
    if norm is not None:
        row = row / (row.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * norm
    products = [row @ matrix.T for matrix in matrices]
    if gated:
        products = [nn.functional.silu(products[0]) * products[1]]
    total = torch.cat(products, -1)
    return total if residual is None else total + residual


class Block(nn.Module):
    """What a decoder layer multiplies: three matrices of one row, one of another, four of a third."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(size, 12), nn.Linear(size, 4)
        self.key, self.out = nn.Linear(size, 4, bias=False), nn.Linear(12, size, bias=False)
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=number % 2 == 0) for number in range(4))

    def forward(self, row: Tensor) -> Tensor:
        seen = torch.nn.functional.rms_norm(row, row.shape[-1:])
        query, key, value = self.query(seen), self.key(seen), self.value(seen)
        row = row + self.out(torch.cat([query[..., :4] * key, query[..., 4:8].tanh(), value + query[..., 8:]], -1))
        return row + sum(expert(row) * number for number, expert in enumerate(self.experts))


class DecoderLayer(nn.Module):
    """A decoder layer as transformers writes it, but for its attention.

    Args:
        size: of a row.
        middle: of the gated layer.
        bias: of all matrices.
    """

    def __init__(self, size: int = 8, middle: int = 20, bias: bool = False) -> None:
        super().__init__()
        self.before, self.behind = LlamaRMSNorm(size, eps=1e-5), LlamaRMSNorm(size, eps=1e-3)
        for norm in (self.before, self.behind):
            norm.weight.data.normal_(1, 0.2)
        self.query, self.key = nn.Linear(size, 12, bias=bias), nn.Linear(size, 12, bias=bias)
        self.out = nn.Linear(12, size, bias=bias)
        self.gate, self.up = nn.Linear(size, middle, bias=bias), nn.Linear(size, middle, bias=bias)
        self.down = nn.Linear(middle, size, bias=bias)

    def forward(self, row: Tensor) -> Tensor:
        seen = self.before(row)
        row = row + self.out(self.query(seen) * self.key(seen).tanh())
        seen = self.behind(row)
        return row + self.down(nn.functional.silu(self.gate(seen)) * self.up(seen))


def run_with(block: nn.Module, row: Tensor, around: list[str] | None = None) -> tuple[Tensor, list[list[int]]]:
    """What a block compiled with such products makes of a row, and the heights of the matrices of each.

    Args:
        around: takes what each has around it, in words.
    """
    heights: list[list[int]] = []

    def product(
        row: Tensor, matrices: list[Tensor], norm: Tensor | None, epsilon: float, residual: Tensor | None, gated: bool
    ) -> Tensor:
        heights.append([len(matrix) for matrix in matrices])
        found = {"norm": norm is not None, "gate": gated, "residual": residual is not None}
        if around is not None:
            around.append(" ".join(name for name, there in found.items() if there))
        return by_definition(row, matrices, norm, epsilon, residual, gated)

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        replace_products(graph, product, "cpu")
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(block, backend=backend)(row), heights


def test_those_of_one_row_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST", 1)
    block, row = Block(), torch.randn(1, 1, 8)
    found, heights = run_with(block, row)
    assert heights == [[12, 4, 4], [8], [8, 8, 8], [8]]
    torch.testing.assert_close(found, block(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_around_them_goes_with_them(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Norms, gate and residuals of two layers, in whatever order a sum is written."""
    monkeypatch.setattr(graphs, "LEAST", 1)
    torch.manual_seed(0)
    block, row = nn.Sequential(DecoderLayer(), DecoderLayer()).to(dtype), torch.randn(1, 1, 8).to(dtype)
    around: list[str] = []
    found, heights = run_with(block, row, around)
    assert heights == [[12, 12], [8], [20, 20], [8]] * 2
    assert around == ["norm", "residual", "norm gate", "residual"] * 2
    with torch.no_grad():
        exact = block.double()(row.double())
    torch.testing.assert_close(found.double(), exact, atol=16 * torch.finfo(dtype).eps, rtol=0.01)


def test_what_has_a_bias_keeps_gate_and_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST", 1)
    block, row, around = DecoderLayer(bias=True), torch.randn(1, 8), list[str]()
    found, heights = run_with(block, row, around)
    assert heights == [[12, 12], [8], [20, 20], [8]] and around == ["norm", "", "norm", ""]
    torch.testing.assert_close(found, block(row))


@pytest.mark.parametrize("how", ["read twice", "written to", "another gate", "another shape", "scaled", "in half"])
def test_what_is_not_of_a_product_alone_stays_in_the_graph(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Products that others read too, sums behind a write, other gates and norms, residuals of another shape."""
    monkeypatch.setattr(graphs, "LEAST", 1)

    class Layer(DecoderLayer):
        def forward(self, row: Tensor) -> Tensor:
            norm = nn.functional.rms_norm(row, row.shape[-1:]) if how == "scaled" else self.before(row)
            gate, up = self.gate(norm), self.up(norm)
            if how == "written to":
                row = row.clone()
                kept = self.down(up)
                row.mul_(2)
                return row + kept
            if how == "another shape":
                return self.down(up) + row.sum(-1, keepdim=True)
            if how == "in half":
                return self.down(up) + row.double()
            if how == "another gate":
                return self.down(nn.functional.gelu(gate) * up)
            found = self.down(nn.functional.silu(gate) * up)
            return found * (row + found) + (gate.sum() if how == "read twice" else 0)

    block, row, around = Layer(), torch.randn(1, 8), list[str]()
    with torch.no_grad():
        exact = block(row)
    found, _ = run_with(block, row, around)
    torch.testing.assert_close(found, exact)
    assert "residual" not in " ".join(around) and ("gate" in " ".join(around)) == (how == "scaled")


@pytest.mark.parametrize("rows", [(2, 1), (1, 3), (2,)])
def test_several_rows_are_left_alone(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]) -> None:
    monkeypatch.setattr(graphs, "LEAST", 1)
    assert run_with(Block(), torch.randn(*rows, 8))[1] == []


@pytest.mark.parametrize("how", ["a method", "an item", "a view", "a function"])
def test_none_is_moved_before_a_write(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(graphs, "LEAST", 1)

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, row: Tensor) -> Tensor:
            row = row * 2
            found = self.first(row)
            if how == "a method":
                row.add_(1)
            elif how == "an item":
                row[..., 0] = 5
            elif how == "a view":
                row.view(-1)[2:4].mul_(3)
            else:
                torch.relu_(row)
            return found + self.second(row) + self.third(row)

    block, row = Written(), torch.randn(1, 8)
    found, heights = run_with(block, row)
    assert heights == [[8], [8, 8]]
    torch.testing.assert_close(found, block(row))


def test_small_matrices_and_weights_that_are_made_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST", 64)

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, row: Tensor) -> Tensor:
            return self.small(row) @ self.small.weight + nn.functional.linear(row, self.large.weight * 2)

    block, row = Made(), torch.randn(1, 8)
    found, heights = run_with(block, row)
    assert heights == []
    torch.testing.assert_close(found, block(row))


def test_the_rest_is_what_inductor_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode and options reach Inductor, with tuned products where rows were found; answers are those of the block."""
    given: list[dict[str, Any]] = []

    def compile_eagerly(graph: torch.fx.GraphModule, inputs: Any, options: dict[str, Any]) -> Any:
        given.append(options)
        return graph.forward

    monkeypatch.setattr(torch._inductor, "compile", compile_eagerly)
    block = Block()
    for rows, options in ((torch.randn(1, 8), None), (torch.randn(3, 8), {"epilogue_fusion": False})):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(block, backend=InductorWithRowProducts(), options=options)
            torch.testing.assert_close(compiled(rows), block(rows))
    assert given == [{}, {"epilogue_fusion": False}]
    monkeypatch.setattr(graphs, "_is_product", lambda node, device="cuda": device == "cuda")
    monkeypatch.setattr(graphs, "replace_products", lambda graph, product: 0)
    monkeypatch.setattr(graphs, "_operation", lambda: None)
    torch._dynamo.reset()
    torch.compile(block, backend=InductorWithRowProducts(), mode="max-autotune-no-cudagraphs")(torch.randn(1, 8))
    assert given[2]["coordinate_descent_tuning"] and given[2]["max_autotune"]


def test_it_is_the_default_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU and Triton; AMD's GPUs, old ones, and machines without either have Inductor's."""
    there: dict[str, Any] = {"gpu": True, "triton": True, "hip": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["gpu"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if there[name] else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5) if there["old"] else (8, 0))
    for missing in (None, "gpu", "triton", "hip", "old"):
        there |= {"gpu": missing != "gpu", "triton": missing != "triton", "old": missing == "old"}
        monkeypatch.setattr(torch.version, "hip", "6.4" if missing == "hip" else None)
        expected = InductorWithRowProducts() if missing is None else "inductor"
        assert adapters.token_backend() == expected


KERNEL = """
import random, torch
from torch.utils._pytree import tree_map_only
from test_row_products import by_definition
from msa_hf.ops.row_products.triton import LONG, launch
random.seed(0); torch.manual_seed(0)
for width in (1, 3, 511, 512, 513, LONG, LONG + 1):
    for gated in (False, True):
        sizes = [random.randint(1, 5)] * 2 if gated else [random.randint(1, 5) for _ in range(random.randint(1, 3))]
        matrices, row = [torch.randn(size, width) / width ** 0.5 for size in sizes], torch.randn(1, 1, width)
        norm = random.choice((None, torch.randn(width)))
        residual = random.choice((None, torch.randn(1, 1, sizes[0] if gated else sum(sizes))))
        given = row, matrices, norm, 1e-3, residual
        exact = by_definition(*tree_map_only(torch.Tensor, torch.Tensor.double, given), gated)
        torch.testing.assert_close(launch(*given, gated).double(), exact, atol=2e-5, rtol=2e-6)
"""


def test_kernel_interpreted() -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Random sizes on a GPU, by themselves and within a graph of Inductor's."""
    from msa_hf.ops.row_products.triton import LONG, row_products

    monkeypatch.setattr(graphs, "LEAST", 1)
    pick = random.Random(0)
    for width in (1, 8, 511, 512, 513, LONG, LONG + 1, 9728, *(pick.randint(1, 12_000) for _ in range(12))):
        gated = pick.random() < 0.3
        sizes = [pick.randint(1, 900)] * 2 if gated else [pick.randint(1, 900) for _ in range(pick.randint(1, 3))]
        matrices = [(torch.randn(size, width, device="cuda") / width**0.5).to(dtype) for size in sizes]
        row = torch.randn(1, 1, width, device="cuda", dtype=dtype)
        norm = pick.choice((None, torch.randn(width, device="cuda", dtype=dtype)))
        residual = pick.choice((None, torch.randn(1, 1, sizes[0] if gated else sum(sizes), device="cuda", dtype=dtype)))
        given = row, matrices, norm, 1e-3, residual
        exact = by_definition(*tree_map_only(Tensor, Tensor.double, given), gated)
        found, eps = row_products(*given, gated).double(), torch.finfo(dtype).eps
        torch.testing.assert_close(found, exact, atol=8 * eps * float(exact.abs().max()), rtol=4 * eps)
    for block, row in ((Block(520), torch.randn(1, 1, 520)), (DecoderLayer(700, 1100), torch.randn(1, 1, 700))):
        block, row = block.to("cuda", dtype).eval(), row.to("cuda", dtype)
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(block, backend=InductorWithRowProducts())
            found, played = compiled(row), None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                played = compiled(compiled(row))
            graph.replay()
            exact = block.double()(row.double())
            twice = block(exact)
        torch.testing.assert_close(found.double(), exact, atol=32 * torch.finfo(dtype).eps, rtol=0)
        # Launched before the kernels that it depends on have ended.
        torch.testing.assert_close(played.double(), twice, atol=128 * torch.finfo(dtype).eps, rtol=0.02)
