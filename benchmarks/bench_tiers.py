"""A large bank in tiers on one GPU: loading it, its memory, routing, fetching, and the time to the first token.

    python benchmarks/bench_tiers.py --backend cuda --json tiers.json

Writes a synthetic bank of 100M tokens in the shape of a 4B model and places it in four ways:

* bf16: routing keys in bf16 on the device, content in fp8 in host memory;
* fp8, int8: the same with routing keys in 8 bits, the candidates' scores taken again from bf16 ones in host memory;
* 24gb: within 24 GB of device memory, fp8 routing keys read from host memory for every question, the candidates' scores
  taken again from the bf16 ones in the files.

In bf16 the bank has 173 GB, more than the disk that this is meant for: `--stored-layers` layers are written (9.6 GB
each), and the others are read from the same files. Loading therefore reads as many bytes as of a real bank, most of
them from the page cache. Likewise layers share the exact keys in host memory that come from the same file (3.2 GB),
unless `--own-exact-keys` gives each its own, as a real bank has (57.6 GB; 115 GB with the content). Content is random,
so that answers mean nothing, but every byte has to be moved.

Figures are written as they come, and no set-up is begun after `--seconds`. On an H200 with 128 GiB of host memory and
64 GiB of disk all of it takes about two minutes. Where memory grows as it is used, say
with `--host-memory` how large it may become. A rehearsal:

    python benchmarks/bench_tiers.py --device cpu --chunks 300 --layers 2 --heads 4 --groups 2 --head-dim 8 \\
        --hidden-size 32 --intermediate-size 32 --vocabulary 64 --repeats 1
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from random_models import add_shape_options, random_base, shape_of

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import TieredBank, place_bank
from msa_hf.bank.tiered.hardware import Tiers, measured_tiers
from msa_hf.bank.tiered.plan import DoesNotFit, PlacementOptions, Reserves
from msa_hf.bank.tiered.rows import Rows, placed_rows
from msa_hf.bank.tiered.shapes import GB
from msa_hf.bank.tiered.sources import BankSource, source_of
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable
from msa_hf.model.routing_msa import Scoring
from msa_hf.ops import BACKENDS, use_backend

CHUNK = 64
BLOCK = 1 << 15  # chunks that are made at once
SETUPS = {
    "bf16": PlacementOptions("bf16", "device", "fp8", "host"),
    "fp8": PlacementOptions("fp8", "device", "fp8", "host", exact_on="host"),
    "int8": PlacementOptions("int8", "device", "fp8", "host", exact_on="host"),
    "24gb": PlacementOptions("fp8", "host", "fp8", "host"),
}
LIMITS = {"24gb": 24 * GB}
SLOW = 0.2  # seconds of a run


def random_layer(args: argparse.Namespace, seed: int) -> DenseLayer:
    """Normalized routing keys and content of all chunks, in host memory."""
    pick = torch.Generator(args.device).manual_seed(seed)
    keys = torch.empty(args.chunks, args.groups * args.head_dim, dtype=torch.bfloat16)
    content = torch.empty(args.chunks, 2, args.groups, args.head_dim, dtype=torch.bfloat16)
    for start in range(0, args.chunks, BLOCK):
        count = min(BLOCK, args.chunks - start)
        made = torch.randn(count, 3, args.groups, args.head_dim, device=args.device, generator=pick)
        heads = torch.nn.functional.normalize(made[:, 0], dim=2)
        keys[start : start + count].copy_(heads.flatten(1))
        content[start : start + count].copy_(made[:, 1:])
    return DenseLayer(keys, content)


def written(args: argparse.Namespace, directory: Path) -> None:
    """Save the bank of the stored layers."""
    per_document = args.document_tokens // CHUNK
    counts = [per_document] * (args.chunks // per_document)
    counts += [args.chunks % per_document] if args.chunks % per_document else []
    documents = [Document(str(row), None, None, count * CHUNK, count) for row, count in enumerate(counts)]
    offsets = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0))
    stored = tuple(range(args.stored_layers))
    origin = BankOrigin("synthetic", None, "synthetic", CHUNK, stored, "cosine", False, ())
    layers = {layer: random_layer(args, layer) for layer in stored}
    MemoryBank(layers, offsets, {}, DocumentTable(documents), origin).save_pretrained(directory)


def all_layers(args: argparse.Namespace, directory: Path) -> BankSource:
    """The bank with all layers, in the upper half of the model, each read from one of those that were stored."""
    stored = source_of(directory, verify=False)
    layers = tuple(range(args.layers, 2 * args.layers))
    return replace(
        stored,
        shapes={layer: (args.groups, args.head_dim) for layer in layers},
        parts=lambda layer: stored.parts(layer % args.stored_layers),
        origin=replace(stored.origin, memory_layers=layers),
    )


def random_model(args: argparse.Namespace) -> Any:
    base = random_base(shape_of(args), args.device, torch.bfloat16)
    return MSAForCausalLM.from_base(base, chunk_size=CHUNK, top_k=args.top_k, prefix_token_ids=[])


def drain(args: argparse.Namespace) -> None:
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(args: argparse.Namespace, run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of `run`, the device drained before and after, and what came of it."""
    drain(args)
    start = time.perf_counter()
    result = run()
    drain(args)
    return time.perf_counter() - start, result


