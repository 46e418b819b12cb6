"""Routing over a bank that several processes share, beside one process that has all of it.

    accelerate launch --num_processes 2 benchmarks/bench_parallel.py --json parallel.json

Keys are random, made in blocks that do not depend on the number of processes, so that all must choose the same
documents; the run fails where they do not. First process 0 routes alone over all keys, then all of them together. A
measured turn is what a forward does besides its model: agree, and in each layer route and fetch content, and hear that
all came through. All layers share one tensor of content, which would not fit beside the keys.

A rehearsal without a GPU:

    ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 benchmarks/bench_parallel.py --tokens 1e6 --layers 3 --head-dim 32
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from msa_hf import MemoryBank
from msa_hf.bank.sharded.bank import ShardedBank
from msa_hf.bank.sharded.collectives import Collectives
from msa_hf.bank.sharded.share import shares
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable
from msa_hf.model.routing_msa import routing_request, scoring_of

CHUNK = 64
BLOCK = 1 << 16  # chunks made at once, from one seed


class Alone(Collectives):
    """One process that talks to nobody, though others are there."""

    def __init__(self) -> None:
        self.timeout = timedelta(minutes=1)
        self.rank, self.size, self.control, self.data, self.closed = 0, 1, None, None, False


def keys_of(layer: int, first: int, end: int, width: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
    """Normalized random routing keys of the chunks from `first` to `end`."""
    keys = torch.empty(end - first, width, device=device, dtype=dtype)
    for block in range(first // BLOCK, -(-end // BLOCK)):
        pick = torch.Generator(device).manual_seed(layer * 1_000_003 + block)
        made = torch.randn(BLOCK, width, device=device, generator=pick)
        made = torch.nn.functional.normalize(made, dim=1).to(dtype)
        start = block * BLOCK
        low, high = max(start, first), min(start + BLOCK, end)
        keys[low - first : high - first] = made[low - start : high - start]
    return keys


def bank_of(args: argparse.Namespace, ranks: Collectives, documents: DocumentTable, device: Any) -> ShardedBank:
    counts = torch.from_numpy(documents.counts("chunks"))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rows = shares(offsets, ranks.size)
    first, end = int(offsets[rows[ranks.rank]]), int(offsets[rows[ranks.rank + 1]])
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    content = torch.ones(end - first, 2, args.groups, args.head_dim, device=device, dtype=dtype)
    layers = {
        layer: DenseLayer(keys_of(layer, first, end, args.groups * args.head_dim, device, dtype), content)
        for layer in range(args.layers)
    }
    origin = BankOrigin("synthetic", None, "synthetic", CHUNK, tuple(range(args.layers)), "cosine", False, ())
    whole = MemoryBank(layers, offsets, {}, documents, origin, (int(offsets[-1]), CHUNK * int(offsets[-1])))
    return ShardedBank(layers, whole, rows, ranks, "same")


def route_and_fetch(bank: ShardedBank, queries: dict[int, torch.Tensor], config: Any) -> dict[int, torch.Tensor]:
    """Route and fetch in every layer; the documents chosen."""
    some = next(iter(queries.values()))
    ids = torch.arange(some.shape[1])[None].expand(some.shape[:2])
    mask = torch.ones(some.shape[:2], dtype=torch.bool, device=some.device)
    scoring = scoring_of(config, config.similarity)
    request = routing_request(config, scoring, mask, bank.documents.num_rows, inputs=ids)
    chosen = {}
    with bank.session(request) as layers:
        for layer, memory in layers.items():
            selection = memory.route(queries[layer], mask, request.k, scoring)
            chosen[layer] = selection.documents
            memory.gather(selection, bank.dtype)
    return chosen


def median_ms(run: Any, device: Any, repeats: int) -> float:
    """Median wall-clock milliseconds of `run`, the device drained before and after."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 2):
        drain()
        start = time.perf_counter()
        run()
        drain()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[repeats // 2]


def measure(bank: ShardedBank, args: argparse.Namespace, config: Any, device: Any) -> tuple[dict[str, float], Any]:
    times, chosen = {}, {}
    for length in args.question_tokens:
        pick = torch.Generator().manual_seed(length)
        shape = (args.layers, 1, length, args.heads, args.head_dim)
        queries = dict(enumerate(torch.randn(shape, generator=pick).to(device, bank.dtype)))
        chosen[length] = {layer: found.cpu() for layer, found in route_and_fetch(bank, queries, config).items()}
        times[str(length)] = round(
            median_ms(lambda q=queries: route_and_fetch(bank, q, config), device, args.repeats), 3
        )
    return times, chosen


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=float, default=100e6)
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--question-tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on an accelerator")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)

    state = Accelerator()
    device = state.device
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    config = SimpleNamespace(
        num_attention_heads=args.heads,
        top_k=args.top_k,
        similarity="cosine",
        head_reduction="mean",
        query_reduction="max",
        chunk_reduction="max",
        score_bias=False,
    )
    chunks = -(-args.document_tokens // CHUNK)
    count = max(int(args.tokens) // args.document_tokens, 1)
    documents = DocumentTable([Document(str(i), None, None, args.document_tokens, chunks) for i in range(count)])

    alone, expected = {}, None
    if state.process_index == 0:
        bank = bank_of(args, Alone(), documents, device)
        alone, expected = measure(bank, args, config, device)
        del bank
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if state.num_processes > 1:
        dist.barrier()
    with bank_of(args, Collectives(None, timedelta(minutes=10)), documents, device) as bank:
        shared, chosen = measure(bank, args, config, device)
    if state.process_index != 0:
        return
    assert expected is not None
    for length, layers in expected.items():
        for layer, found in layers.items():
            if not torch.equal(found, chosen[length][layer]):
                raise SystemExit(f"Layer {layer}, {length} tokens: processes chose other documents than one alone.")
    key_bytes = count * chunks * args.groups * args.head_dim * (2 if args.dtype == "bfloat16" else 4) * args.layers
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    figures = {
        "processes": state.num_processes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "tokens": count * args.document_tokens,
        "layers": args.layers,
        "dtype": args.dtype,
        "key_bytes": key_bytes,
        "alone_ms": alone,
        "shared_ms": shared,
        "speedup": {length: round(alone[length] / shared[length], 3) for length in alone},
        "keys_gb_per_s": {length: round(key_bytes / shared[length] / 1e6, 1) for length in shared},
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
