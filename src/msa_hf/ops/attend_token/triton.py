"""`attend_token` in Triton: a program for some rows of a group's heads, and one for each head that joins their parts.

The rows of a token's context are few, and a GPU has more multiprocessors than a model has groups: what takes long is
that one program waits for row after row. So rows are cut into as many parts as there is room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERPRETED, rounded, with_dense_rows

PROGRAMS = 264  # that a GPU is given at least, two for each multiprocessor of an H200
LEAST_HEADS = 16  # rows of the smallest product of tensor cores
TILE_BYTES = 32_768  # of keys that a program loads at once, and of values

_INTERPRETED = tl.constexpr(INTERPRETED)
# Before any bias, what hides a row: finite, so that no exponential of a difference is NaN.
_HIDDEN = tl.constexpr(-3.0e38)


@triton.jit
def _product(left, right):
    """The matrix product in float32; float32 numbers are not cut to those of tensor cores."""
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _attend(
    query,
    keys,
    values,
    mask,
    context_keys,
    context_values,
    row_mask,
    bias,
    out,
    parts,
    statistics,
    query_sample,
    query_head,
    keys_sample,
    keys_group,
    keys_row,
    values_sample,
    values_group,
    values_row,
    mask_sample,
    context_keys_sample,
    context_keys_group,
    context_keys_row,
    context_values_sample,
    context_values_group,
    context_values_row,
    own_rows,
    context_rows,
    scaling,
    groups,
    shared_by,
    splits,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Program (sample and group, split): the attention of the group's heads over `tiles` tiles of rows.

    `out` where there is one split alone; else `parts`, what the weights add up, and `statistics`, the largest logit and
    the sum of the weights.
    """
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    split = tl.program_id(1)
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, BLOCK_D)
    real_head = head < shared_by
    real_dim = dim < D
    first_head = group * shared_by + head
    states = tl.load(
        query + sample * query_sample + first_head[:, None] * query_head + dim[None, :],
        mask=(real_head[:, None] & real_dim[None, :]) != 0,
        other=0.0,
    )
    context_tiles = tl.cdiv(context_rows, TILE)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, BLOCK_D], tl.float32)
    for step in range(0, tiles):
        tile = split * tiles + step
        from_keys = keys + sample * keys_sample + group * keys_group
        from_values = values + sample * values_sample + group * values_group
        visible = mask + sample * mask_sample
        next_key = keys_row
        next_value = values_row
        rows = own_rows
        begin = (tile - context_tiles) * TILE
        if tile < context_tiles:
            from_keys = context_keys + sample * context_keys_sample + group * context_keys_group
            from_values = context_values + sample * context_values_sample + group * context_values_group
            visible = row_mask + sample * context_rows
            next_key = context_keys_row
            next_value = context_values_row
            rows = context_rows
            begin = tile * TILE
        row = begin + tl.arange(0, TILE)
        here = row < rows
        inside = (here[:, None] & real_dim[None, :]) != 0
        key = tl.load(from_keys + row[:, None] * next_key + dim[None, :], mask=inside, other=0.0)
        value = tl.load(from_values + row[:, None] * next_value + dim[None, :], mask=inside, other=0.0)
        readable = here
        if not HAS_MASK:
            readable = (here & (tile < context_tiles)) != 0
        seen = tl.load(visible + row, mask=readable, other=1)
        logits = _product(states, tl.trans(key)) * scaling
        if HAS_BIAS:
            biased = (here & (tile < context_tiles)) != 0
            logits += tl.load(bias + sample * context_rows + row, mask=biased, other=0.0)[None, :]
        logits = tl.where(((seen != 0) & here)[None, :], logits, _HIDDEN)
        most = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp(logits - most[:, None])
        kept = tl.exp(best - most)
        weight = weight * kept + tl.sum(weights, 1)
        total = total * kept[:, None] + _product(rounded(weights, value.dtype), value)
        best = most
    stored = (real_head[:, None] & real_dim[None, :]) != 0
    place = sample * groups * shared_by + first_head
    if SINGLE:
        result = rounded(total / weight[:, None], out.dtype.element_ty)
        tl.store(out + place[:, None] * D + dim[None, :], result, mask=stored)
    else:
        tl.store(parts + (place * splits + split)[:, None] * D + dim[None, :], total, mask=stored)
        tl.store(statistics + (place * splits + split) * 2, best, mask=real_head)
        tl.store(statistics + (place * splits + split) * 2 + 1, weight, mask=real_head)


@triton.jit
def _join(parts, statistics, out, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Program (sample and head): its parts, each by its share of all weights."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_D)
    real = split < splits
    best = tl.load(statistics + (head * splits + split) * 2, mask=real, other=float("-inf"))
    weight = tl.load(statistics + (head * splits + split) * 2 + 1, mask=real, other=0.0)
    part = tl.load(
        parts + (head * splits + split)[:, None] * D + dim[None, :],
        mask=(real[:, None] & (dim < D)[None, :]) != 0,
        other=0.0,
    )
    share = tl.exp(best - tl.max(best, 0))
    total = tl.sum(part * share[:, None], 0) / tl.sum(weight * share, 0)
    tl.store(out + head * D + dim, rounded(total, out.dtype.element_ty), mask=dim < D)


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
    (samples, heads, dim), groups = query.shape, keys.shape[1]
    query, keys, values, context_keys, context_values = (
        with_dense_rows(item) for item in (query, keys, values, context_keys, context_values)
    )
    own_rows, context_rows = keys.shape[2], context_keys.shape[2]
    block = max(triton.next_power_of_2(dim), LEAST_HEADS)
    tile = max(min(TILE_BYTES // (block * keys.element_size()), 64), 16)
    count = triton.cdiv(own_rows, tile) + triton.cdiv(context_rows, tile)
    tiles = triton.cdiv(count, max(min(count, PROGRAMS // max(samples * groups, 1)), 1))
    splits = triton.cdiv(count, tiles)
    out = values.new_empty(samples, heads, dim)
    if not out.numel():
        return out
    single = splits == 1
    parts = out if single else out.new_empty(samples, heads, splits, dim, dtype=torch.float32)
    statistics = out if single else out.new_empty(samples, heads, splits, 2, dtype=torch.float32)
    # A mask of one sample is that of all.
    shown = row_mask.contiguous().view(torch.uint8)
    visible = shown if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(query):
        _attend[(samples * groups, splits)](
            query,
            keys,
            values,
            visible,
            context_keys,
            context_values,
            shown,
            out if bias is None else bias.contiguous(),
            out,
            parts,
            statistics,
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            0 if mask is None or mask.shape[0] == 1 else own_rows,
            *context_keys.stride()[:3],
            *context_values.stride()[:3],
            own_rows,
            context_rows,
            float(scaling),
            groups,
            heads // groups,
            splits,
            tiles,
            D=dim,
            BLOCK_D=block,
            HEADS=max(triton.next_power_of_2(heads // groups), LEAST_HEADS),
            TILE=tile,
            HAS_MASK=mask is not None,
            HAS_BIAS=bias is not None,
            SINGLE=single,
            num_warps=4,
            num_stages=2,
        )
        if not single:
            _join[(samples * heads,)](
                parts,
                statistics,
                out,
                splits,
                D=dim,
                BLOCK_D=block,
                SPLITS=triton.next_power_of_2(splits),
                num_warps=1,
            )
    return out
