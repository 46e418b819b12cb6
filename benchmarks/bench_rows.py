"""The products of one token: how fast the weights of a layer are read.

    python benchmarks/bench_rows.py                      # a GPU, 12 layers in the shape of Qwen3-4B
    python benchmarks/bench_rows.py --layers 12 --options max_autotune triton.multi_kernel

What a layer multiplies (norms and activations with it, no attention), of all layers in a CUDA graph, as often as it
takes: medians, and the bytes of the weights by the time. By the device's own library; compiled by Inductor, with its
products tuned and with each further option of it; and with the library's kernel for single rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from msa_hf.ops.row_products import InductorWithRowProducts

HIDDEN, HEADS, GROUPS, MIDDLE = 2560, 4096, 1024, 9728  # Qwen3-4B


class Layer(nn.Module):
    """The matrices of a decoder layer, and as little as can stand between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Qwen3RMSNorm(HIDDEN)
        self.query, self.key, self.value = (nn.Linear(HIDDEN, size, bias=False) for size in (HEADS, GROUPS, GROUPS))
        self.out = nn.Linear(HEADS, HIDDEN, bias=False)
        self.gate, self.up = (nn.Linear(HIDDEN, MIDDLE, bias=False) for _ in range(2))
        self.down = nn.Linear(MIDDLE, HIDDEN, bias=False)

    def forward(self, row: Tensor) -> Tensor:
        seen = self.norm(row)
        query, key, value = self.query(seen), self.key(seen), self.value(seen)
        repeated = (1,) * (row.dim() - 1) + (HEADS // GROUPS,)
        row = row + self.out(query * key.tanh().repeat(repeated) + value.repeat(repeated))
        seen = self.norm(row)
        return row + self.down(nn.functional.silu(self.gate(seen)) * self.up(seen))


def graph_of(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """What a function launches, recorded once it was warm; and where its result lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def milliseconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    """The median time of a graph."""
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--options", nargs="*", default=[], help="of Inductor, each tried beside tuned products")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers = [Layer().to("cuda", getattr(torch, arguments.dtype)).eval() for _ in range(arguments.layers)]
    size = sum(weight.nbytes for layer in layers for weight in layer.parameters())
    row = torch.randn(1, 1, HIDDEN, device="cuda", dtype=getattr(torch, arguments.dtype))
    tuned: dict[str, Any] = {"coordinate_descent_tuning": True}
    ways: dict[str, dict[str, Any] | None] = {
        "the library of the device": None,
        "Inductor": {"options": {}},
        "Inductor, tuned": {"options": tuned},
        **{f"Inductor, tuned, {name}": {"options": {**tuned, name: True}} for name in arguments.options},
        "kernel for single rows": {"backend": InductorWithRowProducts()},
    }
    expected: Tensor | None = None
    for way, options in ways.items():
        torch._dynamo.reset()
        forward = Layer.forward if options is None else torch.compile(Layer.forward, **options)

        def run(forward: Callable[[Layer, Tensor], Tensor] = forward) -> Tensor:
            found = row
            for layer in layers:
                found = forward(layer, found)
            return found

        graph, result = graph_of(run)
        took = milliseconds(graph, arguments.repeats)
        expected = result.float() if expected is None else expected
        off = ((result.float() - expected).abs().max() / expected.abs().max()).item()
        print(f"{way:32} {took:.3f} ms, {size / took / 1e9:.2f} TB/s; differs by {off:.4f} of the largest", flush=True)


if __name__ == "__main__":
    main()
