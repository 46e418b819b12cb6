"""Products of single rows: found in graphs, those of one row joined, and right to the dtype's tolerance."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msa_hf.ops.row_products import InductorWithRowProducts, graphs, replace_products


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


def run_with(block: nn.Module, row: Tensor) -> tuple[Tensor, list[list[int]]]:
    """What a block compiled with such products makes of a row, and the heights of the matrices of each."""
    heights: list[list[int]] = []

    def product(row: Tensor, matrices: list[Tensor]) -> Tensor:
        heights.append([len(matrix) for matrix in matrices])
        return torch.cat([row @ matrix.T for matrix in matrices], -1)

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


KERNEL = """
import random, torch
from msa_hf.ops.row_products.triton import LONG, launch, row_products_kernel
random.seed(0); torch.manual_seed(0)
for width in (1, 3, 511, 512, 513, LONG, LONG + 1):
    matrices = [torch.randn(random.randint(1, 5), width) for _ in range(random.randint(1, 3))]
    row = torch.randn(1, 1, width)
    exact = torch.cat([row.double() @ matrix.double().T for matrix in matrices], -1)
    torch.testing.assert_close(launch(row_products_kernel, row, matrices).double(), exact, atol=4e-4, rtol=0)
"""


def test_kernel_interpreted() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Random sizes on a GPU, by themselves and within a graph of Inductor's."""
    from msa_hf.ops.row_products.triton import LONG, row_products

    monkeypatch.setattr(graphs, "LEAST", 1)
    pick = random.Random(0)
    for width in (1, 8, 511, 512, 513, LONG, LONG + 1, 9728, *(pick.randint(1, 12_000) for _ in range(8))):
        matrices = [torch.randn(pick.randint(1, 900), width, device="cuda") for _ in range(pick.randint(1, 3))]
        row = torch.randn(1, 1, width, device="cuda", dtype=dtype)
        matrices = [(matrix / width**0.5).to(dtype) for matrix in matrices]
        exact = torch.cat([row.double() @ matrix.double().T for matrix in matrices], -1)
        found = row_products(row, matrices).double()
        torch.testing.assert_close(found, exact, atol=4 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)
    block, row = Block(520).to("cuda", dtype).eval(), torch.randn(1, 1, 520, device="cuda", dtype=dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(block, backend=InductorWithRowProducts())(row)
        exact = block.double()(row.double())
    torch.testing.assert_close(found.double(), exact, atol=32 * torch.finfo(dtype).eps, rtol=0)
