"""One GPU against several: routing and fetching, the first token, questions per second, and encoding.

    torchrun --nproc-per-node 2 benchmarks/bench_parallel.py --json parallel.json                   # two H200s
    torchrun --nproc-per-node 2 benchmarks/bench_parallel.py --rows route --layers 6 --tokens 30e6  # a part of it

Keys are random, made in blocks that do not depend on the number of processes, so that all must choose the same
documents; the run fails where they do not. All layers share one tensor of content, which would not fit beside the
keys. Process 0 measures alone while the others wait, then all of them together. Rows, in groups that `--rows` chooses
among:

* route: what a forward does besides its model, in all memory layers: choose documents and fetch their rows.
* first: a whole question up to its first token, by a model of random weights.
* questions: as many of these per second as can be answered, each process its own, over keys on every GPU and content
  that is in host memory once.
* encode: what `encode_bank` does, with the bank on the disk.

Content of a shared bank is exchanged ("sharded") or read from host memory ("replicated"). Medians of wall-clock time,
the device drained before and after. Floors come first. Of one process: the keys read once, or their products where
these take longer, and the weights, at the rates of this device (`msa_hf.bank.tiered.hardware`). Of several: their share
of the keys, and in every layer the exchanges, which are measured by themselves. A device whose rates are not known has
none, and shares neither.

A rehearsal without a GPU:

    torchrun --nproc-per-node 2 benchmarks/bench_parallel.py --tokens 2e5 --layers 2 --heads 4 --groups 2 \\
        --head-dim 16 --hidden-size 64 --intermediate-size 64 --vocabulary 16384 --documents 40 --repeats 3
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from random_models import add_shape_options, random_base, shape_of
from transformers import AutoTokenizer

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank.encode_corpus import encode_bank
from msa_hf.bank.host_bank import neighbors_of, shared_blocks
from msa_hf.bank.sharded.bank import ShardedBank
from msa_hf.bank.sharded.collectives import Collectives
from msa_hf.bank.sharded.share import shares
from msa_hf.bank.tiered.hardware import rates_of
from msa_hf.bank.tiered.layer import PooledKV, RoutingKeys, TieredLayer
from msa_hf.bank.tiered.rows import Rows
from msa_hf.data.documents import Corpus
from msa_hf.generation.protocol import COMPACT
from msa_hf.model.compat_msa import CACHE
from msa_hf.model.compiled_msa import compiling
from msa_hf.model.memory_msa import BankOrigin, DenseLayer, Document, DocumentTable
from msa_hf.model.options_msa import static_cache
from msa_hf.model.routing_msa import routing_request, scoring_of

CHUNK = 64
BLOCK = 1 << 16  # chunks made at once, from one seed
ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "model_cards" / "msa-hf-tiny"
WORDS = ROOT / "examples" / "quickstart" / "documents.jsonl"
ROWS = ("route", "first", "questions", "encode")
TIMEOUT = timedelta(minutes=10)


class Alone(Collectives):
    """One process that talks to nobody, though others are there."""

    def __init__(self) -> None:
        self.timeout = timedelta(minutes=1)
        self.rank, self.size, self.control, self.data, self.closed = 0, 1, None, None, False
        self._notices, self._holds_store = None, False


@dataclass
class Row:
    """A line of the table: one process against all of them.

    Attributes:
        what: is measured.
        unit: "ms", of which fewer are better, or something per second.
        one, all: the figures of one process, and of all.
        times: as good.
        goal: of `times`, on two GPUs.
        floor_one, floor_all: milliseconds that cannot be beaten; None where nothing is known of the device.
    """

    what: str
    unit: str
    one: float
    all: float
    times: float
    goal: float
    floor_one: float | None = None
    floor_all: float | None = None

    def line(self) -> str:
        floors = ""
        if self.floor_one is not None and self.floor_all is not None:
            floors = f", floors {self.floor_one:.2f} and {self.floor_all:.2f}"
            floors += f" ({self.floor_one / self.one:.2f} and {self.floor_all / self.all:.2f} of the time)"
        figures = f"{self.one:,.2f} {self.unit} by one, {self.all:,.2f} by all"
        return f"{self.what:36} {figures}: {self.times:.2f} times (goal {self.goal}){floors}"


class Bench:
    """What is measured with, in this process.

    Args:
        args: of the command line.
        ranks: all processes.
        device: of this one.
    """

    def __init__(self, args: argparse.Namespace, ranks: Collectives, device: torch.device) -> None:
        self.args, self.ranks, self.device = args, ranks, device
        self.dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        self.numbers = range(args.layers, 2 * args.layers)  # the upper half
        chunks = -(-args.document_tokens // CHUNK)
        count = max(int(args.tokens) // args.document_tokens, 1)
        self.documents = DocumentTable(
            [Document(str(i), None, None, args.document_tokens, chunks) for i in range(count)]
        )
        self.offsets = torch.arange(count + 1) * chunks
        self.chunks, self.width = int(self.offsets[-1]), args.groups * args.head_dim
        self.config = SimpleNamespace(
            num_attention_heads=args.heads,
            top_k=args.top_k,
            similarity="cosine",
            head_reduction="mean",
            query_reduction="max",
            chunk_reduction="max",
            score_bias=False,
        )
        self.rates = rates_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.model = self._random_model() if {"first", "questions", "encode"} & set(args.rows) else None
        self.origin = BankOrigin("synthetic", None, "synthetic", CHUNK, tuple(self.numbers), "cosine", False, ())
        if self.model is not None:
            self.origin = self.model.memory_origin()
        self.rows: list[Row] = []

    def _random_model(self) -> Any:
        base = random_base(shape_of(self.args), self.device, self.dtype)
        return MSAForCausalLM.from_base(base, chunk_size=CHUNK, top_k=self.args.top_k, prefix_token_ids=[])

    # Banks ------------------------------------------------------------------------------------------------------------

    def keys(self, layer: int, first: int, end: int) -> torch.Tensor:
        """Normalized random routing keys of the chunks from `first` to `end`."""
        keys = torch.empty(end - first, self.width, device=self.device, dtype=self.dtype)
        for block in range(first // BLOCK, -(-end // BLOCK)):
            pick = torch.Generator(self.device).manual_seed(layer * 1_000_003 + block)
            made = torch.randn(BLOCK, self.width, device=self.device, generator=pick)
            made = torch.nn.functional.normalize(made, dim=1).to(self.dtype)
            start = block * BLOCK
            low, high = max(start, first), min(start + BLOCK, end)
            keys[low - first : high - first] = made[low - start : high - start]
        return keys

    def content(self, first: int, end: int) -> torch.Tensor:
        """Content of these chunks on the device."""
        shape = end - first, 2, self.args.groups, self.args.head_dim
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def host_content(self) -> torch.Tensor:
        """Content of all chunks in host memory, once for all processes of this host."""
        shape = self.chunks, 2, self.args.groups, self.args.head_dim
        (block,) = shared_blocks(
            [2 * self.chunks * self.width * self.dtype.itemsize], neighbors_of(self.ranks), self.ranks
        )
        if self.device.type == "cuda":
            block.lock()
        return block.tensor(shape, self.dtype)

    def whole(self, layers: dict[int, Any]) -> MemoryBank:
        counts = self.chunks, CHUNK * self.chunks
        return MemoryBank(layers, self.offsets, {}, self.documents, self.origin, counts)

    def alone(self) -> MemoryBank:
        """A bank in one place."""
        content = self.content(0, self.chunks)
        return self.whole({layer: DenseLayer(self.keys(layer, 0, self.chunks), content) for layer in self.numbers})

    def beside(self, keys: MemoryBank, content: torch.Tensor) -> MemoryBank:
        """The same keys, with content in host memory."""
        rows = PooledKV(Rows([content], self.device), self.dtype)
        layers = {
            layer: TieredLayer(
                RoutingKeys(Rows([memory.routing_keys], self.device), None, False, None, 1), rows, keys.layout
            )
            for layer, memory in keys.layers.items()
        }
        return self.whole(layers)

    def shared(self, content: torch.Tensor | None) -> ShardedBank:
        """A bank that all processes share; with its content, or with its own part of it where that is None."""
        rows = shares(self.offsets, self.ranks.size)
        first, end = (int(self.offsets[rows[self.ranks.rank + step]]) for step in (0, 1))
        mine = self.content(first, end) if content is None else content
        layers = {layer: DenseLayer(self.keys(layer, first, end), mine) for layer in self.numbers}
        kind = "sharded" if content is None else "replicated"
        return ShardedBank(layers, self.whole(layers), rows, self.ranks, "same", kind)

    # Measuring --------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        self.drain()
        start = time.perf_counter()
        run()
        self.drain()
        return time.perf_counter() - start

    def median_ms(self, run: Callable[[], Any], warm: int = 2) -> float:
        times = [self.seconds(run) for _ in range(warm + self.args.repeats)]
        return 1e3 * sorted(times[warm:])[self.args.repeats // 2]

    def say(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(text, flush=True)

    def note(
        self, what: str, unit: str, one: float, all: float, goal: float, floors: tuple[float, float] | None = None
    ) -> None:
        """Keep a row, and print it."""
        times = one / all if unit == "ms" else all / one
        self.rows.append(Row(what, unit, round(one, 3), round(all, 3), round(times, 3), goal, *(floors or ())))
        self.say(self.rows[-1].line())

    def exchange_ms(self, batch: int) -> dict[str, float]:
        """Milliseconds of what a layer exchanges, by itself, and the bytes of it that each process has."""
        packed = torch.zeros(batch, 3 * self.args.top_k, dtype=torch.int32, device=self.device)
        rows = -(-self.args.document_tokens // CHUNK) * self.args.top_k
        states = torch.zeros(2, batch, self.args.groups, rows, self.args.head_dim, dtype=self.dtype, device=self.device)

        def many(run: Callable[[], Any]) -> Callable[[], None]:
            return lambda: [run() for _ in range(20)] and None

        return {
            "scores": self.median_ms(many(lambda: self.ranks.gather(packed))) / 20,
            "scores_bytes": packed.nbytes,
            "content": self.median_ms(many(lambda: self.ranks.join(states))) / 20,
            "content_bytes": states.nbytes,
        }

    def floors(self, batch: int, tokens: int, exchanges: float, weights: bool) -> tuple[float, float] | None:
        """Milliseconds of one process and of all, of which each layer exchanges for so many."""
        if self.rates is None or self.rates.copy is None or self.rates.matmul is None:
            return None
        size = self.chunks * self.width
        layer = max(size * self.dtype.itemsize / self.rates.copy, 2 * batch * tokens * size / self.rates.matmul)
        read = 0.0
        if weights and self.model is not None:
            read = sum(weight.nbytes for weight in self.model.parameters()) / self.rates.copy
        one = 1e3 * (self.args.layers * layer + read)
        return one, 1e3 * (self.args.layers * layer / self.ranks.size + read) + self.args.layers * exchanges

    # Rows -------------------------------------------------------------------------------------------------------------

    def cases(self) -> list[tuple[int, int]]:
        """Questions and routing tokens of each."""
        lengths = self.args.question_tokens
        return [*((1, length) for length in lengths), (self.args.batch, lengths[0])]

    def route(self, bank: MemoryBank, batch: int, tokens: int) -> tuple[float, list[torch.Tensor]]:
        """Milliseconds, and the documents chosen."""
        pick = torch.Generator().manual_seed(tokens)
        shape = self.args.layers, batch, tokens, self.args.heads, self.args.head_dim
        queries = torch.randn(shape, generator=pick).to(self.device, self.dtype)
        mask, scoring = (
            torch.ones(batch, tokens, dtype=torch.bool, device=self.device),
            scoring_of(self.config, "cosine"),
        )

        def run() -> list[torch.Tensor]:
            request, chosen = routing_request(self.config, scoring, mask, self.documents.num_rows), []
            with bank.session(request) as layers:
                for place, memory in enumerate(layers.values()):
                    selection = memory.route(queries[place], mask, request.k, scoring)
                    memory.gather(selection, self.dtype)
                    chosen.append(selection.documents)
            return chosen

        return self.median_ms(run), [documents.cpu() for documents in run()]

    @contextmanager
    def first_token(self, bank: MemoryBank, tokens: int) -> Any:
        """A run up to the first token, compiled where that pays."""
        ids = torch.randint(5, 100, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(self.device)
        compiled = self.device.type == "cuda" and self.args.compile
        cache = static_cache(self.model.config, tokens + 16)

        def run() -> Any:
            cache.reset()
            return self.model(ids, memory=bank, logits_to_keep=1, use_cache=True, **{CACHE: cache})

        with compiling(self.model) if compiled else nullcontext():
            yield run

    def first(self, bank: MemoryBank, tokens: int) -> tuple[float, torch.Tensor]:
        """Milliseconds, and the documents chosen in the first memory layer."""
        with self.first_token(bank, tokens) as run:
            return self.median_ms(run, warm=4), next(iter(run().routing.values())).documents.cpu()

    def per_second(self, bank: MemoryBank) -> float:
        """Questions per second of this process."""
        with self.first_token(bank, self.args.question_tokens[0]) as run:
            for _ in range(4):
                run()
            self.ranks.everyone(None)
            return self.args.questions / self.seconds(lambda: [run() for _ in range(self.args.questions)])

    def measure_banks(self) -> None:
        """All rows but the last."""
        args, ranks = self.args, self.ranks
        first = [length for length in args.question_tokens if "first" in args.rows]
        routed = self.cases() if "route" in args.rows else []
        exchanges = {batch: self.exchange_ms(batch) for batch in {1, args.batch}}
        for batch, figures in exchanges.items():
            shown = {name: round(value, 4) for name, value in figures.items()}
            self.say(f"exchanges of a layer, {batch} questions: {shown}")
        content = self.host_content()
        alone, expected, single, together = {}, {}, 0.0, 0.0
        questions = "questions" in args.rows
        if ranks.rank == 0 or questions:
            bank = self.alone()
        if ranks.rank == 0:
            for case in routed:
                alone[case], expected[case] = self.route(bank, *case)
            for length in first:
                alone[length], expected[length] = self.first(bank, length)
        if questions:
            beside = self.beside(bank, content)
            for everyone in (False, True):
                ranks.everyone(None)
                rate = 0.0
                if everyone or ranks.rank == 0:
                    rate = self.per_second(beside) if everyone else self.per_second_alone(beside)
                rates = ranks.everyone(rate)
                single, together = (single, sum(rates)) if everyone else (rates[0], together)
            del beside
        if ranks.rank == 0 or questions:
            del bank
        self.free()
        ranks.everyone(None)
        for kind, held in (("sharded", None), ("replicated", content)):
            shared = self.shared(held)
            for case in routed:
                batch, tokens = case
                ms, chosen = self.route(shared, *case)
                if ranks.rank == 0:
                    check(f"{batch} x {tokens} tokens", chosen, expected[case])
                    parts = exchanges[batch]
                    floors = self.floors(*case, parts["scores"] + (parts["content"] if held is None else 0.0), False)
                    goal = 1.6 if case == self.cases()[0] else 1.85
                    self.note(f"route {batch} x {tokens}, {kind}", "ms", alone[case], ms, goal, floors)
            for length in first:
                ms, found = self.first(shared, length)
                if ranks.rank == 0:
                    check(f"first token behind {length}", [found], [expected[length]])
                    parts = exchanges[1]
                    floors = self.floors(1, length, parts["scores"] + (parts["content"] if held is None else 0.0), True)
                    self.note(f"first token, {length} tokens, {kind}", "ms", alone[length], ms, 1.4, floors)
            del shared
            self.free()
            ranks.everyone(None)
        if questions and ranks.rank == 0:
            self.note("questions, each its own", "questions/s", single, together, 1.95)

    def per_second_alone(self, bank: MemoryBank) -> float:
        """`per_second` of process 0, while the others wait."""
        ranks, self.ranks = self.ranks, Alone()
        try:
            return self.per_second(bank)
        finally:
            self.ranks = ranks

    def measure_encoding(self) -> None:
        """The last row: the same documents, by one process and by all."""
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        words = [json.loads(line)["text"] for line in WORDS.read_text(encoding="utf-8").splitlines()]
        pick = random.Random(0)
        with tempfile.TemporaryDirectory() as folder:
            folder = self.ranks.everyone(folder)[0]
            source, rates = Path(folder, "documents.jsonl"), []
            if self.ranks.rank == 0:
                texts = (" ".join(pick.choices(words, k=8)) for _ in range(self.args.documents))
                source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            self.ranks.everyone(None)
            for way in ("warm", "one", "all"):
                ranks = self.ranks if way != "one" else Alone()
                rate = 0.0
                if way != "one" or self.ranks.rank == 0:
                    corpus, where, done = Corpus(str(source)), Path(folder, way), []
                    took = self.seconds(
                        lambda corpus=corpus, where=where, ranks=ranks, done=done: done.append(
                            encode_bank(
                                corpus,
                                self.model,
                                where,
                                tokenizer,
                                COMPACT,
                                ranks=ranks,
                                part_size=self.args.part_size,
                                show_progress=False,
                            )
                        )
                    )
                    rate = done[0].tokens / took
                rates.append(self.ranks.everyone(rate)[0])
        if self.ranks.rank == 0:
            self.note("encoding", "tokens/s", rates[1], rates[2], 1.95)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def check(what: str, chosen: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Refuse figures of what chooses other documents."""
    if not all(map(torch.equal, chosen, expected)):
        raise SystemExit(f"{what}: processes chose other documents than one alone.")


