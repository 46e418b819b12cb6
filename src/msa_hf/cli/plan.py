"""`msa-hf plan`: where a bank lies and what it costs, from shapes alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import reported
from .adapters import ADAPTER, adapter_error, is_adapter
from .sizes import amount, count, device_amount

if TYPE_CHECKING:
    from ..bank.tiered.hardware import Tiers
    from ..bank.tiered.plan import Placement, PlacementOptions

NAME = "plan"
HELP = "Plan where a bank lies and what it costs, from shapes alone; needs no GPU."


def placed(text: str) -> tuple[str | None, str | None]:
    """An argument type: FORMAT, FORMAT@TIER or @TIER."""
    format, _, tier = text.partition("@")
    return format or None, tier or None


def resident(text: str) -> int | None:
    """An argument type: a number of layers, or "fit" for as many as fit."""
    if text != "fit" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of layers or fit, got {text!r}")
    return None if text == "fit" else int(text)


def placement(text: str) -> str | PlacementOptions:
    """An argument type: "auto", or where keys and content lie, such as fp8@device,bf16@host."""
    from ..bank.tiered.plan import PlacementOptions

    if text == "auto":
        return text
    keys, comma, content = text.partition(",")
    if not comma or "," in content:
        raise argparse.ArgumentTypeError(
            f"must be auto, or keys and content such as fp8@device,bf16@host, got {text!r}"
        )
    return PlacementOptions(*placed(keys), *placed(content))


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    from ..bank.tiered.hardware import RATES, TIERS
    from ..bank.tiered.plan import Reserves
    from ..bank.tiered.shapes import GB
    from ..ops.formats import content_formats, key_formats

    def add(name: str, kind: Callable[[str], object], text: str, default: object = None) -> None:
        made.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)

    reserves = Reserves()
    add("tokens", count, "of the corpus, such as 100M")
    add("document-tokens", count, "of a document (default: 1024)", 1024)
    made.add_argument("--model", metavar="DIR", help="a checkpoint or its config.json's directory: layers and weights")
    add("layers", int, "memory layers (default: the model's)")
    add("groups", int, "key/value heads (default: the model's)")
    add("head-dim", int, "numbers per head (default: the model's)")
    add("chunk-size", int, "tokens per chunk (default: the model's, or 64)")
    made.add_argument("--dtype", choices=content_formats(), default="bf16", help="of the bank (default: bf16)")
    add(
        "device-memory",
        device_amount,
        "of a GPU, such as 141GB, or none (default: what is free here)",
        argparse.SUPPRESS,
    )
    add("host-memory", amount, "such as 128GiB (default: what is free here)")
    add("disk", amount, "such as 1TB (default: what is free here)")
    add("gpus", int, "that share the bank evenly; the memories are what each of them has (default: 1)", 1)
    made.add_argument("--gpu", choices=RATES, help="whose rates give the times (default: that of this machine)")
    add("bandwidth", amount, "bytes per second of a copy on the device, read and written, such as 2T")
    add("matmul", amount, "bf16 operations per second, such as 300T")
    add("weights", amount, "bytes of the model (default: its safetensors, 0 where they are loaded or none are named)")
    add("activations", amount, f"bytes to reserve (default: {reserves.activations / GB:g}GB)", reserves.activations)
    add("kv-cache", amount, f"bytes to reserve (default: {reserves.kv_cache / GB:g}GB)", reserves.kv_cache)
    add("host-reserve", amount, f"bytes to leave in host memory (default: {reserves.host / GB:g}GB)", reserves.host)
    add("disk-reserve", amount, f"bytes to leave on disk (default: {reserves.disk / GB:g}GB)", reserves.disk)
    for name, formats in (("keys", key_formats()), ("content", content_formats())):
        made.add_argument(
            f"--{name}",
            type=placed,
            default=(None, None),
            metavar="FORMAT@TIER",
            help=f"choose: {', '.join(formats)} and {', '.join(TIERS)}; either may be left out (default: planned)",
        )
    made.add_argument(
        "--resident",
        type=resident,
        default=0,
        metavar="N|fit",
        help="layers whose keys stay on the device beside others in host memory, with --keys @host (default: 0)",
    )
    made.add_argument(
        "--content-formats",
        type=lambda text: text.split(","),
        metavar="LIST",
        help="allowed, separated by commas, such as bf16,fp8 (default: the bank's own)",
    )
    made.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf plan`."""
    with reported():
        placement = planned(args)
    print(json.dumps(placement.to_dict()) if args.json else placement)
    return 0


