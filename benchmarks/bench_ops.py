"""Time the native operations beside PyTorch, one command for every figure of docs/performance.md.

    python benchmarks/bench_ops.py --json docs/bench_ops.json             on a GPU, a 100M-token bank, about 3 minutes
    python benchmarks/bench_ops.py --cpu --json docs/bench_ops_cpu.json   the C++ operations, 1M and 10M tokens

The tests of tests/ops run first, for the backends that are to be measured; where one fails nothing is printed. All
figures are of the operations as Python calls them, medians of times between device events, with more data than the
second cache holds. `call` is the time of a call after another, `device` that of the same calls replayed as a graph,
which leaves out what the host takes to launch them. Ceilings (copy, matrix product, bus) are measured in the same run.
Bytes are what must be moved at least: every input read once, every result written once.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msa_hf.ops import (
    BACKENDS,
    BackendError,
    gather_documents,
    pool_chunks,
    quantize_keys,
    recall_of_candidates,
    route_documents,
)
from msa_hf.ops.dispatch import extension_info, operator, triton_version

ROOT = Path(__file__).resolve().parents[1]
GROUPS, DIM, CHUNK, TOP = 8, 128, 64, 16  # the shape of a 4B model, one layer
PER_DOCUMENT = 16  # chunks of a document that is gathered
SIZE = GROUPS * DIM
# Sample x tokens -> what is asked for: share of copy bandwidth or of the matrix product's rate in bf16; for quantized
# keys share of copy bandwidth on the smaller keys, or so many times the rate of the bf16 call.
QUERIES: dict[tuple[int, int], tuple[str, float, str, float]] = {
    (1, 32): ("copy", 0.93, "copy", 0.80),
    (1, 64): ("copy", 0.93, "copy", 0.80),
    (1, 256): ("matmul", 0.72, "times", 1.3),
    (1, 1024): ("matmul", 0.72, "times", 1.4),
    (16, 32): ("matmul", 0.70, "times", 1.3),
}


@dataclass
class Row:
    """One measurement.

    Attributes:
        operation, case, backend: what was called, with what, on which implementation.
        call_ms: median milliseconds of a call; device_ms: the same in a replayed graph, None where it cannot be.
        bytes, flops: least bytes moved, operations of the products.
        ceiling: which one `share` is of: "copy", "matmul" or "bus" (or "times": as fast as the exact call so often).
        goal, reached: what is asked for, None where nothing is.
        agrees: share of the results that are those of the PyTorch reference (documents), or the largest error.
        recall: of the exact best documents, with quantized keys.
        peak_MB: memory that the call took beyond its inputs, results included.
    """

    operation: str
    case: str
    backend: str
    call_ms: float
    device_ms: float | None = None
    bytes: float = 0.0
    flops: float = 0.0
    ceiling: str = ""
    share: float | None = None
    goal: float | None = None
    reached: bool | None = None
    agrees: float | None = None
    recall: float | None = None
    peak_MB: float | None = None

    @property
    def ms(self) -> float:
        return self.call_ms if self.device_ms is None else self.device_ms

    def line(self) -> str:
        cells = [self.operation, self.case, self.backend, f"{self.call_ms:.4g}"]
        cells.append("" if self.device_ms is None else f"{self.device_ms:.4g}")
        cells.append(f"{self.bytes / 1e6:.1f}" if self.bytes else "")
        cells.append(f"{self.bytes / self.ms / 1e6:.1f}" if self.bytes else "")
        cells.append(f"{self.flops / self.ms / 1e9:.1f}" if self.flops else "")
        share = "" if self.share is None else f"{self.share:.3f} {self.ceiling}"
        if self.goal is not None:
            share += f" ({'reached' if self.reached else 'MISSED'}: {self.goal:g})"
        cells.append(share)
        cells.append("" if self.agrees is None else f"{self.agrees:.4g}")
        cells.append("" if self.recall is None else f"{self.recall:.5f}")
        cells.append("" if self.peak_MB is None else f"{self.peak_MB:.1f}")
        return "| " + " | ".join(cells) + " |"


COLUMNS = ("operation", "case", "backend", "call ms", "device ms", "MB", "GB/s", "TFLOP/s", "share (goal)", "agrees")
COLUMNS += ("recall", "peak MB")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


class Bench:
    """Times, ceilings and the rows measured so far.

    Args:
        arguments: of the command line.
        backends: names, PyTorch's last.
    """

    def __init__(self, arguments: argparse.Namespace, backends: list[str]) -> None:
        self.device = "cpu" if arguments.cpu else "cuda"
        self.scale = arguments.scale
        self.repeats = arguments.repeats
        self.backends = backends
        self.rows: list[Row] = []
        self.ceilings: dict[str, float] = {}
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    # Clocks -----------------------------------------------------------------------------------------------------------

    def call_ms(self, call: Callable[[int], Any], calls: int, repeats: int | None = None) -> float:
        """Median milliseconds per call; `call` gets its number, by which it takes other inputs than the last."""
        repeats = self.repeats if repeats is None else repeats
        call(0)
        call(1 % calls)
        times = []
        for _ in range(repeats):
            if self.device == "cuda":
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for number in range(calls):
                    call(number)
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / calls)
            else:
                before = time.perf_counter()
                for number in range(calls):
                    call(number)
                times.append((time.perf_counter() - before) * 1e3 / calls)
        return sorted(times)[len(times) // 2]

    def device_ms(self, call: Callable[[int], Any], calls: int) -> float | None:
        """The same for a graph of the calls, None where they cannot be captured."""
        if self.device != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                call(0)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                for number in range(calls):
                    call(number)
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return self.call_ms(lambda _: graph.replay(), 1) / calls

    def peak_MB(self, call: Callable[[int], Any]) -> float:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(0)
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before = _status("VmRSS")
        call(0)
        return max(_status("VmHWM") - before, 0.0)

    def measure(
        self,
        row: Row,
        call: Callable[[int], Any],
        calls: int,
        graph: bool = True,
        goal: tuple[str, float] | None = None,
        per_second: float | None = None,
    ) -> Row:
        """Time a call, say how it stands to its ceiling, and keep the row.

        Args:
            graph: also time it in a graph; for calls that never wait for the device.
            goal: ceiling, and share of it that is asked for.
            per_second: what is asked for where that is a rate (bytes per second) and no share.
        """
        row.call_ms = self.call_ms(call, calls)
        row.device_ms = self.device_ms(call, calls) if graph else None
        row.peak_MB = self.peak_MB(call)
        if row.ceiling in self.ceilings:
            done = row.flops if row.ceiling == "matmul" else row.bytes
            row.share = done / (row.ms * 1e-3) / self.ceilings[row.ceiling]
        if goal is not None and row.share is not None:
            row.goal, row.reached = goal[1], row.share >= goal[1]
        if per_second is not None:
            row.goal, row.reached = per_second / 1e9, row.bytes / (row.ms * 1e-3) >= per_second
        self.keep(row)
        return row

    def keep(self, row: Row) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)

    # Inputs -----------------------------------------------------------------------------------------------------------

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        result = torch.empty(shape, dtype=dtype, device=self.device)
        for part in result.split(1 << 18) if result.dim() > 1 else [result]:
            part.copy_(torch.randn(part.shape, generator=self.generator, device=self.device))
        return result

    def unit(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random vectors, of length 1 in each group."""
        result = torch.empty(*shape, SIZE, dtype=dtype, device=self.device)
        for part in result.view(-1, SIZE).split(1 << 18):
            numbers = torch.randn(len(part), GROUPS, DIM, generator=self.generator, device=self.device)
            part.copy_(torch.nn.functional.normalize(numbers, dim=2).flatten(1))
        return result

    def documents(self, *shape: int, count: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator, device=self.device)

    def sized(self, number: int, least: int = 64) -> int:
        return max(int(number * self.scale), least)

    # Ceilings ---------------------------------------------------------------------------------------------------------

    def measure_ceilings(self) -> None:
        """Copy bandwidth (read and written) and, on a GPU, the bf16 matrix product's rate and the bus."""
        count = self.sized(1 << 30, 1 << 22) if self.device == "cuda" else self.sized(1 << 27, 1 << 22)
        source = torch.ones(count, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        self.ceilings["copy"] = 2 * count / (self.call_ms(lambda _: target.copy_(source), 3, 9) * 1e-3)
        if self.device == "cpu":
            matrix = torch.randn(1024, 1024)
            ms = self.call_ms(lambda _: matrix @ matrix, 3, 9)
            self.ceilings["matmul"] = 2 * 1024**3 / (ms * 1e-3)
            return
        width = 8192 if self.scale == 1 else 2048
        left, right = self.random(width, width), self.random(width, width)
        ms = self.call_ms(lambda _: left @ right, 3, 9)
        self.ceilings["matmul"] = 2 * width**3 / (ms * 1e-3)
        pinned = torch.empty(count // 4, dtype=torch.uint8, pin_memory=True).random_()
        ms = self.call_ms(lambda _: target[: count // 4].copy_(pinned, non_blocking=True), 3, 9)
        self.ceilings["bus"] = count // 4 / (ms * 1e-3)


def _status(name: str) -> float:
    """A line of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return math.nan


def offsets_of(chunks: int, documents: int, device: str) -> Tensor:
    """Documents of nearly equal numbers of chunks."""
    return torch.arange(documents + 1, device=device) * chunks // documents


def same_documents(ours: Tensor, theirs: Tensor) -> float:
    """Share of `theirs` that is in `ours`."""
    wanted = theirs >= 0
    found = (theirs[:, :, None] == ours[:, None, :]).any(2) & wanted
    return float(found.sum() / wanted.sum().clamp(min=1))


# Routing --------------------------------------------------------------------------------------------------------------


def plain_route(queries: Tensor, keys: Tensor, offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Routing as one writes it with matrix products: all scores, three reductions."""
    scores = (queries.flatten(0, 1) @ keys.T).unflatten(0, queries.shape[:2]).amax(1).float()
    best = torch.segment_reduce(scores.T.contiguous(), "max", offsets=offsets, axis=0).T
    return best.topk(min(k, best.shape[1])).indices, best


def route(bench: Bench, sizes: list[tuple[int, list[int]]]) -> None:
    """Every query shape on exact and quantized keys, for few and many documents."""
    for chunks, counts in sizes:
        keys = bench.unit(chunks)
        quantized = {name: quantize_keys(keys, name) for name in ("fp8", "int8")}
        for documents in counts:
            offsets = offsets_of(chunks, documents, bench.device)
            for (batch, tokens), asked in QUERIES.items():
                route_case(bench, keys, quantized, offsets, batch, tokens, asked)
        del keys, quantized


def route_case(
    bench: Bench,
    keys: Tensor,
    quantized: dict[str, tuple[Tensor, Tensor]],
    offsets: Tensor,
    batch: int,
    tokens: int,
    asked: tuple[str, float, str, float],
) -> None:
    chunks, documents = keys.shape[0], offsets.shape[0] - 1
    queries = bench.unit(batch, tokens)
    mask = torch.ones(batch, tokens, dtype=torch.bool, device=bench.device)
    case = f"{batch} x {tokens}, {chunks:,} chunks, {documents:,} documents"
    flops = 2.0 * batch * tokens * chunks * SIZE
    goals = bench.device == "cuda"
    calls = 3 if batch * tokens <= 64 or bench.device == "cpu" else 1
    options: dict[str, Any] = {"offsets": offsets, "k": TOP}
    wanted, _ = route_documents(queries, mask, keys, **options, backend="pytorch")
    for backend in bench.backends:
        native = backend in ("cuda", "cpp")
        row = Row("route_documents", f"{case}, bf16", backend, 0.0, bytes=2.0 * chunks * SIZE, flops=flops)
        row.ceiling = asked[0]
        exact = partial(route_documents, queries, mask, keys, **options, backend=backend)
        try:
            row.agrees = same_documents(exact()[0], wanted)
        except BackendError as error:
            print(f"{row.case} on {backend}: {error}", file=sys.stderr)
            continue
        goal = (asked[0], asked[1]) if native and goals else None
        bench.measure(row, in_turn(exact, [()]), calls, graph=backend == "cuda", goal=goal)
        if backend == "pytorch":
            continue
        # A share of "times" is the exact call's time over this one's.
        bench.ceilings["times"] = (chunks * (SIZE + 4.0)) / (row.ms * 1e-3)
        for name, (numbers, scales) in quantized.items():
            row = Row("route_documents", f"{case}, {name} and scored again", backend, 0.0, flops=flops)
            row.bytes, row.ceiling = chunks * (SIZE + 4.0), asked[2]
            again = partial(
                route_documents, queries, mask, numbers, **options, scales=scales, exact_keys=keys, backend=backend
            )
            try:
                row.recall = same_documents(again()[0], wanted)
            except BackendError as error:
                print(f"{row.case} on {backend}: {error}", file=sys.stderr)
                continue
            goal = (asked[2], asked[3]) if native and goals else None
            bench.measure(row, in_turn(again, [()]), calls, graph=backend == "cuda", goal=goal)
        del bench.ceilings["times"]
    row = Row("route_documents", f"{case}, bf16", "plain matmul", 0.0, bytes=2.0 * chunks * SIZE, flops=flops)
    row.ceiling = asked[0]
    bench.measure(row, in_turn(partial(plain_route, queries, keys, offsets, TOP), [()]), calls, graph=False)


def recall(bench: Bench, chunks: int, documents: int) -> dict[str, Any]:
    """Of the exact best documents, how many are among the best candidates of keys in fewer bits; random unit keys."""
    keys, offsets = bench.unit(chunks), offsets_of(chunks, documents, bench.device)
    queries = bench.unit(64, 32)
    mask = torch.ones(64, 32, dtype=torch.bool, device=bench.device)
    return recalls(queries, mask, keys, offsets, bench.backends[0])


def recalls(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor, backend: str) -> dict[str, Any]:
    counts = [count for count in (TOP, 2 * TOP, 4 * TOP, 8 * TOP) if count < offsets.shape[0]]
    return {
        kind: recall_of_candidates(queries, mask, keys, offsets, TOP, kind, counts, backend=backend)
        for kind in ("fp8", "int8", "int4")
    }


def recall_of_checkpoint(bench: Bench, checkpoint: Path, count: int) -> dict[str, Any]:
    """The same for the routing keys that a model makes of invented documents, and its questions about them."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from msa_hf import MSAForCausalLM
    from msa_hf.evaluation import make_corpus, quantized_recall
    from msa_hf.generation import PromptProtocol

    logging.disable_progress_bar()
    model = MSAForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).to(bench.device).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(checkpoint), PromptProtocol.from_pretrained(checkpoint)
    corpus = make_corpus(count, seed=7, split="test")
    rows = [protocol.document_row(place, text, tokenizer) for place, text in enumerate(corpus.texts())]
    bank = model.encode_documents(rows, tokenizer, show_progress=False)
    questions = [question.text for question in corpus.questions(64, "one_hop", seed=1)]
    inputs = tokenizer(questions, return_tensors="pt", padding=True).to(bench.device)
    return quantized_recall(model, bank.to(bench.device), inputs, backend=bench.backends[0])


# Pooling --------------------------------------------------------------------------------------------------------------


def pool(bench: Bench, sizes: list[int]) -> None:
    """Forward, with fp8 routing keys, and backward, of documents of 1,024 tokens."""
    for tokens in sizes:
        chunks = tokens // CHUNK
        sets = max(2, math.ceil(4e8 * min(bench.scale, 1) / (tokens * SIZE * 6)))  # together more than any cache
        states = [tuple(bench.random(tokens, GROUPS, DIM) for _ in range(3)) for _ in range(sets)]
        offsets = torch.tensor([*range(0, tokens, 1024), tokens], device=bench.device)
        grads = bench.random(chunks, 2, GROUPS, DIM), bench.random(chunks, SIZE)
        backward_inputs = [(*grads, item[2], offsets, CHUNK, True) for item in states]
        moved = 6.0 * SIZE * (tokens + chunks)
        options: dict[str, Any] = {"token_offsets": offsets, "chunk_size": CHUNK, "chunks": chunks}
        wanted = pool_chunks(*states[0], **options, backend="pytorch")[:2]
        for backend in bench.backends:
            native = backend == "cuda"
            for dtype in (None, torch.float8_e4m3fn):
                case = f"{tokens:,} tokens" + (", fp8 routing keys" if dtype else "")
                row = Row("pool_chunks", case, backend, 0.0, bytes=moved - (SIZE * chunks if dtype else 0))
                row.ceiling = "copy"
                forward = in_turn(partial(pool_chunks, **options, routing_dtype=dtype, backend=backend), states)
                if dtype is None:
                    row.agrees = largest_difference(forward(0)[:2], wanted)
                goal = ("copy", 0.80) if native and tokens >= 16384 else None
                bench.measure(row, forward, 2 * sets, graph=native, goal=goal)
            if BACKENDS[backend].probe("pool_chunks_backward") is None:
                row = Row("pool_chunks", f"{tokens:,} tokens, backward", backend, 0.0)
                row.bytes, row.ceiling = moved + 2.0 * SIZE * tokens, "copy"
                backward = operator("pool_chunks_backward", BACKENDS[backend].namespace)
                bench.measure(row, in_turn(backward, backward_inputs), 2 * sets, graph=native)


def in_turn(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[int], Any]:
    """Calls of `function`, each with other inputs than the one before."""
    return lambda number: function(*inputs[number % len(inputs)])


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((one.float() - other.float()).abs().max()) for one, other in zip(ours, theirs, strict=True))


# Gathering ------------------------------------------------------------------------------------------------------------


def published_gather(documents: Tensor, offsets: Tensor, content: Tensor) -> Tensor:
    """Rows taken on the CPU and copied to the device, as the published code does."""
    rows = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in documents.flatten().tolist()])
    return content.index_select(0, rows).to(documents.device)


def gather(bench: Bench, chunks: int, directory: Path) -> None:
    """16 documents of 16 chunks, for one sample and for 16, from wherever content may lie."""
    count = chunks // PER_DOCUMENT
    offsets = offsets_of(count * PER_DOCUMENT, count, bench.device)
    content = bench.random(count * PER_DOCUMENT, 2, GROUPS, DIM)
    numbers = content.clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.rand(len(content), 2, generator=bench.generator, device=bench.device) + 0.5
    sources: dict[str, tuple[Tensor, Tensor | None]] = {
        "device memory" if bench.device == "cuda" else "memory": (content, None),
        "device memory, fp8" if bench.device == "cuda" else "memory, fp8": (numbers, scales),
    }
    if bench.device == "cuda":
        pinned = content.cpu().pin_memory()
        sources["pinned memory"] = (pinned, None)
        sources["pinned memory, fp8"] = (numbers.cpu().pin_memory(), scales.cpu().pin_memory())
        path = directory / "content"
        pinned.view(torch.uint8).numpy().tofile(path)
        mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+")).view(torch.bfloat16)
        sources["a mapped file"] = (mapped.view(content.shape), None)
    for batch in (1, 16):
        chosen = [(bench.documents(batch, TOP, count=count),) for _ in range(32)]
        for source, (states, factors) in sources.items():
            gather_case(bench, chosen, offsets, states, factors, source)


def gather_case(
    bench: Bench,
    chosen: Sequence[tuple[Tensor]],
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    source: str,
) -> None:
    width = TOP * PER_DOCUMENT
    rows = chosen[0][0].shape[0] * width
    case, on_device = f"{rows:,} chunks from {source}", content.device.type == bench.device
    read = rows * 2.0 * SIZE * content.element_size()
    # The bus carries what is read; the device's memory what is written as well.
    moved, ceiling = (read + rows * 4.0 * SIZE, "copy") if on_device else (read, "bus")
    options: dict[str, Any] = {"offsets": offsets, "content": content, "width": width}
    options |= {"scales": scales, "dtype": torch.bfloat16}
    wanted = gather_documents(chosen[0][0], **options, backend="pytorch")
    for backend in bench.backends:
        row = Row("gather_documents", case, backend, 0.0, bytes=moved, ceiling=ceiling)
        call = in_turn(partial(gather_documents, **options, backend=backend), chosen)
        try:
            found = call(0)
        except BackendError as error:
            print(f"{case} on {backend}: {error}", file=sys.stderr)
            continue
        row.agrees = float(all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)))
        asked = (45e9 if rows > width else 35e9) if source == "pinned memory" and backend == "cuda" else None
        graph = backend == "cuda" and source != "a mapped file"
        bench.measure(row, call, len(chosen), graph=graph, per_second=asked)
    if bench.device == "cuda" and source == "pinned memory":
        row = Row("gather_documents", case, "as published", 0.0, bytes=moved, ceiling=ceiling)
        published = partial(published_gather, offsets=offsets.cpu(), content=content)
        bench.measure(row, in_turn(published, chosen), len(chosen), graph=False)


def behind_pytorch(rows: Sequence[Row]) -> Iterator[str]:
    """Cases in which a compiled operation takes longer, or more memory, than the reference."""
    reference = {(row.operation, row.case): row for row in rows if row.backend == "pytorch"}
    for row in rows:
        other = reference.get((row.operation, row.case))
        if other is None or row.backend not in ("cuda", "cpp"):
            continue
        if row.ms > other.ms:
            yield f"SLOWER than PyTorch: {row.operation}, {row.case}: {row.ms:.4g} ms, {other.ms:.4g} ms"
        if (row.peak_MB or 0.0) > (other.peak_MB or 0.0) + 1.0:  # 1 MB: what the process itself comes and goes by
            yield f"MORE MEMORY than PyTorch: {row.operation}, {row.case}: {row.peak_MB} MB, {other.peak_MB} MB"


# Command line ---------------------------------------------------------------------------------------------------------


def run_tests(backends: list[str], device: str, selection: str | None) -> str:
    """Run the tests of these backends; end the program where one fails.

    Returns:
        pytest's last line.
    """
    wanted = selection or " or ".join(f"{backend}-{device}" for backend in backends)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if device == "cuda" and importlib.util.find_spec("xdist") is not None:  # most of their time is the host's
        command += ["-n", str(min(os.cpu_count() or 1, 8))]
    command += [str(ROOT / "tests/ops"), "-k", wanted]
    print(f"tests first: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or ["no output"]
    if done.returncode:
        print(done.stdout[-6000:] + done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"the tests of the operations fail ({lines[-1]}): nothing is measured")
    print(lines[-1], file=sys.stderr, flush=True)
    return lines[-1]


def commit_of(root: Path) -> str:
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def hardware(device: str) -> str:
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return f"{found.name}, {found.multi_processor_count} multiprocessors, {found.total_memory / 2**30:.0f} GiB"
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the C++ operations on the CPU")
    parser.add_argument("--threads", type=int, help="of PyTorch and the C++ operations, on the CPU")
    parser.add_argument("--only", nargs="+", choices=("route", "pool", "gather", "recall"), help="default: all")
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), help="default: all that this machine has")
    parser.add_argument("--scale", type=float, default=1.0, help="times the sizes: a rehearsal")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tests", help="pytest's -k instead of the backends that are measured")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "model_cards" / "msa-hf-tiny", help="for its keys")
    parser.add_argument("--commit", default=commit_of(ROOT), help="where there is no git to say it")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    if not arguments.cpu and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --cpu measures the operations for the CPU")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    backends = []
    for name, backend in BACKENDS.items():
        if not backend.runs_on(device) or (arguments.backends and name not in arguments.backends):
            continue
        reason = backend.probe("route_documents")
        if reason is not None and arguments.backends:
            raise SystemExit(f"the backend {name} is not here: {reason}")
        if reason is None:
            backends.append(name)
        else:
            print(f"without {name}: {reason}", file=sys.stderr)
    tests = run_tests(backends, device, arguments.tests)

    bench = Bench(arguments, backends)
    only = arguments.only or ("route", "pool", "gather", "recall")
    bench.measure_ceilings()
    units = {"copy": ("GB/s, read and written", 1e9), "matmul": ("TFLOP/s", 1e12), "bus": ("GB/s", 1e9)}
    print(f"{hardware(device)}; torch {torch.__version__}; commit {arguments.commit}")
    print("; ".join(f"{name} {rate / units[name][1]:.4g} {units[name][0]}" for name, rate in bench.ceilings.items()))
    print(f"\n{HEADER}", flush=True)
    recalled: dict[str, Any] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        if "route" in only:
            if device == "cuda":
                chunks = bench.sized(1_562_500)
                route(bench, [(chunks, [chunks // 2, chunks // 16])])
            else:  # 1M and 10M tokens
                sizes = [bench.sized(15_625), bench.sized(156_250)]
                route(bench, [(chunks, [chunks // 2, chunks // 16]) for chunks in sizes])
        if "pool" in only:
            sizes = [4096, 16384, 65536, 262144] if device == "cuda" else [4096, 16384]
            pool(bench, [max(round(size * bench.scale / CHUNK), 2) * CHUNK for size in sizes])
        if "gather" in only:
            chunks = bench.sized(1 << 18 if device == "cuda" else 15_625, 512)
            gather(bench, chunks, Path(directory))
        if "recall" in only:
            chunks = bench.sized(1_562_500 if device == "cuda" else 15_625)
            recalled["random unit keys"] = recall(bench, chunks, max(chunks // 2, 32))
            if arguments.checkpoint.exists():
                count = bench.sized(20_000 if device == "cuda" else 1_000, 200)
                recalled[f"{arguments.checkpoint.name}, worst layer"] = recall_of_checkpoint(
                    bench, arguments.checkpoint, count
                )
    for keys, kinds in recalled.items():
        print(f"\nrecall of the exact {TOP} among candidates, {keys}:")
        for kind, found in kinds.items():
            print(f"  {kind}: " + ", ".join(f"{count} -> {share:.5f}" for count, share in found.items()))
    for line in behind_pytorch(bench.rows):
        print(line)
    missed = [row for row in bench.rows if row.reached is False]
    print(f"\n{sum(row.reached is True for row in bench.rows)} goals reached, {len(missed)} missed")
    if arguments.json:
        record = {
            "hardware": hardware(device),
            "commit": arguments.commit,
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton_version()},
            "extension": extension_info(),
            "tests": tests,
            "scale": arguments.scale,
            "ceilings": bench.ceilings,
            "rows": [asdict(row) for row in bench.rows],
            "recall": recalled,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
