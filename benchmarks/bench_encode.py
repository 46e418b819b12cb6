"""Encoding: the library's rate, that of `msa-hf encode` with the bank on the disk, and what the host pays for it.

    python benchmarks/bench_encode.py --shape 4b --shape 135m --json docs/bench_encode.json   # one H200
    python benchmarks/bench_encode.py --model model_cards/msa-hf-tiny --documents 300         # a CPU

Every run is printed as it comes. Four ways, `--repeats` times and once before, take their time: fewer
documents are for a first look. Rows of a model, medians of `--repeats` runs taken in turn:

* library: `model.encode_documents` of the same documents, tokenizing included; the bank stays on the device.
* library, compiled: the same with `compile_layers=True`; the first call, which compiles, is stated apart.
* library, compiled, fp8: with `fp8_projections=True` as well.
* command: what `msa-hf encode` does once the model is loaded, up to the flushed manifest; beside it the share of the
  library's rate, of which the goal is 0.95.
* host: seconds of CPU for a million tokens, the forwards of the model left out (their results are zeros): of the
  model's process, whose Python also launches the kernels, and of its workers.
* share of the matrix rate: on a GPU, arithmetic of the encoded layers against a product of 8192^3 on the spot.

Random weights under `--shape`, with the tokenizer of msa-hf-tiny; documents are words of the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from bench_model import counted
from random_models import SHAPES, random_base
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank.encode_corpus import connected, encode_bank
from msa_hf.data.documents import Corpus
from msa_hf.generation.protocol import COMPACT
from msa_hf.model.dense_layer_msa import DenseLayer

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "model_cards" / "msa-hf-tiny"
WORDS = ROOT / "examples" / "quickstart" / "documents.jsonl"
MEMORY_LAYERS = {"135m": [14, 19, 24]}  # as msa-hf-smollm2-135m has; others: the upper half


def cpu_seconds() -> tuple[float, float]:
    """User and system seconds of this process, and of children that were waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime


def texts_of(count: int, tokens: int, tokenizer: Any) -> list[str]:
    """Texts of about `tokens` tokens: shuffled words of real ones."""
    found = [json.loads(line)["text"] for line in WORDS.read_text(encoding="utf-8").splitlines()]
    words = " ".join(found).split()
    per_word = len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) / len(words)
    pick = random.Random(0)
    return [" ".join(pick.choices(words, k=max(round(tokens / per_word), 1))) for _ in range(count)]