def planned(args: argparse.Namespace) -> Placement:
    """The plan that the options ask for.

    Raises:
        ValueError: for options that are missing or contradict each other, and where the bank does not fit.
    """
    from ..bank.tiered.plan import PlacementOptions, Reserves, plan_placement
    from ..bank.tiered.shapes import BankShape

    layers, chunk_size = _model_layers(args.model) if args.model else ([], 64)
    groups, dim = args.groups or (layers and layers[0][0]), args.head_dim or (layers and layers[0][1])
    depth = args.layers or len(layers)
    if args.tokens is None or not (depth and groups and dim):
        raise ValueError("a plan needs --tokens, and either --model or --layers, --groups and --head-dim")
    if not layers or args.layers or args.groups or args.head_dim:
        layers = [(groups, dim)] * depth
    shape = BankShape.for_tokens(
        args.tokens,
        layers,
        document_tokens=args.document_tokens,
        chunk_size=args.chunk_size or chunk_size,
        dtype=args.dtype,
    )
    tiers = _tiers(args)
    weights = args.weights
    if weights is None:
        weights = sum(file.stat().st_size for file in Path(args.model).glob("*.safetensors")) if args.model else 0
    (keys, keys_on), (content, content_on) = args.keys, args.content
    return plan_placement(
        shape,
        tiers,
        placement=PlacementOptions(keys, keys_on, content, content_on, resident=args.resident),
        content_formats=args.content_formats,
        reserves=Reserves(weights, args.activations, args.kv_cache, args.host_reserve, args.disk_reserve),
        gpus=args.gpus,
    )


def _tiers(args: argparse.Namespace) -> Tiers:
    """Take what is given, the rest as it is here."""
    from ..bank.tiered.hardware import RATES, Rates, Tiers, measured_tiers

    given = {"host": args.host_memory, "disk": args.disk}
    if "device_memory" in args:
        given["device"] = args.device_memory
    if "device_memory" not in args or None in (args.host_memory, args.disk):
        here = measured_tiers("cpu" if "device_memory" in args else None)
    else:
        here = Tiers(None, 0, 0)
    named = {name: value for name, value in given.items() if value is not None or name == "device"}
    rates: Rates | None = RATES[args.gpu] if args.gpu else here.rates
    if args.bandwidth or args.matmul:
        rates = replace(rates or Rates("this device"), source="given by the caller")
        rates = replace(rates, copy=args.bandwidth or rates.copy)
        rates = replace(rates, matmul=args.matmul, narrow_matmul=None) if args.matmul else rates
    return replace(here, **named, rates=rates)


def _model_layers(name: str) -> tuple[list[tuple[int, int]], int]:
    """(groups, head_dim) of a model's memory layers, by default those that a retrofit gives it, and its chunk size."""
    from transformers import AutoConfig

    from ..model.configuration_msa import default_memory_layers

    if not Path(name).is_dir():
        raise ValueError(f"{name}: no such directory")
    if is_adapter(Path(name)):
        raise adapter_error(name, Path(name, ADAPTER))
    with reported(foreign=True, subject=name):
        config = AutoConfig.from_pretrained(name).get_text_config(decoder=True)
    chunk_size = 64
    if (layers := getattr(config, "memory_layers", None)) is None:
        layers = default_memory_layers(config)
    else:
        chunk_size = config.chunk_size
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [(groups, dim)] * len(layers), chunk_size
