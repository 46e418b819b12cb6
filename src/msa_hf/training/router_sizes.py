"""The sizes of a step, by what fits in a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .contrastive import encode_rows
from .mining import padded
from .router_settings import RouterSettings

LEAST_POOL, LARGEST_POOL, POOL_ON_CPU = 64, 4096, 64
PASSAGES_ON_CPU, PASSAGES = 2_000, 100_000
PROBE_ROWS = 16
PART_SHARE, QUESTION_SHARE = 0.3, 0.3  # of free memory, for the graph of a part and that of the questions


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step.

    Attributes:
        pool: passages.
        part_tokens: tokens of a part of the passages.
        question_tokens: tokens of all questions.
        corpus: passages that are encoded to measure.
    """

    pool: int
    part_tokens: int
    question_tokens: int
    corpus: int


def choose_sizes(settings: RouterSettings, model: nn.Module, passage_tokens: float, query_tokens: float) -> Sizes:
    """The sizes that fit in the memory of the model's device.

    Args:
        model: with what is trained marked so.
        passage_tokens, query_tokens: on average.
    """
    device = next(model.parameters()).device
    pool = settings.pool
    if device.type != "cuda":
        return Sizes(
            pool or POOL_ON_CPU,
            settings.part_tokens or 8_192,
            max(round((pool or POOL_ON_CPU) * query_tokens * 2), 4_096),
            settings.corpus or PASSAGES_ON_CPU,
        )
    each = _bytes_per_token(model, settings.max_length)
    # Gradients lie beside the weights from the first backward on.
    gradients = sum(item.numel() * item.element_size() for item in model.parameters() if item.requires_grad)
    free = max(torch.cuda.mem_get_info(device)[0] - gradients, 0)
    part = settings.part_tokens or min(max(int(PART_SHARE * free / each), 2_048), 160_000)
    questions = max(int(QUESTION_SHARE * free / each), 1_024)
    if pool is None:
        pool = min(max(int(questions / query_tokens), LEAST_POOL), LARGEST_POOL)
    return Sizes(pool, part, questions, settings.corpus or PASSAGES)


def _bytes_per_token(model: nn.Module, length: int) -> float:
    """Memory that the graph of a token takes on a CUDA device, measured."""
    device = next(model.parameters()).device
    rows = padded([[0] * length] * PROBE_ROWS, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = encode_rows(model, rows)
    peak = torch.cuda.max_memory_allocated(device) - before
    del found
    torch.cuda.empty_cache()
    return max(peak / (PROBE_ROWS * length), 1.0)
