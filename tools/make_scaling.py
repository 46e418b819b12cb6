"""Compute the tables of docs/scaling.md with the planner and write them between their markers.

    python tools/make_scaling.py          # write
    python tools/make_scaling.py --check  # say whether the document is what would be written

Text outside the markers is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from computed_tables import run, table
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf.bank.tiered.hardware import RATES, Tiers
from msa_hf.bank.tiered.plan import Placement, PlacementOptions, Reserves, plan_placement
from msa_hf.bank.tiered.shapes import GB, BankShape
from msa_hf.model.configuration_msa import default_memory_layers

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
BENCH = ROOT / "docs" / "bench_model.json"
OPERATIONS = ROOT / "docs" / "bench_ops.json"
PLACED = ROOT / "docs" / "bench_tiers.json"
TINY = ROOT / "model_cards" / "msa-hf-tiny"

CORPORA = {"1M": 10**6, "10M": 10**7, "100M": 10**8, "1B": 10**9}
DOCUMENT_TOKENS = 1024
TEXT_BYTES_PER_TOKEN = 4  # English prose in vocabularies of 128,000 tokens and more
GPUS = {"24 GB": 24 * GB, "80 GB": 80 * GB, "141 GB": 141 * GB}
AMPLE = 10**18  # host memory where only the device is asked about

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "num_attention_heads": 32}
# name -> model type and fields of the published config.json, and GPUs that hold the weights together.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama 3.2 1B": (
        "llama",
        {
            **LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        1,
    ),
    "Qwen3 4B": (
        "qwen3",
        {
            **QWEN,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "tie_word_embeddings": True,
        },
        1,
    ),
    "Qwen3 8B": (
        "qwen3",
        {
            **QWEN,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "tie_word_embeddings": False,
        },
        1,
    ),
    "Llama 3 70B": (
        "llama",
        {
            **LLAMA,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
        2,
    ),
}
MEASURED_ON = "Qwen3 4B"  # the shape of docs/bench_model.json


@dataclass(frozen=True)
class Model:
    """The sizes of a model that the tables need.

    Attributes:
        depth: layers.
        memory: (groups, head_dim) of each memory layer.
        parameters: in all.
        encoding: that take part in encoding a token: every layer up to the last memory layer, of which only the
            projections of keys and values, and the routers' key projections.
        group: GPUs that hold the weights together.
    """

    depth: int
    memory: list[tuple[int, int]]
    parameters: int
    encoding: int
    group: int

    @property
    def weights(self) -> int:
        """Bytes of bf16 weights on each GPU."""
        return -(-2 * self.parameters // self.group)

    def shape(self, tokens: int) -> BankShape:
        return BankShape.for_tokens(tokens, self.memory, document_tokens=DOCUMENT_TOKENS)


def counted(config: Any, group: int = 1) -> Model:
    """A model, its parameters counted on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = model.model.layers
    memory = default_memory_layers(config)
    last = layers[memory[-1]].self_attn
    running = [*layers[: memory[-1]], last.k_proj, last.v_proj]
    groups, dim = config.num_key_value_heads, config.head_dim
    encoding = sum(parameter.numel() for module in running for parameter in module.parameters())
    encoding += len(memory) * groups * dim * config.hidden_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Model(len(layers), [(groups, dim)] * len(memory), parameters, encoding, group)


@cache
def models() -> dict[str, Model]:
    return {
        name: counted(AutoConfig.for_model(kind, **fields), group) for name, (kind, fields, group) in MODELS.items()
    }


@cache
def bench() -> dict[str, Any]:
    return json.loads(BENCH.read_text())["figures"]


def encoding_rate() -> float:
    """Operations per second of weights' products that the measured encoding ran at."""
    return bench()["encode_tokens_per_s"] * 2 * models()[MEASURED_ON].encoding


def planned(model: Model, shape: BankShape, keys: str, device: int, gpus: int = 1) -> Placement | None:
    """The placement with these keys on the device, content where there is ample room; None where it does not fit."""
    tiers, reserves = Tiers(device, AMPLE, 0, RATES["H200"]), Reserves(model.weights)
    found = Placement(shape, tiers, reserves, gpus, keys=keys, keys_on="device", content="bf16", content_on="host")
    return found if found.fits else None