def own_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def connected(device: torch.device) -> Any:
    """The processes that torchrun started; connected before, such as by a test, they stay so."""
    connects = not dist.is_initialized()
    if connects and device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    elif connects:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    ranks = Collectives(None, TIMEOUT)
    try:
        yield ranks
        ranks.part()
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.close()
        if connects:
            dist.destroy_process_group()


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--tokens", type=float, default=100e6)
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--question-tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--batch", type=int, default=16, help="questions of the last routing row")
    parser.add_argument("--questions", type=int, default=50, help="that each process answers")
    parser.add_argument("--documents", type=int, default=3000, help="to encode")
    parser.add_argument("--part-size", type=int, default=1 << 18, help="bytes of text of a part")
    add_shape_options(parser)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on an accelerator")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="on a GPU")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    if wrong := set(args.rows) - set(ROWS):
        parser.error(f"--rows: {', '.join(sorted(wrong))} is none of {', '.join(ROWS)}")
    device = own_device()
    args.dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    with connected(device) as ranks:
        bench = Bench(args, ranks, device)
        if {"route", "first", "questions"} & set(args.rows):
            bench.measure_banks()
        if "encode" in args.rows:
            bench.measure_encoding()
        if ranks.rank or not args.json:
            return
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        figures = {
            "processes": ranks.size,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "rows": [asdict(row) for row in bench.rows],
            "torch": torch.__version__,
            "commit": commit.stdout.strip(),
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