def made(shape: str, device: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A model of random weights, its tokenizer and its protocol."""
    tokenizer, base = AutoTokenizer.from_pretrained(TOKENIZER), random_base(SHAPES[shape], device, dtype)
    return MSAForCausalLM.from_base(base, memory_layers=MEMORY_LAYERS.get(shape)), tokenizer, COMPACT


def loaded(path: str, device: str, dtype: torch.dtype | str) -> tuple[Any, Any, Any]:
    """A checkpoint, its tokenizer and its protocol."""
    from msa_hf.generation import protocol_beside

    model = MSAForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(path), protocol_beside(path)


def drained(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Run(NamedTuple):
    """Seconds by the clock, of this process' CPU and of its children's; and how many tokens were encoded."""

    wall: float
    own: float
    others: float
    tokens: int

    def per_million(self, seconds: float) -> float:
        return 1e6 * seconds / self.tokens


def timed(run: Callable[[], int], device: str) -> Run:
    """Run something that returns how many tokens it encoded."""
    drained(device)
    (own, others), start = cpu_seconds(), time.perf_counter()
    tokens = run()
    drained(device)
    wall, used = time.perf_counter() - start, cpu_seconds()
    return Run(wall, used[0] - own, used[1] - others, tokens)


def gigaflops(model: Any) -> float:
    """GFLOP to encode a token: two for every weight of a matrix up to the last memory layer."""
    stop = max(model.config.memory_layers) + 1
    layers = model.base_model.layers[:stop]
    weights = sum(
        part.weight.numel() for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear)
    )
    return 2e-9 * weights


def matrix_rate(device: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a product of 8192^3; None without a GPU."""
    if not device.startswith("cuda"):
        return None
    left = torch.randn(8192, 8192, device=device, dtype=dtype)
    seconds = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        left @ left
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2e-12 * 8192**3 / statistics.median(seconds)


def without_forwards(model: Any) -> Callable[..., dict[int, DenseLayer]]:
    """An `encode_batch` whose result has the right shapes and costs nothing but its memory."""
    like = model.encode_batch(torch.zeros(1, 1, dtype=torch.int64, device=model.device), torch.ones(1).long())

    def encode_batch(ids: torch.Tensor, lengths: torch.Tensor) -> dict[int, DenseLayer]:
        chunks = int((-(-lengths // model.config.chunk_size)).sum())
        return {
            layer: DenseLayer(
                *(part.new_zeros(chunks, *part.shape[1:]) for part in (item.routing_keys, item.pooled_kv))
            )
            for layer, item in like.items()
        }

    return encode_batch


def measure(name: str, model: Any, tokenizer: Any, protocol: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of a model."""
    device, scratch = options.device, options.directory
    if options.source:
        texts = [row["text"] for row in Corpus(str(options.source))][: options.documents]
    else:
        texts = texts_of(options.documents, options.tokens, tokenizer)
    extra = {"workers": options.workers} if options.workers is not None else {}
    figures: dict[str, Any] = {"gflop_per_token": gigaflops(model)}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = Path(folder, "documents.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def library(**options: Any) -> int:
            rows = texts if protocol is None else protocol.encode_corpus(texts, tokenizer)
            bank: Any = model.encode_documents(rows, tokenizer, show_progress=False, **options)
            return int(bank.num_tokens)

        def command(**options: Any) -> int:
            with tempfile.TemporaryDirectory(dir=folder) as bank, connected() as ranks:
                corpus = Corpus(str(source))
                out = Path(bank, "bank")
                return encode_bank(
                    corpus, model, out, tokenizer, protocol, ranks=ranks, show_progress=False, **extra, **options
                ).tokens

        plain = {way: run for way, run in {"library": library, "command": command}.items() if way in options.ways}
        ways: dict[str, Callable[[], int]] = {} if options.compiled_only else dict(plain)
        if not options.compiled_only:
            print(f"{name:24} library: first call, {timed(library, device).wall:.1f} s", flush=True)
        if options.compile:
            for way, run in plain.items():
                compiled = f"{way}, compiled"
                ways[compiled] = lambda run=run: run(compile_layers=True)
                figures[f"{compiled}: first call, s"] = timed(ways[compiled], device).wall
                print(f"{name:24} {compiled}: first call, {figures[f'{compiled}: first call, s']:.1f} s", flush=True)
        if options.fp8:
            for way, run in plain.items():
                narrow = f"{way}, compiled, fp8"
                ways[narrow] = lambda run=run: run(compile_layers=True, fp8_projections=True)
                figures[f"{narrow}: first call, s"] = timed(ways[narrow], device).wall
                print(f"{name:24} {narrow}: first call, {figures[f'{narrow}: first call, s']:.1f} s", flush=True)
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, run in ways.items():
                runs[way].append(timed(run, device))
                rate = runs[way][-1].tokens / runs[way][-1].wall
                print(f"{name:24} {way}: {rate:,.0f} tokens/s in a run of {runs[way][-1].wall:.1f} s", flush=True)
        for way, found in runs.items():
            figures[f"{way}: tokens/s"] = statistics.median(run.tokens / run.wall for run in found)
            figures[f"{way}: CPU s per million tokens"] = statistics.median(
                run.per_million(run.own + run.others) for run in found
            )
        for way, run in ways.items():
            counts = counted(run, torch.device(device)) if options.kernels else None
            for milliseconds, times, kernel in [] if counts is None else counts.kernels[: options.kernels]:
                print(f"{way:24} {milliseconds:10.2f} ms {times:7} x {kernel[:100]}")
            if counts is not None:
                figures[f"{way}: device, s"] = counts.device_ms / 1e3
        for suffix in (way.removeprefix("library") for way in ways if way.startswith("library")):
            if f"command{suffix}" not in ways:
                continue
            figures[f"command{suffix}: share of the library's rate"] = (
                figures[f"command{suffix}: tokens/s"] / figures[f"library{suffix}: tokens/s"]
            )
        if (rate := matrix_rate(device, model.dtype)) is not None:
            figures["matrix rate, TFLOP/s"] = rate
            figures["floor: tokens/s at the matrix rate"] = 1e3 * rate / figures["gflop_per_token"]
            for way in ways:
                share = figures[f"{way}: tokens/s"] / figures["floor: tokens/s at the matrix rate"]
                figures[f"{way}: share of the matrix rate"] = share

        model.encode_batch = without_forwards(model)
        try:
            host = [timed(command, device) for _ in range(options.repeats)]
        finally:
            del model.encode_batch
        for row, seconds in {
            "host: CPU s per million tokens, the model's process": [run.per_million(run.own) for run in host],
            "host: CPU s per million tokens, its workers": [run.per_million(run.others) for run in host],
            "host: wall s per million tokens": [run.per_million(run.wall) for run in host],
        }.items():
            figures[row] = statistics.median(seconds)
        figures["tokens"], figures["documents"] = host[0].tokens, len(texts)
    for row, value in figures.items():
        print(f"{name:24} {row:56} {value:,.4g}" if isinstance(value, float) else f"{name:24} {row:56} {value}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--shape", action="append", default=[], choices=SHAPES)
    parser.add_argument("--model", action="append", default=[], help="a checkpoint with a memory")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens per document, about")
    parser.add_argument("--source", type=Path, help="documents to take instead")
    parser.add_argument("--workers", type=int, help="as of `msa-hf encode`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="the rows of compiled layers as well")
    parser.add_argument("--fp8", action="store_true", help="the rows of compiled layers that project in 8-bit floats")
    parser.add_argument("--compiled-only", action="store_true", help="no rows of layers that are not compiled")
    parser.add_argument("--ways", default="library,command", help="those that are measured, separated by commas")
    parser.add_argument("--kernels", type=int, default=0, help="of each way, so many that take most time are named")
    parser.add_argument("--directory", type=Path, help="where banks are written (default: the temporary one)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    if unknown := set(options.ways) - {"library", "command"}:
        parser.error(f"--ways has {', '.join(sorted(unknown))}; there are library and command")
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    figures = {}
    with torch.no_grad():
        for shape in options.shape or ([] if options.model else ["135m"]):
            figures[shape] = measure(shape, *made(shape, options.device, dtype), options)
        for path in options.model:
            figures[Path(path).name] = measure(Path(path).name, *loaded(path, options.device, dtype), options)
    hardware = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU, {os.cpu_count()} cores"
    record = {
        "hardware": hardware,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "arguments": {key: str(value) for key, value in vars(options).items()},
        "figures": figures,
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