def fewest(model: Model, shape: BankShape, keys: str) -> Placement:
    """The placement on the fewest H200s."""
    for gpus in range(model.group, 1000, model.group):
        if found := planned(model, shape, keys, GPUS["141 GB"], gpus):
            return found
    raise AssertionError(f"{shape} needs a thousand GPUs.")


def largest(model: Model, keys: str, device: int) -> int:
    """The most tokens, in whole millions, whose keys fit on the GPUs that hold the weights."""
    low, high = 0, 10**6
    if planned(model, model.shape(10**6), keys, device, model.group) is None:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        fits = planned(model, model.shape(middle * 10**6), keys, device, model.group) is not None
        low, high = (middle, high) if fits else (low, middle)
    return low


# Tables ---------------------------------------------------------------------------------------------------------------


def size(number: float) -> str:
    """Bytes in GB or TB, three digits."""
    return f"{digits(number / 10**12)} TB" if number >= 999.5 * GB else f"{digits(number / GB)} GB"


def digits(number: float) -> str:
    """Two or three significant digits, without an exponent."""
    if number < 0.0995:
        return f"{number:.2g}"
    return f"{number:.{2 if number < 9.995 else 1 if number < 99.95 else 0}f}"


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{digits(seconds / length)} {unit}"
    return f"{digits(seconds)} s"


def milliseconds(seconds: float | None) -> str:
    assert seconds is not None
    return digits(1e3 * seconds)


def shapes() -> str:
    rows = []
    for name, model in models().items():
        (groups, dim), shape = model.memory[0], model.shape(64_000_000)
        layers = f"{len(model.memory)} of {model.depth}"
        each = [number / 64_000_000 for number in (shape.key_bytes("bf16"), shape.content_bytes("bf16"))]
        numbers = (f"{model.parameters / GB:.2f}B", size(2 * model.parameters), f"{2 * model.encoding / GB:.2f}")
        rows.append((name, layers, f"{groups} x {dim}", *numbers, *(f"{number:,.0f}" for number in each)))
    names = ("model", "memory layers", "groups x head_dim", "parameters", "weights in bf16", "GFLOP to encode a token")
    return table((*names, "routing keys, bytes per token", "content, bytes per token"), rows)


def sizes() -> str:
    rows = []
    for name, model in models().items():
        for corpus, tokens in CORPORA.items():
            shape = model.shape(tokens)
            keys = [shape.key_bytes(kind) for kind in ("bf16", "fp8", "int4")]
            content = [shape.content_bytes(kind) for kind in ("bf16", "fp8")]
            rows.append((name, corpus, *map(size, (*keys, *content, TEXT_BYTES_PER_TOKEN * tokens))))
    names = ("model", "tokens", "keys bf16", "keys fp8, int8", "keys int4", "content bf16", "content fp8", "texts")
    return table(names, rows)


def times() -> str:
    rows = []
    for name, model in models().items():
        for corpus, tokens in CORPORA.items():
            shape, cells = model.shape(tokens), []
            for keys in ("bf16", "fp8"):
                found = fewest(model, shape, keys)
                both = " / ".join(milliseconds(found.routing_seconds(count)) for count in (32, 256))
                cells += [str(found.gpus), both]
            fetching = milliseconds(found.fetch_seconds(16))
            rows.append((name, corpus, hours(tokens * 2 * model.encoding / encoding_rate()), *cells, fetching))
    names = ("model", "tokens", "encoding, GPU time", "GPUs, bf16 keys", "routing 32 / 256 tokens, ms")
    return table((*names, "GPUs, fp8 keys", "routing 32 / 256 tokens, ms", "fetching 16 documents, ms"), rows)


def capacities() -> str:
    rows = []
    for name, model in models().items():
        cells = []
        for device in GPUS.values():
            for keys in ("bf16", "fp8"):
                most = largest(model, keys, device)
                cells.append(f"{most:,}M" if most else "-")
        rows.append((name + (f", {model.group} GPUs" if model.group > 1 else ""), *cells))
    return table(("model", *(f"{device}, {keys}" for device in GPUS for keys in ("bf16", "fp8"))), rows)


