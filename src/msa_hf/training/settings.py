"""A training run's settings, the options that both command lines have for them, and mistakes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

LORA, FULL = "lora", "full"
REPORTERS = ("none", "tensorboard", "wandb")
MOST_SEED = 2**32 - 1  # NumPy takes no larger one
LEARNING_RATE = {LORA: 1e-4, FULL: 1e-5}


class TrainingError(ValueError):
    """A mistake of the user's; the message is all that has to be shown."""


class SettingError(TrainingError):
    """A setting that cannot be followed.

    Args:
        setting: name of a field of `Settings`.
        template: of the message, a `str.format` template of the setting's name and the values.
        values: what the message says about it.
    """

    def __init__(self, setting: str, template: str, *values: object) -> None:
        self.setting, self.template, self.values = setting, template, values
        super().__init__(self.message(f"`{setting}`"))

    def message(self, name: str) -> str:
        """The message, with the name by which the user knows the setting."""
        return self.template.format(name, *self.values)


@dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes:
        base: a plain checkpoint, which gets a memory, or one that has a memory.
        output: directory of the result.
        method: `"lora"` saves an adapter, `"full"` trains all weights and saves a checkpoint.
        merge: with `"lora"`: save a checkpoint with the adapter merged into it.
        steps: of the optimizer.
        pool: documents per step, shared by its questions.
        batch_size: questions per step and device.
        learning_rate: of the adapters, or of the model; None: 1e-4, or 1e-5 with `"full"`.
        router_learning_rate: of the routers.
        warmup_share: share of the steps that come first and weigh the routers' loss most.
        rank: of the adapters.
        max_length: longest document, and question with answer, in tokens.
        held_out: questions kept to measure the routers; None: a fifth, up to 100.
        eval_every: steps from one measurement to the next; 0: only before and after.
        save_every: steps from one checkpoint to the next; 0: none.
        top_k, chunk_size: of the memory; None: the checkpoint's, or 16 and 64.
        seed: of everything random.
        bf16: compute in bfloat16; weights stay in float32.
        gradient_checkpointing: less memory, more time.
        report_to: `"tensorboard"` or `"wandb"` gets what is logged; `"none"`: nothing does.
        resume: go on from the last checkpoint of an interrupted run with the same settings.

    Raises:
        SettingError: for a number out of range, and `merge` without an adapter.
    """

    base: str
    output: str
    method: str = LORA
    merge: bool = False
    steps: int = 500
    pool: int = 64
    batch_size: int = 8
    learning_rate: float | None = None
    router_learning_rate: float = 1e-3
    warmup_share: float = 0.3
    rank: int = 16
    max_length: int = 1024
    held_out: int | None = None
    eval_every: int = 100
    save_every: int = 100
    top_k: int | None = None
    chunk_size: int | None = None
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    resume: bool = False
    report_to: str = "none"

    def __post_init__(self) -> None:
        if self.method not in LEARNING_RATE:
            raise SettingError("method", "{} must be one of {}, got {!r}", ", ".join(LEARNING_RATE), self.method)
        if self.report_to not in REPORTERS:
            raise SettingError("report_to", "{} must be one of {}, got {!r}", ", ".join(REPORTERS), self.report_to)
        if self.merge and self.method != LORA:
            raise SettingError("merge", "{} is for adapters; {!r} saves a whole checkpoint anyway", self.method)
        for name in ("steps", "pool", "batch_size", "rank", "max_length", "top_k", "chunk_size"):
            self._require(name, "at least 1", lambda value: value >= 1)
        for name in ("held_out", "eval_every", "save_every"):
            self._require(name, "at least 0", lambda value: value >= 0)
        for name in ("learning_rate", "router_learning_rate"):
            self._require(name, "above 0", lambda value: 0 < value < math.inf)
        self._require("warmup_share", "from 0 to 1", lambda value: 0 <= value <= 1)
        self._require("seed", f"from 0 to {MOST_SEED}", lambda value: 0 <= value <= MOST_SEED)

    def _require(self, name: str, range: str, holds: Callable[[float], bool]) -> None:
        value: float | None = vars(self)[name]
        if value is not None and not holds(value):
            raise SettingError(name, "{} must be {}, got {}", range, value)

    @property
    def warmup_steps(self) -> int:
        return round(self.steps * self.warmup_share)

    @property
    def rate(self) -> float:
        """Of the adapters, or of the model."""
        return LEARNING_RATE[self.method] if self.learning_rate is None else self.learning_rate

    def decisive(self) -> dict[str, object]:
        """The settings on which the course of a run depends, as JSON values."""
        apart = {"output", "resume", "merge", "eval_every", "save_every", "gradient_checkpointing", "report_to"}
        return {name: value for name, value in asdict(self).items() if name not in apart}


def add_options(parser: argparse.ArgumentParser, held_out: str = "--held-out") -> None:
    """The options of both command lines; `base` and `output` are each one's own.

    One that is not given leaves nothing behind, so that other kinds of runs can have other defaults.

    Args:
        held_out: how this command line spells that option.
    """
    default = Settings.__dataclass_fields__

    def add(name: str, kind: Callable[[str], object], text: str, spelled: str | None = None) -> None:
        value = default[name].default
        shown = text if value is None else f"{text} (default: {value})"
        parser.add_argument(
            spelled or f"--{name.replace('_', '-')}",
            dest=name,
            type=kind,
            default=argparse.SUPPRESS,
            metavar="N",
            help=shown,
        )

    def flag(name: str, text: str) -> None:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=argparse.SUPPRESS, help=text)

    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--lora",
        dest="method",
        action="store_const",
        const=LORA,
        default=argparse.SUPPRESS,
        help="train adapters and the routers, save an adapter (default)",
    )
    method.add_argument(
        "--full",
        dest="method",
        action="store_const",
        const=FULL,
        default=argparse.SUPPRESS,
        help="train all weights, save a checkpoint",
    )
    flag("merge", "with --lora: save a checkpoint with the adapter merged into it")
    add("steps", int, "of training")
    add("pool", int, "documents per step, shared by its questions")
    add("batch_size", int, "questions per step and device")
    add("learning_rate", float, f"of the adapters or the model (default: {LEARNING_RATE[LORA]}, {FULL}: 1e-05)")
    add("router_learning_rate", float, "of the routers")
    add("warmup_share", float, "share of the steps that train the routers first")
    add("rank", int, "of the adapters")
    add("max_length", int, "longest document, and question with answer, in tokens")
    add("held_out", int, "questions kept to measure the routers; 0 for none (default: a fifth, up to 100)", held_out)
    add("eval_every", int, "steps from one measurement to the next; 0: only before and after")
    add("save_every", int, "steps from one checkpoint to the next; 0: none")
    add("top_k", int, "documents per memory layer (default: 16, or the checkpoint's)")
    add("chunk_size", int, "tokens per chunk (default: 64, or the checkpoint's)")
    add("seed", int, "of everything random")
    flag("bf16", "compute in bfloat16; weights stay in float32")
    flag("gradient_checkpointing", "less memory, more time")
    flag("resume", "go on with an interrupted run, from its last checkpoint")
    parser.add_argument(
        "--report-to",
        choices=REPORTERS,
        default=argparse.SUPPRESS,
        help="what else gets the figures that are logged (default: none)",
    )


def settings_of(arguments: argparse.Namespace, base: str, output: str) -> Settings:
    """The settings that a parser with `add_options` read."""
    given = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    return Settings(**{**given, "base": base, "output": output})
