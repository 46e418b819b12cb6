"""A step that trains routers and a reader, against the rate of plain matrix products on the same device.

    python benchmarks/bench_training.py --kernels 20 --json docs/bench_training.json              # one H200
    python benchmarks/bench_training.py --shape tiny --pool 24 --questions 12 --read 4 --steps 3  # a rehearsal

The step is that of `scripts/train_real.py routers`: a pool of passages (encoded twice, once without a graph, where that
does not fit), questions routed over it, rows that read with the pool as their memory and without one, low-rank updates
of all matrices. Random weights and tokens; lengths as of passages, questions and rows of real text. They are drawn
before a step's clock starts: drawing is not counted. Medians over the steps behind those in which layers are compiled
and attention is planned for new shapes (`--warm`). The times of a step's parts are those of steps of their own, in
which the device is drained between them.

`share` is what the step computes, the second encoding included, over its time at the rate of a product of 8192^3:
two operations for each weight of a matrix and token forward, four backward. Attention is left out, and so is padding.
With `--kernels` the last step is profiled: `device, s` is what its kernels take together, `idle, s` the time within it
in which none runs, launched under a profiler; `waiting, s` is what the other steps take beside the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from bench_encode import drained, gigaflops, matrix_rate
from random_models import SHAPES, random_base
from torch import Tensor

from msa_hf import MSAForCausalLM
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import Temperatures, TokenRows, contrastive_step, first_held, soft_targets
from msa_hf.training.mining import part_sizes
from msa_hf.training.reading import plain_reading_loss, reading_loss
from msa_hf.training.weights import TrainedWeights, add_gradients, linear_ranks

PASSAGE, QUESTION, ROW = (60, 240), (8, 24), (300, 700)  # least and most tokens
ANSWER = 6  # tokens of an answer
PARTED = 3  # steps that are taken apart behind the others
Clock = Callable[[str], AbstractContextManager[None]]


class Batch(NamedTuple):
    """What a step is given. Rows that read are token ids, labels, and which tokens route."""

    documents: list[TokenRows]
    questions: list[TokenRows]
    targets: Tensor
    with_pool: list[tuple[Tensor, Tensor, Tensor]]
    without: list[tuple[Tensor, Tensor, Tensor]]


def rows_of(count: int, lengths: tuple[int, int], budget: int, vocabulary: int, device: str) -> list[TokenRows]:
    """Random rows by length, in parts of at most `budget` tokens, as a pool is cut."""
    sizes = torch.randint(*lengths, (count,)).sort().values
    made = []
    for size in sizes.split(part_sizes(sizes.numpy(), budget)):
        width = -(-int(size.max()) // 8) * 8
        made.append(TokenRows(torch.randint(3, vocabulary, (len(size), width), device=device), size.to(device)))
    return made


def labeled(row: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that read; the last tokens of each are its answer, and the one before asks the pool."""
    places = torch.arange(row.ids.shape[1], device=row.ids.device)
    begin = row.lengths[:, None] - ANSWER
    return row.ids, row.ids.masked_fill(~row.mask | (places < begin), -100), places == begin - 1


@contextmanager
def clocked(parts: dict[str, list[float]], name: str, device: str) -> Iterator[None]:
    """Note the seconds of a block, before and behind which the device is drained."""
    drained(device)
    start = time.perf_counter()
    yield
    drained(device)
    parts.setdefault(name, []).append(time.perf_counter() - start)


