"""The time that a run on a CPU will take, told before it begins, with sizes that take less."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..model.modeling_msa import MSAForCausalLM
from .contrastive import encode_rows
from .mining import padded

WORTH_SAYING, LONG = 60.0, 1_800.0  # seconds
SMALL = {"steps": 30, "pool": 32, "corpus": 500}  # of a run that shows whether it is worth a longer one
PROBE_TOKENS = 1_024
# Runs through the model, in times of one without a graph: passages are encoded, encoded again with a graph unless it
# was held, and go backward; questions are run once, with a graph.
PASSAGE_RUNS, QUESTION_RUNS = 4, 3


@dataclass(frozen=True)
class Work:
    """The tokens of a run, by which its time is estimated.

    Attributes:
        steps: that are left.
        every: steps from one measurement to the next.
        pool: passages of a step.
        corpus: passages that are encoded to measure.
        sample: passages that routers are whitened by; 0 where they are not, and measured once less.
        passage_tokens, question_tokens: on average.
        measured: questions to measure with.
        mined: questions of a search for mistakes, at most.
    """

    steps: int
    every: int
    pool: int
    corpus: int
    sample: int
    passage_tokens: float
    question_tokens: float
    measured: int
    mined: int

    @property
    def tokens(self) -> float:
        """Tokens that go through the model once, without a graph."""
        searches = math.ceil(self.steps / self.every)
        measurements = searches + 1 + bool(self.sample)
        step = self.pool * (PASSAGE_RUNS * self.passage_tokens + QUESTION_RUNS * self.question_tokens)
        measuring = self.corpus * self.passage_tokens + self.measured * self.question_tokens
        mining = min(self.mined, min(self.every, self.steps) * max(self.pool // 4, 1)) * self.question_tokens
        return self.steps * step + measurements * measuring + searches * mining + self.sample * self.passage_tokens


def describe_time(work: Work, seconds_per_token: float, sizes: Sequence[str] = tuple(SMALL)) -> str | None:
    """A line on how long a run will take, and where it is long, on sizes that take less; None for a short one.

    Args:
        work: what is to be done.
        seconds_per_token: of `seconds_per_token`.
        sizes: that may be chosen, of `SMALL`.
    """
    seconds = work.tokens * seconds_per_token
    if seconds < WORTH_SAYING:
        return None
    line = f"about {_spelled(seconds)} on this CPU: {work.steps} steps of {work.pool} texts"
    if work.corpus:
        line += f", and {work.corpus} texts encoded every {work.every} steps"
    if seconds < LONG:
        return line
    options = {name: min(SMALL[name], getattr(work, name)) for name in sizes}
    shorter = replace(work, **options).tokens * seconds_per_token
    chosen = " ".join(f"--{name} {value}" for name, value in options.items() if value != getattr(work, name))
    if chosen and shorter < seconds / 2:
        line += f"; about {_spelled(shorter)} with {chosen}"
    return f"{line}. A GPU takes a small part of it"


def _spelled(seconds: float) -> str:
    minutes = max(round(seconds / 60), 1)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes / 60
    return f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"


@torch.no_grad()
def seconds_per_token(model: MSAForCausalLM, lengths: Sequence[int]) -> float:
    """Time to encode a token of passages of such lengths, measured on few; the second run counts, the first is cold."""
    length = max(round(sum(lengths) / len(lengths)), 1)
    rows = padded([[0] * length] * max(PROBE_TOKENS // length, 1), model.device)
    for _ in range(2):
        begun = time.perf_counter()
        encode_rows(model, rows)
        taken = time.perf_counter() - begun
    return taken / rows.ids.numel()