def median_ms(args: argparse.Namespace, run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the first run, and the median of those behind it: of fewer where one takes long."""
    first = seconds(args, run)[0]
    times = sorted(seconds(args, run)[0] for _ in range(args.repeats if first < SLOW else min(args.repeats, 3)))
    return {"first": round(1e3 * first, 3), "median": round(1e3 * times[len(times) // 2], 3)}


def anonymous_bytes() -> int | None:
    """Bytes of this process that no file backs, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def commit() -> str:
    """Of the checkout, empty where there is none."""
    if shutil.which("git") is None:
        return ""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def tiers_of(args: argparse.Namespace, name: str, directory: Path) -> Tiers:
    """Bytes that are free, or that a set-up is limited to. On the CPU, host memory plays the device."""
    free = measured_tiers(args.device, directory)
    if args.host_memory is not None:
        free = replace(free, host=max(int(args.host_memory * GB) - (anonymous_bytes() or 0), 0))
    if args.device.type != "cuda":
        free = replace(free, device=free.host)
    if name in LIMITS:
        used = torch.cuda.memory_reserved() if args.device.type == "cuda" else 0
        free = replace(free, device=min(LIMITS[name], free.device or 0) - used)
    return free


def placed(args: argparse.Namespace, name: str, source: BankSource, tiers: Tiers, reserves: Reserves) -> TieredBank:
    """The bank in its places; layers from the same file share exact keys, unless they shall not."""
    choice = SETUPS[name]
    shares = choice.exact_on is not None and not args.own_exact_keys
    choice = replace(choice, exact_on=None) if shares else choice
    memory = place_bank(source, args.device, choice, tiers=tiers, reserves=reserves)
    layers: Any = memory.layers
    exact: dict[int, Rows] = {}
    for layer, item in list(layers.items()) if shares else []:
        stored = layer % args.stored_layers
        if stored not in exact:
            exact[stored] = placed_rows(item.routing_keys.exact.parts, "bf16", args.device, on_device=False)
        layers[layer] = replace(item, routing_keys=replace(item.routing_keys, exact=exact[stored]))
    return memory


def measure(
    args: argparse.Namespace,
    name: str,
    source: BankSource,
    model: Any,
    directory: Path,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """All figures of a set-up; they are noted as they come."""
    cuda = args.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(LIMITS.get(name, total) / total, 1.0))
    host = anonymous_bytes()
    before = torch.cuda.memory_allocated() if cuda else 0
    tiers = tiers_of(args, name, directory)
    reserves = Reserves() if cuda else Reserves(0, 0, 0, 0, 0)
    load, memory = seconds(args, lambda: placed(args, name, source, tiers, reserves))
    model.accept_bank(memory)
    figures: dict[str, Any] = {"load_s": round(load, 2), "plan": memory.plan.to_dict()}
    figures["host_bytes"] = None if host is None else (anonymous_bytes() or 0) - host
    figures["device_bytes"] = torch.cuda.memory_allocated() - before if cuda else None
    note(figures)

    layers, scoring = memory.layers, Scoring()
    for length in args.question_tokens:
        pick = torch.Generator().manual_seed(length)
        shape = (1, length, args.heads, args.head_dim)
        queries = {layer: torch.randn(shape, generator=pick).to(args.device, torch.bfloat16) for layer in layers}
        mask = torch.ones(1, length, dtype=torch.bool, device=args.device)

        def route(
            queries: dict[int, torch.Tensor] = queries, mask: torch.Tensor = mask, **changes: Any
        ) -> dict[int, torch.Tensor]:
            return {
                layer: replace(item, routing_keys=replace(item.routing_keys, **changes))
                .route(queries[layer], mask, args.top_k, scoring)
                .documents
                for layer, item in layers.items()
            }

        cold, chosen = seconds(args, route)

        def fetch(chosen: dict[int, torch.Tensor] = chosen) -> None:
            for layer, item in layers.items():
                item.pooled_kv.gather(chosen[layer], memory.layout)

        ids = torch.randint(3, args.vocabulary, (1, length), generator=pick).to(args.device)
        row: dict[str, Any] = {"documents": {str(layer): found[0].tolist() for layer, found in chosen.items()}}
        figures[f"{length} tokens"] = row
        for what, run in {
            "routing": route,
            "fetching": fetch,
            "first_token": lambda ids=ids: model(ids, memory=memory, logits_to_keep=1),
            "routing_with_half_the_candidates": lambda route=route: route(candidates=2 * args.top_k),
            "routing_without_rescoring": lambda route=route: route(candidates=0),
        }.items():
            row[f"{what}_ms"] = median_ms(args, run)
            if run is route:
                row["routing_ms"]["first"] = round(1e3 * cold, 3)
            figures["peak_device_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
            note(figures)


def compared(setups: dict[str, Any], tokens: list[int]) -> None:
    """Put in the place of each set-up's documents how many of them the first set-up chose too."""
    for length in (f"{count} tokens" for count in tokens):
        rows = [figures[length] for figures in setups.values() if length in figures]
        expected = rows[0]["documents"] if rows else {}
        for row in rows:
            same = [set(found) & set(expected[layer]) for layer, found in row["documents"].items()]
            row["same_documents"] = sum(map(len, same)) / sum(map(len, expected.values()))
        for row in rows:
            del row["documents"]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--backend", choices=BACKENDS, help="of all operations (default: the best that is tested)")
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--chunks", type=int, default=1_562_500)
    parser.add_argument("--document-tokens", type=int, default=1024)
    add_shape_options(parser)
    parser.add_argument("--stored-layers", type=int, default=1, help="that are written to disk")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--question-tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--own-exact-keys", action="store_true", help="of each layer, also from the same file")
    parser.add_argument("--host-memory", type=float, help="GB that this may take in all (default: what is free now)")
    parser.add_argument("--seconds", type=float, default=180, help="after which no further set-up is begun")
    parser.add_argument("--directory", type=Path, help="where the bank is written, and removed again")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    args.device = torch.empty(0, device=args.device).device  # with its index
    transformers.logging.set_verbosity_error()
    began = time.perf_counter()
    record: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": commit(),
        "arguments": {name: str(value) for name, value in vars(args).items() if name not in ("json", "directory")},
        "setups": {},
    }
    raw: dict[str, Any] = {}
    failed: list[str] = []

    def save() -> None:
        record["setups"] = json.loads(json.dumps(raw))
        compared(record["setups"], args.question_tokens)
        if args.json is not None:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:.1f} s: {what}", flush=True)

    if args.directory is not None:
        args.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.directory) as place:
        directory = Path(place)
        record["write_s"] = round(seconds(args, lambda: written(args, directory))[0], 2)
        record["written_bytes"] = sum(path.stat().st_size for path in directory.iterdir())
        say(f"{record['written_bytes']:,} bytes are written")
        model = random_model(args)
        source = all_layers(args, directory)
        say("the model is made")
        for name in args.setups:
            if raw and time.perf_counter() - began > args.seconds:
                print(f"{name}: left out, {args.seconds:g} seconds are over; run it with --setups {name}", flush=True)
                continue

            def note(figures: dict[str, Any], name: str = name) -> None:
                if name not in raw:
                    say(f"{name} is loaded, in {figures['load_s']} s")
                raw[name] = figures
                save()

            try:
                with use_backend(args.backend):
                    measure(args, name, source, model, directory, note)
            except (DoesNotFit, MemoryError, torch.OutOfMemoryError) as error:
                say(f"{name} FAILED: {error}")
                failed.append(name)
                continue
            say(f"{name} is measured")
            print(json.dumps({name: record["setups"][name]}, indent=1), flush=True)
    if failed:
        raise SystemExit(f"There was not enough memory for {' and '.join(failed)}.")


if __name__ == "__main__":
    main()
