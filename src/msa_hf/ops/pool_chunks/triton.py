"""`pool_chunks` and its backward in Triton: one program per chunk, tensor and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model.routing_msa import NORM_EPSILON
from ..quantize.reference import quantize_keys
from ..triton_common import both, rounded, with_dense_rows
from .reference import chunk_spans

ROWS = 32  # tokens that a program reads at once


@triton.jit
def _mean(states, start, length, head, token_stride, head_stride, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[DIM] float32, the mean of `length` tokens from `start` on; zero behind `dim`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    total = tl.zeros([ROWS, DIM], dtype=tl.float32)
    base = states + start * token_stride + head * head_stride
    for first in range(0, length, ROWS):
        real = both((first + row < length)[:, None], (column < dim)[None, :])
        place = (first + row).to(tl.int64)[:, None] * token_stride + column[None, :]
        total += tl.load(base + place, mask=real, other=0.0).to(tl.float32)
    return tl.sum(total, 0) / length


@triton.jit
def _pool(
    keys,
    values,
    router_keys,
    starts,
    lengths,
    content,
    routing_keys,
    key_token,
    key_head,
    value_token,
    value_head,
    router_token,
    router_head,
    groups,
    dim,
    epsilon,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + chunk)
    length = tl.load(lengths + chunk).to(tl.int32)
    column = tl.arange(0, DIM)
    real = column < dim
    # A name has one type in all branches, and router keys may be wanted in another than keys and values.
    if part == 0:
        key = _mean(keys, start, length, head, key_token, key_head, dim, ROWS, DIM)
        place = content + (2 * chunk * groups + head) * dim + column
        tl.store(place, rounded(key, content.dtype.element_ty), mask=real)
    elif part == 1:
        value = _mean(values, start, length, head, value_token, value_head, dim, ROWS, DIM)
        place = content + ((2 * chunk + 1) * groups + head) * dim + column
        tl.store(place, rounded(value, content.dtype.element_ty), mask=real)
    else:
        mean = _mean(router_keys, start, length, head, router_token, router_head, dim, ROWS, DIM)
        if NORMALIZE:
            mean = mean / tl.sqrt(tl.sum(mean * mean, 0) + epsilon)
        router_place = routing_keys + (chunk * groups + head) * dim + column
        tl.store(router_place, rounded(mean, routing_keys.dtype.element_ty), mask=real)


@triton.jit
def _spread(gradient, like, start, length, head, groups, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write the share of each token to the dense [tokens, G, D] `like`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    share = rounded(gradient / length, like.dtype.element_ty)
    for first in range(0, length, ROWS):
        real = both((first + row < length)[:, None], (column < dim)[None, :])
        place = ((start + first + row)[:, None] * groups + head) * dim + column[None, :]
        tl.store(like + place, tl.broadcast_to(share[None, :], (ROWS, DIM)), mask=real)


@triton.jit
def _pool_backward(
    grad_content,
    grad_routing_keys,
    router_keys,
    starts,
    lengths,
    grad_keys,
    grad_values,
    grad_router_keys,
    router_token,
    router_head,
    groups,
    dim,
    epsilon,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + chunk)
    length = tl.load(lengths + chunk).to(tl.int32)
    column = tl.arange(0, DIM)
    real = column < dim
    if part < 2:
        place = ((2 * chunk + part) * groups + head) * dim + column
        gradient = tl.load(grad_content + place, mask=real, other=0.0).to(tl.float32)
        if part == 0:
            _spread(gradient, grad_keys, start, length, head, groups, dim, ROWS, DIM)
        else:
            _spread(gradient, grad_values, start, length, head, groups, dim, ROWS, DIM)
    else:
        place = (chunk * groups + head) * dim + column
        gradient = tl.load(grad_routing_keys + place, mask=real, other=0.0).to(tl.float32)
        if NORMALIZE:
            # y = r * mean, r = (|mean|^2 + epsilon)^(-1/2):  d mean = r * (g - y * <y, g>).
            mean = _mean(router_keys, start, length, head, router_token, router_head, dim, ROWS, DIM)
            root = 1.0 / tl.sqrt(tl.sum(mean * mean, 0) + epsilon)
            unit = mean * root
            gradient = root * (gradient - unit * tl.sum(unit * gradient, 0))
        _spread(gradient, grad_router_keys, start, length, head, groups, dim, ROWS, DIM)


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
    groups, dim = values.shape[1:]
    content = values.new_empty(chunks, 2, groups, dim)
    # Scales are of whole chunks, so quantizing follows as a pass of its own, over a chunk_size-th of the bytes.
    routing_keys = values.new_empty(chunks, groups * dim, dtype=torch.float32 if routing_dtype else values.dtype)
    if routing_keys.numel():
        keys, values, router_keys = (with_dense_rows(states) for states in (keys, values, router_keys))
        strides = [states.stride(axis) for states in (keys, values, router_keys) for axis in (0, 1)]
        starts, lengths = chunk_spans(token_offsets, chunk_size, chunks)
        with torch.cuda.device_of(values):
            _pool[(chunks, 3, groups)](
                keys,
                values,
                router_keys,
                starts,
                lengths,
                content,
                routing_keys,
                *strides,
                groups,
                dim,
                NORM_EPSILON,
                NORMALIZE=normalize,
                ROWS=ROWS,
                DIM=triton.next_power_of_2(dim),
            )
    if routing_dtype is None:
        return content, routing_keys, values.new_empty(0, dtype=torch.float32)
    numbers, scales = quantize_keys(routing_keys, routing_dtype)
    return content, numbers, scales


def pool_chunks_backward(
    grad_content: Tensor,
    grad_routing_keys: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, groups, dim = router_keys.shape
    # Zero, for tokens of no document.
    grad_keys, grad_values = (grad_content.new_zeros(tokens, groups, dim) for _ in range(2))
    grad_router_keys = router_keys.new_zeros(tokens, groups, dim)
    chunks = grad_content.shape[0]
    if chunks and grad_keys.numel():
        router_keys = with_dense_rows(router_keys)
        starts, lengths = chunk_spans(token_offsets, chunk_size, chunks)
        with torch.cuda.device_of(router_keys):
            _pool_backward[(chunks, 3, groups)](
                grad_content.contiguous(),
                grad_routing_keys.contiguous(),
                router_keys,
                starts,
                lengths,
                grad_keys,
                grad_values,
                grad_router_keys,
                router_keys.stride(0),
                router_keys.stride(1),
                groups,
                dim,
                NORM_EPSILON,
                NORMALIZE=normalize,
                ROWS=ROWS,
                DIM=triton.next_power_of_2(dim),
            )
    return grad_keys, grad_values, grad_router_keys
