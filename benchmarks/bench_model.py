"""A model with a memory beside its base: first token, decoding, many questions at once, a whole question in rounds.

    python benchmarks/bench_model.py --json docs/bench_model.json                            # one H200
    python benchmarks/bench_model.py --shape tiny --bank-tokens 2e4 --large-tokens 2e5       # a rehearsal
    python benchmarks/bench_model.py --rows prefill,decode --layers 12                       # a part of it

Rows are printed as they come, in groups that `--rows` chooses among:

* check: see below, of a small model in float32, then of the one that is measured.
* base: the base alone, as it is; base-static: the same as transformers compiles it, whole.
* eager: first tokens and decoding with a memory, nothing compiled.
* prefill, decode: the same compiled, with the small bank.
* large: first tokens over the large bank, keys in bf16; int8: in 8 bits; many: 64 questions at once.
* host: int8 keys of all layers but a third in host memory, as on a GPU of 24 GB.
* rounds: a whole question by Memory Interleave.

Random weights. Documents are encoded for real; the bank is then repeated up to `--bank-tokens`, so that routing sees
its true size. For `--large-tokens` all layers share one tensor of random routing keys, and one of content in locked
host memory, which are read as often as if each had its own.

Before anything is measured, runs must choose the same documents and give the same logits on this device compiled,
recorded and played as they do launched one kernel after the other. Else the first tensor that differs is named, and
nothing is measured (run_check.py says what follows from it); `--rows check` checks alone.

Medians of wall-clock time, the device drained before and after. `first_s` are the seconds of the first calls, in which
a run is compiled, and recorded. `launches` are kernels and graphs started by the host in one run, `waits` copies to the
host and synchronizations, `device_ms` all that the device did.

Floors of a row: its weights read once (or its arithmetic, if that takes longer) and the routing keys read once in every
memory layer, at the rates of this device (`msa_hf.bank.tiered.hardware`). That of many questions has the time that the
base takes for them in the place of its arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from random_models import SHAPES, random_base
from run_check import runs_are_right
from torch import Tensor, nn
from transformers import AutoTokenizer, CompileConfig

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank.tiered.hardware import RATES
from msa_hf.bank.tiered.layer import PooledKV, RoutingKeys, TieredLayer
from msa_hf.bank.tiered.rows import Rows, placed_rows
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.model.compat_msa import CACHE
from msa_hf.model.compiled_msa import compiling
from msa_hf.model.document_rows_msa import ChunkLayout
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable, OpenSession
from msa_hf.model.ops_msa import OPERATIONS, PLAIN, install_operations
from msa_hf.model.options_msa import static_cache
from msa_hf.ops.formats import FORMATS

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "model_cards" / "msa-hf-tiny"
ROWS = ("check", "base", "base-static", "eager", "prefill", "decode", "large", "many", "int8", "host", "rounds")
WARM = 4  # runs before one is measured: compiled, recorded, contexts recorded, played
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass
class Row:
    """A line of the table.

    Attributes:
        what: is measured.
        ms: median.
        floor_ms: as of the module; None where there is none.
        goal: in words.
        launches, waits, device_ms: of one run, on a GPU; see `Counts`.
        first_s: seconds of the first call.
    """

    what: str
    ms: float
    floor_ms: float | None = None
    goal: str = ""
    launches: int | None = None
    waits: int | None = None
    device_ms: float | None = None
    first_s: float | None = None


# Measuring ------------------------------------------------------------------------------------------------------------


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int, warm: int = 2) -> tuple[float, float]:
    """Median wall-clock milliseconds of `run`, and the seconds of its first call."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(warm + repeats):
        drain()
        start = time.perf_counter()
        run()
        drain()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[warm:])[repeats // 2], times[0]


@dataclass
class Counts:
    """What one run has a GPU do.

    Attributes:
        launches: kernels and graphs that the host starts.
        waits: for the device.
        device_ms: all kernels and copies together.
        kernels: (milliseconds, times, name), those that take most first.
    """

    launches: int
    waits: int
    device_ms: float
    kernels: list[tuple[float, int, str]]


def counted(run: Callable[[], Any], device: torch.device) -> Counts | None:
    """One run as the profiler sees it; nothing is known of the CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = profile.key_averages()
    counts = {item.key: item.count for item in events}
    launches = sum(count for name, count in counts.items() if "Launch" in name and name.startswith(("cuda", "cu")))
    waits = counts.get("cudaStreamSynchronize", 0) + counts.get("cudaEventSynchronize", 0)
    on_device = [item for item in events if item.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted(((item.self_device_time_total / 1e3, item.count, item.key) for item in on_device), reverse=True)
    return Counts(launches, waits, sum(ms for ms, _, _ in kernels), kernels)


class Floors:
    """The times that a run cannot beat, at the rates of a device.

    Args:
        base: the model.
        device: where it computes.
    """

    def __init__(self, base: nn.Module, device: torch.device) -> None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else ""
        self.rates = next((rates for key, rates in RATES.items() if key in name), None)
        self.bytes = sum(weight.nbytes for weight in base.parameters())
        self.numbers = sum(weight.numel() for weight in base.parameters())

    def ms(
        self, tokens: int, key_bytes: float = 0, key_products: float = 0, base_ms: float | None = None
    ) -> float | None:
        """Milliseconds for so many tokens at once: weights, or what the base takes, then in all memory layers keys and
        their products."""
        if self.rates is None or self.rates.copy is None or self.rates.matmul is None:
            return None
        weights = max(self.bytes / self.rates.copy, 2 * self.numbers * tokens / self.rates.matmul)
        own_ms = 1e3 * weights if base_ms is None else base_ms
        return own_ms + 1e3 * max(key_bytes / self.rates.copy, key_products / self.rates.matmul)


# Memories -------------------------------------------------------------------------------------------------------------


def repeated(bank: MemoryBank, times: int, text: str | None = None) -> MemoryBank:
    """The same bank `times` times over."""
    counts = bank.offsets.diff().repeat(times)
    rows = [
        Document(f"{copy}-{document.key}", text, None, document.tokens, document.chunks)
        for copy in range(times)
        for document in bank.documents
    ]
    return MemoryBank(
        layers={
            layer: DenseLayer(memory.routing_keys.repeat(times, 1), memory.pooled_kv.repeat(times, 1, 1, 1))
            for layer, memory in bank.layers.items()
        },
        offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        prefix=bank.prefix,
        documents=DocumentTable(rows),
        origin=bank.origin,
    )


class LargeMemory:
    """Keys on the device, or in host memory, content in 8 bits in host memory; every layer has the same of both.

    Args:
        small: a bank of the model, for what does not depend on size.
        documents: of equal length, of `text`.
        tokens: of a document.
        keys: their format, a name of `FORMATS`.
        resident: of a quantized format, layers, the first ones, whose keys lie on the device; None for all. The others'
            lie in host memory.

    Attributes:
        key_bytes: of a layer.
        host_bytes: of all keys in host memory, as if no two layers had the same.
    """

    def __init__(
        self,
        small: MemoryBank,
        documents: int,
        tokens: int,
        keys: str,
        text: str,
        device: torch.device,
        resident: int | None = None,
    ) -> None:
        chunks = math.ceil(tokens / small.origin.chunk_size)
        some = next(iter(small.layers.values()))
        (groups, dim), dtype = some.keys.shape[1:], some.routing_keys.dtype
        count = documents * chunks
        on_gpu = device.type == "cuda"
        torch.manual_seed(1)
        exact = torch.empty(count, groups * dim, dtype=dtype, device=device)
        for part in exact.split(1 << 16):
            part.copy_(nn.functional.normalize(torch.randn(part.shape, device=device), dim=1))
        rows, own = Rows([exact], device), None
        if FORMATS[keys].scaled:
            rows, own = placed_rows([exact.cpu()], keys, device, on_device=True), Rows([exact], device)
        self.key_bytes = rows.nbytes
        content = placed_rows([torch.ones(count, 2, groups, dim, dtype=dtype)], "fp8", device, on_device=not on_gpu)
        layout = ChunkLayout(torch.arange(documents + 1) * chunks)
        usual = FORMATS[keys].candidates
        found = RoutingKeys(rows, own, streamed=False, candidates=None, usual=usual)
        self.layers = dict.fromkeys(small.layers, TieredLayer(found, PooledKV(content, dtype), layout))
        self.host_bytes = 0
        if resident is not None:
            away = list(small.layers)[resident:]
            far = RoutingKeys(
                placed_rows([exact.cpu()], keys, device, on_device=not on_gpu), own, True, candidates=None, usual=usual
            )
            self.layers |= dict.fromkeys(away, TieredLayer(far, PooledKV(content, dtype), layout))
            self.host_bytes = rows.nbytes * len(away)
        self.documents = DocumentTable([Document(str(place), text, None, tokens, chunks) for place in range(documents)])
        self.origin: BankOrigin = small.origin
        self.prefix: Mapping[int, tuple[Tensor, Tensor]] = small.prefix
        self.key_products = 2.0 * count * groups * dim

    def snapshot(self) -> LargeMemory:
        return self

    def session(self, request: object) -> OpenSession:
        return OpenSession(self.layers)


# Runs -----------------------------------------------------------------------------------------------------------------


@contextmanager
def static_forward(model: Any, memory: Any, ids: Tensor, config: CompileConfig) -> Iterator[Callable[[], Any]]:
    """A run of a prompt into a static cache, compiled, without what stands around it in `generate`."""
    cache = static_cache(model.config, ids.shape[1] + 16)

    def run() -> Any:
        cache.reset()
        return model(ids, memory=memory, logits_to_keep=1, use_cache=True, **{CACHE: cache})

    with compiling(model, config):
        yield run


@contextmanager
def static_token(model: Any, memory: Any, ids: Tensor, config: CompileConfig) -> Iterator[Callable[[], Any]]:
    """A run of one token behind a prompt, compiled, without what stands around it in `generate`."""
    cache = static_cache(model.config, ids.shape[1] + 128)
    with compiling(model, config):
        model(ids, memory=memory, logits_to_keep=1, use_cache=True, **{CACHE: cache})
        yield lambda: model(ids[:, :1], use_cache=True, **{CACHE: cache})


def per_token_ms(model: Any, ids: Tensor, steps: int, device: torch.device, **options: Any) -> tuple[float, float]:
    """Milliseconds of one decoded token, and the seconds of the first call."""

    def run(count: int, repeats: int) -> tuple[float, float]:
        generate = functools.partial(model.generate, ids, max_new_tokens=count, **GREEDY, **options)
        return median_ms(generate, device, repeats, WARM if options.get("cache_implementation") else 1)

    many, first = run(steps + 1, 3)
    return (many - run(1, 3)[0]) / steps, first


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per document")
    parser.add_argument("--bank-tokens", type=float, default=1_048_576)
    parser.add_argument("--large-tokens", type=float, default=100e6, help="0: leave these rows out")
    parser.add_argument("--question", type=int, default=48, help="tokens of the question")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--rows", default=",".join(ROWS), help="groups, with commas between them (default: all)")
    parser.add_argument("--kernels", type=int, default=0, help="of each row, so many that take most are named")
    parser.add_argument("--layers", type=int, help="of the model, instead of the shape's")
    parser.add_argument("--compile-backend", default="inductor", help="eager: for rehearsals")
    parser.add_argument("--plain-tokens", action="store_true", help="tokens without the library's own kernels")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    wanted = set(arguments.rows.split(","))
    if unknown := wanted - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    transformers.logging.set_verbosity_error()
    device, repeats = torch.empty(0, device=arguments.device).device, arguments.repeats  # with its index
    if arguments.plain_tokens:
        install_operations({**OPERATIONS, **{name: PLAIN[name] for name in ("attend_token", "token_backend")}})
    compile_config = CompileConfig()  # asks for recorded runs
    if arguments.compile_backend != "inductor":
        compile_config = CompileConfig(backend=arguments.compile_backend, mode=None)
        compile_config._compile_all_devices = True
    started = time.perf_counter()

    def say(what: object) -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {what}", flush=True)

    if "check" in wanted:
        small = random_base(SHAPES["tiny"], device, torch.float32)
        model = MSAForCausalLM.from_base(small, prefix_token_ids=[5, 6, 7], router_init="random")
        texts = [torch.randint(3, 4000, (64, 300)).tolist() for _ in range(2)]
        banks = [model.encode_documents(each, show_progress=False) for each in texts]
        runs_are_right(model, banks, compile_config, 16, say)
        del model, small, banks

    shape = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    base = random_base(shape, device, torch.bfloat16)
    ids = torch.randint(3, 2000, (1, arguments.question), device=device)
    floors, rows, figures = Floors(base, device), [], {}
    say("base")
    static: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}

    def row(what: str, run: Callable[[], Any], floor: float | None, goal: str = "", count: int = repeats) -> None:
        ms, first = median_ms(run, device, count, WARM)
        counts = counted(run, device)
        seen = () if counts is None else (counts.launches, counts.waits, counts.device_ms)
        rows.append(Row(what, ms, floor, goal, *seen, first_s=first))
        say(rows[-1])
        for time_ms, times, name in [] if counts is None else counts.kernels[: arguments.kernels]:
            say(f"    {time_ms:8.3f} ms {times:5} x {name[:100]}")

    def row_per_token(what: str, model: Any, goal: str = "", **options: Any) -> None:
        ms, first = per_token_ms(model, ids, 32, device, **options)
        rows.append(Row(what, ms, floors.ms(1), goal, first_s=first))
        say(rows[-1])

    if "base" in wanted:
        row("base: question", lambda: base(ids, logits_to_keep=1), floors.ms(arguments.question))
        row_per_token("base: a token", base)
        figures["base_prefill_ms"], figures["base_ms_per_token"] = rows[0].ms, rows[1].ms
    if "base-static" in wanted:
        row_per_token("base: a token, static cache", base, **static)
    many = torch.randint(3, 2000, (64, 32), device=device)
    if "many" in wanted:
        row("base: 64 x 32 tokens", lambda: base(many, logits_to_keep=1), floors.ms(many.numel()))
        figures["base_many_ms"] = rows[-1].ms

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    protocol = PromptProtocol.from_pretrained(TOKENIZER)
    model = MSAForCausalLM.from_base(base, prefix_token_ids=protocol.prefix_token_ids(tokenizer))
    documents = torch.randint(3, 2000, (arguments.documents, arguments.tokens)).tolist()
    model.encode_documents(documents[:32], show_progress=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    bank = model.encode_documents(documents, show_progress=False)
    if device.type == "cuda":
        torch.cuda.synchronize()
        figures["encode_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    figures["encode_tokens_per_s"] = bank.num_tokens / (time.perf_counter() - start)
    text = "The Jethefux Crossing is held at Krikutust Heights, which is known for its roses. " * 3
    big = repeated(bank, max(int(arguments.bank_tokens) // bank.num_tokens, 1))
    model.accept_bank(big)
    figures["bank"] = repr(big)
    say(f"small bank, encoded at {figures['encode_tokens_per_s']:,.0f} tokens/s")
    if "check" in wanted:
        model.accept_bank(bank)
        runs_are_right(model, [big, bank], compile_config, arguments.question, say)

    def memory_row(
        what: str,
        memory: Any,
        ids: Tensor,
        goal: str,
        key_bytes: float,
        products: float,
        base_ms: float | None = None,
        host_bytes: float = 0,
    ) -> None:
        batch, tokens = ids.shape
        layers = len(memory.layers)
        floor = floors.ms(batch * tokens, layers * key_bytes, layers * products * batch * tokens, base_ms)
        if floor is not None and host_bytes:
            floor = max(floor, 1e3 * host_bytes / floors.rates.host_link)
        name = f"{what}, {batch} x {tokens} tokens"
        if "eager" in wanted:
            row(f"{name}, eager", lambda: model(ids, memory=memory, logits_to_keep=1), floor, count=3)
        with static_forward(model, memory, ids, compile_config) as run:
            row(f"{name}, compiled", run, floor, goal)

    some = next(iter(big.layers.values())).routing_keys
    held = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    if "prefill" in wanted:
        memory_row("first token, small bank", big, ids, "12 ms", some.nbytes, 2.0 * some.numel())
        figures["prefill_ms"] = rows[-1].ms
        one = functools.partial(model.generate, ids, memory=big, max_new_tokens=1, **GREEDY, **static)
        row("generate, first token", one, None)
        del one
    if "decode" in wanted:
        with static_token(model, big, ids, compile_config) as run:
            row("a token behind a memory, its forward alone", run, floors.ms(1))
        row_per_token("a token behind a memory, static cache", model, "3.0 ms, 1.15 x base", memory=big, **static)
    if device.type == "cuda":
        figures["recorded_GB"] = (torch.cuda.memory_reserved() - held) / 1e9  # caches, inputs, pools of graphs
    if "eager" in wanted:
        row_per_token("a token behind a memory", model, memory=big)
        figures["ms_per_token"] = rows[-1].ms
    del big

    count = int(arguments.large_tokens) // arguments.tokens
    if count and wanted & {"large", "many"}:
        large = LargeMemory(bank, count, arguments.tokens, "bf16", text, device)
        model.accept_bank(large)
        say("large bank, bf16 keys")
        if "large" in wanted:
            memory_row("first token, large bank, bf16 keys", large, ids, "25 ms", large.key_bytes, large.key_products)
        if "many" in wanted:
            own = figures["base_many_ms"]
            memory_row("large bank", large, many, "0.7 of the floor", large.key_bytes, large.key_products, own)
        del large
    if count and wanted & {"int8", "host", "rounds"}:
        large = LargeMemory(bank, count, arguments.tokens, "int8", text, device)
        model.accept_bank(large)
        say("large bank, int8 keys")
        if "int8" in wanted:
            memory_row("first token, large bank, int8 keys", large, ids, "19 ms", large.key_bytes, large.key_products)
        if "host" in wanted:
            third = len(bank.layers) // 3
            far = LargeMemory(bank, count, arguments.tokens, "int8", text, device, resident=third)
            model.accept_bank(far)
            what = f"first token, large bank, int8 keys, those of {len(bank.layers) - third} layers in host memory"
            memory_row(what, far, ids, "350 ms computed", far.key_bytes, far.key_products, host_bytes=far.host_bytes)
            del far
        if "rounds" in wanted:
            rounds: dict[str, Any] = {"max_rounds": 2, "documents_per_round": 1, "router_may_end": False}
            asker = MemoryInterleave(model, tokenizer, large, protocol, max_new_tokens=16, **rounds, **static)
            asked = "What is the venue of the Jethefux Crossing known for?"
            length = {"min_new_tokens": 16, "eos_token_id": None}
            row("two rounds of a document, 16 tokens", lambda: asker.ask(asked, **length), None, "150 ms", count=5)

    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record = {
        "hardware": name,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "figures": figures,
        "rows": [asdict(item) for item in rows],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    print("| what | ms | floor, ms | share | goal | launches | waits | device, ms | first call, s |")
    print("|" + "---|" * 9)
    for item in rows:
        floor, share = ("", "") if item.floor_ms is None else (f"{item.floor_ms:.2f}", f"{item.floor_ms / item.ms:.2f}")
        counts = " | ".join("" if number is None else str(number) for number in (item.launches, item.waits))
        first, on_device = ("" if number is None else f"{number:.1f}" for number in (item.first_s, item.device_ms))
        print(f"| {item.what} | {item.ms:.2f} | {floor} | {share} | {item.goal} | {counts} | {on_device} | {first} |")


if __name__ == "__main__":
    main()
