"""`attend_token` in PyTorch, and the shape of its result for tracing."""

from __future__ import annotations

from torch import Tensor

from ...model.cache_msa import MemoryContext
from ...model.context_attention_msa import context_attention


def attend_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    context_keys: Tensor,
    context_values: Tensor,
    row_mask: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    context = MemoryContext(context_keys, context_values, row_mask, prefix_length=0, bias=bias)
    own = None if mask is None else mask[:, None, None]
    return context_attention(query[:, :, None], keys, values, own, context, scaling=scaling)[:, 0]


def fake_attend_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    context_keys: Tensor,
    context_values: Tensor,
    row_mask: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    return values.new_empty(query.shape)
