"""How a command is made, and the options that several of them have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch

from .loading import PROTOCOLS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def command(group: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    """The parser of a command among those of `group`; what `run` returns is the exit code."""
    made = group.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def at_least(lowest: int) -> Any:
    """An argument type: an integer from `lowest`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {lowest}, got {text!r}")
        return value

    return integer


positive = at_least(1)


def device_of(text: str) -> torch.device:
    """An argument type: a device that this machine has; `cuda` is this process' own where a launcher started many."""
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from None
    return device


def add_protocol_option(made: argparse.ArgumentParser) -> None:
    """How documents and questions are wrapped."""
    made.add_argument(
        "--protocol",
        choices=("auto", *PROTOCOLS),
        default="auto",
        help="how documents and questions are wrapped; auto: as the checkpoint's memory_protocol.json says, plain "
        "text where it has none",
    )


def add_model_options(made: argparse.ArgumentParser) -> None:
    """How a model is loaded and asked."""
    add_protocol_option(made)
    made.add_argument("--device", type=device_of, default="cpu", help="such as cuda (default: cpu)")
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