def idle_time(events: Iterable[tuple[float, float]]) -> float:
    """The time between the first and the last of events, each from a start to an end, in which none goes on."""
    ordered = sorted(events)
    idle, until = 0.0, ordered[0][0] if ordered else 0.0
    for start, end in ordered:
        idle += max(start - until, 0.0)
        until = max(until, end)
    return idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--memory-layers", help="with commas between (default: at 0.47, 0.63 and 0.8 of the depth)")
    parser.add_argument("--pool", type=int, default=2048, help="passages")
    parser.add_argument("--questions", type=int, default=1024)
    parser.add_argument("--read", type=int, default=96, help="rows that read, half of them with the pool")
    parser.add_argument("--read-tokens", type=int, default=48_000, help="of these, at a time")
    parser.add_argument("--rank", type=int, default=28)
    parser.add_argument("--part-tokens", type=int, default=160_000)
    parser.add_argument("--question-tokens", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=25, help="steps left out, the first ones")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--kernels", type=int, default=0, help="so many that take most time are named")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device, shape = options.device, SHAPES[options.shape]
    count = shape["num_hidden_layers"]
    layers = options.memory_layers or ",".join(str(round(place * count)) for place in (0.47, 0.63, 0.8))
    memory_layers = sorted({min(int(layer), count - 1) for layer in layers.split(",")})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = MSAForCausalLM.from_base(
        random_base(shape, device, dtype),
        memory_layers=memory_layers,
        query_reduction="last",
        score_bias=True,
        aux_temperature=0.05,
    )
    whole = [name for name, _ in model.named_parameters() if "router_" in name]
    weights = TrainedWeights(model, linear_ranks(model, dict.fromkeys(range(count), options.rank)), whole)
    temperatures = Temperatures(len(memory_layers)).to(device)
    trained = [*weights.low_rank_parameters(), *weights.whole_parameters(), *temperatures.parameters()]
    optimizer = torch.optim.AdamW(trained, fused=device != "cpu")
    vocabulary, tokens = shape["vocab_size"], dict[str, int]()
    parts: dict[str, list[float]] = {}
    profile = torch.profiler.profile() if options.kernels else None

    def drawn() -> Batch:
        documents = rows_of(options.pool, PASSAGE, options.part_tokens, vocabulary, device)
        questions = rows_of(options.questions, QUESTION, options.question_tokens, vocabulary, device)
        asked, pool = (sum(len(part.lengths) for part in item) for item in (questions, documents))
        positives = torch.zeros(asked, pool, dtype=torch.bool, device=device)
        positives[torch.arange(asked), torch.randint(pool, (asked,))] = True
        targets = soft_targets(positives, torch.randn(asked, pool, device=device), 0.5)
        again = documents[: first_held(documents, questions, options.part_tokens)]
        half = max(options.read // 2, 1)
        read = [rows_of(half, ROW, options.read_tokens, vocabulary, device) if options.read else [] for _ in range(2)]
        named = {
            "documents": documents,
            "questions": questions,
            "encoded twice": again,
            "rows that read": [*read[0], *read[1]],
        }
        for name, rows in named.items():
            tokens[name] = sum(int(part.lengths.sum()) for part in rows)
        tokens["documents and padding"] = sum(part.ids.numel() for part in documents)
        return Batch(
            documents, questions, targets, [labeled(row) for row in read[0]], [labeled(row) for row in read[1]]
        )

    def step(batch: Batch, clock: Clock) -> None:
        with clock("weights written"):
            weights.write()
        with clock("pool and questions"):
            result = contrastive_step(
                model,
                batch.documents,
                batch.questions,
                batch.targets,
                temperatures,
                0.3,
                0.2,
                held_tokens=options.part_tokens,
            )
        with clock("reading"):
            half = max(options.read // 2, 1)
            for ids, labels, routes in batch.with_pool:
                loss = reading_loss(model, ids, labels, routes, result.pool, result.lengths)
                add_gradients(model.parameters(), [0.5 * loss * len(ids) / half])
            for ids, labels, _ in batch.without:
                loss = plain_reading_loss(model, ids, labels)
                add_gradients(model.parameters(), [0.5 * loss * len(ids) / half])
        with clock("optimizer"):
            weights.take_gradients()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with compiled_layers(model) if options.compile else nullcontext():
        for number in range(options.steps):
            batch = drawn()
            with clocked(parts, "step", device):
                step(batch, lambda name: nullcontext())
            print(f"step {number}: {parts['step'][-1]:.3f} s", flush=True)
        for _ in range(PARTED):
            step(drawn(), lambda name: clocked(parts, name, device))
        batch = drawn()
        with profile if profile is not None else nullcontext():
            step(batch, lambda name: nullcontext())
    seconds = {
        name: statistics.median((items[options.warm :] or items[-1:]) if name == "step" else items)
        for name, items in parts.items()
    }
    base = model.base_model.layers
    all_layers = 2e-9 * sum(
        part.weight.numel() for layer in base for part in layer.modules() if isinstance(part, torch.nn.Linear)
    )
    gflop = {
        "pool and questions": gigaflops(model)
        * (3 * tokens["documents"] + tokens["encoded twice"] + 3 * tokens["questions"]),
        "reading": 3 * all_layers * tokens["rows that read"],
    }
    gflop["step"] = sum(gflop.values())
    figures: dict[str, Any] = {"memory layers": memory_layers, **{f"{name}, tokens": n for name, n in tokens.items()}}
    figures |= {f"{name}, s": taken for name, taken in seconds.items()}
    figures["document tokens/s"] = tokens["documents"] / seconds["step"]
    if device != "cpu":
        figures["memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    rate = None if device == "cpu" else matrix_rate(device, dtype)
    if rate is not None:
        figures["matrix rate, TFLOP/s"] = rate
        figures |= {f"{name}, share": work / 1e3 / seconds[name] / rate for name, work in gflop.items()}
    if profile is not None:
        averages = profile.key_averages()
        on_device = [item for item in averages if item.device_type == torch.autograd.DeviceType.CUDA]
        taking = sorted(on_device, key=lambda item: -item.self_device_time_total)
        figures["device, s"] = sum(item.self_device_time_total for item in on_device) / 1e6
        if on_device:
            kernels = [item for item in profile.events() if item.device_type == torch.autograd.DeviceType.CUDA]
            figures["idle, s"] = idle_time((item.time_range.start, item.time_range.end) for item in kernels) / 1e6
            figures["waiting, s"] = seconds["step"] - figures["device, s"]
        for item in taking[: options.kernels]:
            print(f"{item.self_device_time_total / 1e3:9.2f} ms {item.count:6} x {item.key[:110]}")
    for name, value in figures.items():
        print(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if options.json:
        hardware = "CPU" if device == "cpu" else torch.cuda.get_device_name()
        given = {name: str(value) for name, value in vars(options).items()}
        record = {"hardware": hardware, "torch": torch.__version__, "arguments": given, "figures": figures}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
