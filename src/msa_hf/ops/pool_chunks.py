"""From the states of documents to the means of their chunks, in one pass (paper, 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model import chunks_msa
from ..model.routing_msa import NORM_EPSILON, normalize_heads
from .dispatch import alignment, choose, operator, size_class
from .formats import is_scaled, scaled_dtypes
from .quantize import quantize_keys


def pool_chunks(
    keys: Tensor,
    values: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    *,
    normalize: bool = True,
    routing_dtype: torch.dtype | None = None,
    chunks: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means of chunks, accumulated in float32; a partial last chunk is the mean of its real tokens. Differentiable.

    Args:
        keys, values, router_keys: [tokens, G, D] of one floating dtype; documents one after the other.
        token_offsets: [N + 1] int64, tokens of document i are `token_offsets[i]:token_offsets[i + 1]`. A document
            without tokens has no chunks.
        chunk_size: tokens per chunk.
        normalize: L2-normalize the routing keys per head; zero vectors stay zero.
        routing_dtype: of the routing keys: `torch.int8` or `torch.float8_e4m3fn` with scales, which have no
            derivative; None for the inputs'.
        chunks: how many there are together, where the caller knows; else one look at the device.
        backend: `"cuda"`, `"triton"`, `"cpp"` or `"pytorch"`; default the best that takes the call.

    Returns:
        content [C, 2, G, D], the mean key and value of each chunk, in the inputs' dtype; routing keys [C, G * D]; their
        scales [C] float32, None where they are not quantized.

    Raises:
        ValueError: for tensors that contradict each other.
        BackendError: where the backend asked for does not take the call.
    """
    if values.dim() != 3 or any(
        item.shape != values.shape or item.dtype != values.dtype or item.device != values.device
        for item in (keys, router_keys)
    ):
        raise ValueError("`keys`, `values` and `router_keys` must be [tokens, G, D] of one shape, dtype and device.")
    if token_offsets.dim() != 1 or token_offsets.dtype != torch.int64 or token_offsets.device != values.device:
        raise ValueError(f"`token_offsets` must be [N + 1] int64 on {values.device}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if routing_dtype is not None and not is_scaled(routing_dtype, "pool_chunks"):
        known = ", ".join(map(str, scaled_dtypes("pool_chunks")))
        raise ValueError(f"`routing_dtype` must be {known} or None, got {routing_dtype}.")
    if chunks is None:
        chunks = int(chunks_msa.chunk_counts(token_offsets.diff(), chunk_size).sum())
    namespace = choose(
        "pool_chunks",
        values.device.type,
        backend,
        states=values.dtype,
        multiple=alignment(values.shape[2]),
        width=size_class(values.shape[1] * values.shape[2]),
        routing_dtype=routing_dtype,
    )
    content, routing_keys, scales = operator("pool_chunks", namespace)(
        keys, values, router_keys, token_offsets, chunk_size, chunks, normalize, routing_dtype
    )
    return content, routing_keys, None if routing_dtype is None else scales


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
    place = torch.arange(chunk_size, device=states.device)
    token = start[:, None] + torch.minimum(place, lengths[:, None] - 1)
    return chunks_msa.pool_chunks(states[token], lengths, chunk_size)


def reference_pool_chunks(
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


def reference_pool_chunks_backward(
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
    grad_content: Tensor, grad_routing_keys: Tensor, router_keys: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (router_keys.shape[0], *grad_content.shape[2:])
    return grad_content.new_empty(shape), grad_content.new_empty(shape), router_keys.new_empty(router_keys.shape)


def derivative_pool_chunks(namespace: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Backward and setup_context of `namespace::pool_chunks`; the backward runs in the same namespace if it can."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, _, router_keys, token_offsets, chunk_size, _, normalize, *rest = inputs
        ctx.save_for_backward(router_keys, token_offsets)
        ctx.chunk_size, ctx.normalize, ctx.quantized = chunk_size, normalize, bool(rest) and rest[0] is not None

    def backward(ctx: Any, grad_content: Tensor, grad_routing_keys: Tensor, _: Any) -> tuple[Any, ...]:
        router_keys, token_offsets = ctx.saved_tensors
        if ctx.quantized:
            raise RuntimeError(
                f"{namespace}::pool_chunks is inference only with a `routing_dtype`: rounding has no derivative."
            )
        chosen = choose(
            "pool_chunks_backward",
            router_keys.device.type,
            prefer=namespace,
            states=router_keys.dtype,
            multiple=alignment(router_keys.shape[2]),
            width=size_class(router_keys.shape[1] * router_keys.shape[2]),
            routing_dtype=None,
        )
        grads = operator("pool_chunks_backward", chosen)(
            grad_content.contiguous(),
            grad_routing_keys.contiguous(),
            router_keys,
            token_offsets,
            ctx.chunk_size,
            ctx.normalize,
        )
        return *grads, None, None, None, None, None

    return backward, setup_context