def devices() -> str:
    rows = []
    shape = models()[MEASURED_ON].shape(10**8)
    for name, rates in RATES.items():
        cells = []
        for keys in ("bf16", "fp8"):
            found = plan_placement(shape, Tiers(AMPLE, AMPLE, 0, rates), placement=PlacementOptions(keys=keys))
            cells += [milliseconds(found.routing_seconds(count)) for count in (32, 256)]
        assert rates.copy is not None and rates.matmul is not None
        rows.append((name, f"{rates.copy / 1e12:.2f} TB/s", f"{rates.matmul / 1e12:.0f} TFLOP/s", *cells))
    return table(("GPU", "copy", "bf16 product", "bf16, 32", "bf16, 256", "fp8, 32", "fp8, 256"), rows)


def checks() -> str:
    """Measured figures beside computed ones; measured ones that lie in no file stand here with where they come from."""
    model, figures, rates = models()[MEASURED_ON], bench(), RATES["H200"]
    found = re.search(r"tokens=(\d+), chunks=(\d+),.* bytes=(\d+)", figures["bank"])
    assert found is not None
    tokens, chunks, held = map(int, found.groups())
    million = model.shape(tokens)
    assert million.chunks == chunks
    prefix = 3 * model.depth * 2 * 2 * model.memory[0][0] * model.memory[0][1]
    rows: list[tuple[str, str, str, str, float]] = []

    def compare_bytes(what: str, measured: int, computed: int) -> None:
        rows.append((what, "bytes", f"{measured:,}", f"{computed:,}", measured / computed))

    compare_bytes("bank of the 4B shape, 1M tokens, with its prefix", held, million.saved_bytes + prefix)

    tiny = json.loads((TINY / "results.json").read_text())["banks"]
    config = json.loads((TINY / "config.json").read_text())
    layers = [(config["num_key_value_heads"], config["head_dim"])] * len(config["memory_layers"])
    for bank in tiny:
        mean = round(bank["tokens"] / bank["documents"])
        shape = BankShape.for_tokens(bank["tokens"], layers, document_tokens=mean)
        what = f"bank of msa-hf-tiny, {bank['documents']:,} documents of {mean} tokens on average"
        compare_bytes(what, bank["bank_bytes"], shape.saved_bytes)

    small = counted(AutoConfig.for_model("qwen3", **{k: v for k, v in config.items() if k != "model_type"}))
    speed = encoding_rate() / (2 * small.encoding)
    rows.append(
        ("encoding, a trial's model of 17.6M parameters", "tokens/s", "3,400,000", f"{speed:,.0f}", 3.4e6 / speed)
    )

    def routed(shape: BankShape, count: int, keys: str) -> float:
        placement = plan_placement(shape, Tiers(AMPLE, AMPLE, 0, rates), placement=PlacementOptions(keys=keys))
        seconds = placement.routing_seconds(count)
        assert seconds is not None
        return 1e3 * seconds

    hundred = BankShape.for_tokens(10**8, model.memory[:1])
    for what, shape, count, keys, low, high in (
        ("routing 18 layers, 1M tokens, this package in plain PyTorch", million, 48, "bf16", 22.0, 22.0),
        ("routing a layer, 100M tokens, PyTorch: bf16 product, maxima, top-k", hundred, 32, "bf16", 1.13, 1.32),
        ("the same", hundred, 256, "bf16", 1.85, 2.20),
        ("scores alone, a trial's Triton kernel", hundred, 32, "bf16", 0.741, 0.741),
        ("the same", hundred, 256, "bf16", 1.99, 1.99),
        ("the same, fp8 keys", hundred, 32, "fp8", 0.389, 0.389),
        ("the same", hundred, 256, "fp8", 1.02, 1.02),
    ):
        computed = routed(shape, count, keys)
        said = f"{low:g}" if low == high else f"{low:.2f} to {high:.2f}"
        rows.append((f"{what}, {count} tokens", "ms", said, digits(computed), (low + high) / 2 / computed))
    for count, keys in ((32, "bf16"), (256, "bf16"), (1024, "bf16"), (32, "fp8"), (256, "fp8"), (1024, "fp8")):
        took, computed = native_ms(count, keys), routed(hundred, count, keys)
        what = f"routing a layer, 100M tokens, CUDA operation, {keys} keys, {count} tokens"
        rows.append((what, "ms", f"{took:.3g}", digits(computed), took / computed))
    whole = BankShape.for_tokens(10**8, model.memory)
    for setup in ("bf16", "fp8"):
        for count in (32, 256):
            took = json.loads(PLACED.read_text())["setups"][setup][f"{count} tokens"]["routing_ms"]["median"]
            computed = routed(whole, count, setup)
            what = f"routing 18 layers, 100M tokens, {setup} keys, queries and re-scoring included, {count} tokens"
            rows.append((what, "ms", f"{took:.3g}", digits(computed), took / computed))
    cells = ((what, unit, measured, computed, f"{ratio:.3g}") for what, unit, measured, computed, ratio in rows)
    return table(("what", "unit", "measured", "computed", "measured / computed"), cells)


