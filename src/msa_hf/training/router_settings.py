"""The settings of a run that trains routers by documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .settings import MOST_SEED, REPORTERS, SettingError

STARTS = ("auto", "whiten", "copy")
# Of settings by which two runs may differ that are one.
FREE = ("output", "resume", "adapter", "report_to", "compile", "save_every", "part_tokens")


@dataclass(frozen=True)
class RouterSettings:
    """A training run of routers by documents.

    Attributes:
        base: a plain checkpoint, which gets a memory, or one that has a memory.
        output: directory of the result.
        adapter: save an adapter instead of a checkpoint.
        steps: of the optimizer.
        pool: passages of a step; None: as many as memory holds, at most 4,096; 64 on a CPU.
        learning_rate: of low-rank updates.
        router_learning_rate: of routers.
        rank: of low-rank updates below the last memory layer.
        max_length: tokens of a passage; longer documents are cut.
        held_out: passages whose pairs measure the routers, and as many labeled questions; None: a fifth, up to 200.
        eval_every: steps from one measurement, and one search for the router's mistakes, to the next; 0: only at the
            beginning and the end.
        save_every: steps from one checkpoint to the next; 0: none.
        top_k, chunk_size: of the memory; None: the checkpoint's, or 16 and 64.
        memory_layers: of a base without a memory; None: one at three fifths of its depth.
        first: routers to start from: `"whiten"` sets them in closed form from the documents, `"copy"` leaves them;
            `"auto"` whitens routers that nobody has trained.
        teacher: name or directory of a sentence embedding model, whose similarities are soft labels; None: none.
        soft: share of the teacher in the labels.
        ask: name or directory of a causal LM that has learned to ask questions about passages; None: none.
        corpus: passages that are encoded to measure and to find mistakes; None: 100,000, or 2,000 on a CPU.
        part_tokens: tokens whose graph is held at a time; None: as many as memory holds.
        seed: of everything random.
        bf16: compute in bfloat16, on a CPU too; an accelerator always does.
        compile: compile layers without memory, on an accelerator.
        report_to: as in `Settings`.
        resume: go on with an interrupted run.

    Raises:
        SettingError: for a value out of range.
    """

    base: str
    output: str
    adapter: bool = False
    steps: int = 300
    pool: int | None = None
    learning_rate: float = 1e-3
    router_learning_rate: float = 1e-3
    rank: int = 24
    max_length: int = 256
    held_out: int | None = None
    eval_every: int = 100
    save_every: int = 50
    top_k: int | None = None
    chunk_size: int | None = None
    memory_layers: tuple[int, ...] | None = None
    first: str = "auto"
    teacher: str | None = None
    soft: float = 0.4
    ask: str | None = None
    corpus: int | None = None
    part_tokens: int | None = None
    seed: int = 0
    bf16: bool = False
    compile: bool = True
    report_to: str = "none"
    resume: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("first", STARTS), ("report_to", REPORTERS)):
            if getattr(self, name) not in choices:
                raise SettingError(name, "{} must be one of {}, got {!r}", ", ".join(choices), getattr(self, name))
        for name in ("steps", "rank", "top_k", "chunk_size", "part_tokens"):
            self._require(name, "at least 1", lambda value: value >= 1)
        for name in ("pool", "corpus"):
            self._require(name, "at least 2", lambda value: value >= 2)
        self._require("max_length", "at least 8", lambda value: value >= 8)
        self._require("held_out", "at least 1", lambda value: value >= 1)
        for name in ("eval_every", "save_every"):
            self._require(name, "at least 0", lambda value: value >= 0)
        for name in ("learning_rate", "router_learning_rate"):
            self._require(name, "above 0", lambda value: 0 < value < math.inf)
        self._require("soft", "from 0 to 1", lambda value: 0 <= value <= 1)
        self._require("seed", f"from 0 to {MOST_SEED}", lambda value: 0 <= value <= MOST_SEED)

    def _require(self, name: str, range: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise SettingError(name, "{} must be {}, got {}", range, value)

    def decisive(self) -> dict[str, Any]:
        """The settings on which the course of a run depends, as JSON values."""
        found = {name: value for name, value in asdict(self).items() if name not in FREE}
        return {**found, "memory_layers": None if self.memory_layers is None else list(self.memory_layers)}
