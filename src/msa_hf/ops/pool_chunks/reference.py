"""`pool_chunks` and its backward in PyTorch, and the shapes of their results for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model import chunks_msa
from ...model.routing_msa import NORM_EPSILON, normalize_heads
from ..quantize.reference import quantize_keys

FEW_TOKENS = 1024  # room that a chunk may have beyond its tokens


def chunk_spans(token_offsets: Tensor, chunk_size: int, chunks: int) -> tuple[Tensor, Tensor]:
    """First token and length of every chunk: two [chunks] int64."""
    offsets = torch.nn.functional.pad(chunks_msa.chunk_counts(token_offsets.diff(), chunk_size).cumsum(0), (1, 0))
    chunk = torch.arange(chunks, device=token_offsets.device)
    document = torch.searchsorted(offsets, chunk, right=True) - 1
    start = token_offsets[document] + (chunk - offsets[document]) * chunk_size
    return start, (token_offsets[document + 1] - start).clamp(max=chunk_size)


def _means(states: Tensor, start: Tensor, lengths: Tensor, chunk_size: int) -> Tensor:
    """[tokens, G, D] -> [chunks, G, D], in float32 or wider: every chunk pooled as a document of its own."""
    if not start.shape[0]:
        return states.new_empty(0, *states.shape[1:], dtype=torch.promote_types(states.dtype, torch.float32))
    chunk_size = min(chunk_size, max(states.shape[0], FEW_TOKENS))  # no chunk is longer than all tokens
    place = torch.arange(chunk_size, device=states.device)
    token = start[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return chunks_msa.pool_chunks(states[token], lengths, chunk_size)


def pool_chunks(
    keys: Tensor,
    values: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    chunks: int,
    normalize: bool,
    routing_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    spans = chunk_spans(token_offsets, chunk_size, chunks)
    mean_keys, mean_values, mean_router_keys = (
        _means(states, *spans, chunk_size) for states in (keys, values, router_keys)
    )
    if normalize:
        mean_router_keys = normalize_heads(mean_router_keys)
    content = torch.stack([mean_keys, mean_values], dim=1).to(values.dtype)
    routing_keys = mean_router_keys.flatten(1)
    if routing_dtype is None:
        return content, routing_keys.to(router_keys.dtype), routing_keys.new_empty(0, dtype=torch.float32)
    numbers, scales = quantize_keys(routing_keys, routing_dtype)
    return content, numbers, scales


def fake_pool_chunks(
    keys: Tensor,
    values: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    chunks: int,
    normalize: bool,
    routing_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, dim = values.shape[1:]
    width = router_keys.shape[1] * router_keys.shape[2]
    return (
        values.new_empty(chunks, 2, groups, dim),
        values.new_empty(chunks, width, dtype=router_keys.dtype if routing_dtype is None else routing_dtype),
        values.new_empty(0 if routing_dtype is None else chunks, dtype=torch.float32),
    )


def pool_chunks_backward(
    grad_content: Tensor,
    grad_routing_keys: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(router_keys.dtype, torch.float32)
    start, lengths = chunk_spans(token_offsets, chunk_size, grad_content.shape[0])
    grad_router = grad_routing_keys.to(wide).unflatten(1, router_keys.shape[1:])
    if normalize:
        # y = r * mean, r = (|mean|^2 + epsilon)^(-1/2):  d mean = r * (g - y * <y, g>).
        mean = _means(router_keys, start, lengths, chunk_size)
        root = torch.rsqrt(mean.square().sum(-1, keepdim=True) + NORM_EPSILON)
        unit = mean * root
        grad_router = root * (grad_router - unit * (unit * grad_router).sum(-1, keepdim=True))
    # The chunk of each token; tokens before the first document and behind the last belong to none.
    token = torch.arange(router_keys.shape[0], device=router_keys.device)
    chunk = torch.searchsorted(start, token, right=True) - 1
    real = chunk >= 0
    if start.shape[0]:
        chunk = chunk.clamp(min=0)
        real &= token < start[chunk] + lengths[chunk]

    def spread(grad: Tensor, like: Tensor) -> Tensor:
        shared = (grad.to(wide) / lengths[:, None, None]).to(like.dtype)
        if not shared.shape[0]:
            return like.new_zeros(router_keys.shape[0], *grad.shape[1:])
        return torch.where(real[:, None, None], shared[chunk], 0.0)

    grad_keys, grad_values = (spread(grad, grad_content) for grad in grad_content.unbind(1))
    return grad_keys, grad_values, spread(grad_router, router_keys)


def fake_pool_chunks_backward(
    grad_content: Tensor,
    grad_routing_keys: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (router_keys.shape[0], *grad_content.shape[2:])
    return grad_content.new_empty(shape), grad_content.new_empty(shape), router_keys.new_empty(router_keys.shape)