def native_ms(tokens: int, keys: str) -> float:
    """Milliseconds of the CUDA operation in a graph: one layer of 100M tokens, documents of 1,024 tokens."""
    case = f"1 x {tokens}, 1,562,500 chunks, 97,656 documents, {keys}{'' if keys == 'bf16' else ' and scored again'}"
    rows = json.loads(OPERATIONS.read_text())["rows"]
    return next(row["device_ms"] for row in rows if (row["case"], row["backend"]) == (case, "cuda"))


def placed() -> str:
    """A column per way to place 100M tokens on one GPU, as measured."""
    setups = json.loads(PLACED.read_text())["setups"]
    names = {
        "bf16": "bf16 keys on the device",
        "fp8": "fp8 keys",
        "int8": "int8 keys",
        "24gb": "24 GB, fp8 keys streamed",
    }

    def line(what: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [what, *(cell(setups[name]) for name in names)]

    def times(tokens: int, what: str) -> Callable[[dict[str, Any]], str]:
        return lambda figures: f"{figures[f'{tokens} tokens'][f'{what}_ms']['median']:.1f}"

    rows = [
        line("loading, s", lambda figures: f"{figures['load_s']:.1f}"),
        line("bank on the device, GB", lambda figures: f"{figures['device_bytes'] / 1e9:.1f}"),
        line("most on the device with the model, GB", lambda figures: f"{figures['peak_device_bytes'] / 1e9:.1f}"),
        line("bank in host memory, GB", lambda figures: f"{figures['host_bytes'] / 1e9:.1f}"),
    ]
    for what, name in {
        "routing 18 layers": "routing",
        "the same, 32 candidates": "routing_with_half_the_candidates",
        "the same, none scored again": "routing_without_rescoring",
        "fetching 16 documents in 18 layers": "fetching",
        "first token": "first_token",
    }.items():
        rows += [line(f"{what}, {tokens} tokens, ms", times(tokens, name)) for tokens in (32, 256)]
    return table(("", *names.values()), rows)


def share() -> str:
    """The calibration of encoding, as a sentence."""
    rate, matmul = encoding_rate(), RATES["H200"].matmul
    assert matmul is not None
    return (
        f"Encoding: {bench()['encode_tokens_per_s']:,.0f} tokens/s were measured in the shape of {MEASURED_ON} "
        f"([bench_model.json](bench_model.json)). That is {rate / 1e12:.0f}\nTFLOP/s of products with weights, "
        f"{rate / matmul:.2f} of the rate of large products; other shapes are computed with the same share."
    )


TABLES = {
    "shapes": shapes,
    "sizes": sizes,
    "encoding": share,
    "times": times,
    "capacities": capacities,
    "devices": devices,
    "placed": placed,
    "checks": checks,
}


def main(arguments: list[str] | None = None) -> int:
    return run("make_scaling.py", __doc__, DOCUMENT, TABLES, arguments)


if __name__ == "__main__":
    sys.exit(main())
