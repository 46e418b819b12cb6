"""Options that several commands have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from .loading import PROTOCOLS

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


MOST = 2**48  # of any number; what computes with it takes larger ones for errors of its own


def at_least(lowest: int, most: int = MOST) -> Callable[[str], int]:
    """An argument type: an integer from `lowest` up to `most`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {lowest}, got {text!r}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be an integer of at most {most}, got {text!r:.80}")
        return value

    return integer


positive = at_least(1)


def layer_list(text: str) -> list[int]:
    """An argument type: layers separated by commas."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layers separated by commas, got {text!r}") from None


def device_of(text: str) -> torch.device:
    """An argument type: a device that this machine has; `cuda` is this process' own where a launcher started many."""
    import torch

    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from None
    return device


def device_in(args: argparse.Namespace) -> torch.device:
    """The device that was asked for; by default the accelerator, if there is one."""
    if args.device is not None:
        return args.device
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return device_of("cpu" if found is None else found.type)


def add_protocol_option(made: argparse.ArgumentParser) -> None:
    """How documents and questions are wrapped."""
    made.add_argument(
        "--protocol",
        choices=("auto", *PROTOCOLS),
        default="auto",
        help="how documents and questions are put; auto: as the checkpoint's memory_protocol.json says, else by the "
        "tokenizer's chat template, else plainly; chat: by the template in any case; none: plainly in any case",
    )


def add_sole_writer_option(made: argparse.ArgumentParser) -> None:
    """Add the option by which a user vouches for being the only writer of a bank."""
    made.add_argument(
        "--sole-writer",
        action="store_true",
        help="for a bank on a file system without locks: you vouch that nothing else writes to it, and no lock is "
        "asked for",
    )


def add_compile_option(made: argparse.ArgumentParser) -> None:
    """Add the option by which what answers a question is compiled."""
    made.add_argument(
        "--compile",
        action="store_true",
        help="compile what answers a question: a minute on first use, then an accelerator does not wait for Python any "
        "more (docs/performance.md)",
    )


def add_model_options(made: argparse.ArgumentParser) -> None:
    """How a model is loaded and asked."""
    add_protocol_option(made)
    # No default of its own: argparse would convert that before it looks at the rest, and wait for torch.
    made.add_argument("--device", type=device_of, help="such as cuda or cpu (default: the accelerator, if any)")
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")
