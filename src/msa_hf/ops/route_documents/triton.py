"""`route_documents` in Triton: scores and the maximum over tokens in one kernel, the rest by PyTorch.

A program holds the scores of a tile of chunks for the tokens of some samples, which it never writes: of them only
[samples, chunks] leave it. Samples vary fastest over the programs, so that they read a tile of keys from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...model.routing_msa import NO_SCORE, reduce_chunks, select_documents
from ..triton_common import INTERPRETED, both, from_float8, with_dense_rows

TOKENS = 128  # per program at most
CHUNKS = 128
DEPTH = 64  # of one step of a product


@triton.jit
def _scores(
    queries,
    mask,
    keys,
    scales,
    scores,
    batch,
    tokens,
    chunks,
    size,
    query_sample,
    query_token,
    key_stride,
    no_score,
    QUANTIZED: tl.constexpr,
    FLOAT8: tl.constexpr,  # keys are bits of float8_e4m3fn
    WIDE: tl.constexpr,  # float32 products
    SAMPLES: tl.constexpr,
    TOKENS: tl.constexpr,  # of each sample at once
    CHUNKS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,  # DEPTH divides size
):
    sample_tiles = tl.cdiv(batch, SAMPLES)
    tile = tl.program_id(0) // sample_tiles
    first_sample = tl.program_id(0) % sample_tiles * SAMPLES
    chunk = tile.to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    present = chunk < chunks
    line = tl.arange(0, SAMPLES * TOKENS)
    sample = first_sample + line // TOKENS
    depth = tl.arange(0, DEPTH)
    best = tl.full([SAMPLES, CHUNKS], no_score, dtype=tl.float32)
    key_rows = keys + chunk[None, :] * key_stride
    for first_token in range(0, tokens, TOKENS):
        token = first_token + line % TOKENS
        inside = both(sample < batch, token < tokens)
        routes = tl.load(mask + sample * tokens + token, mask=inside, other=0) != 0
        query_rows = queries + sample.to(tl.int64)[:, None] * query_sample + token.to(tl.int64)[:, None] * query_token
        products = tl.zeros([SAMPLES * TOKENS, CHUNKS], dtype=tl.float32)
        for start in range(0, size, DEPTH):
            column = start + depth
            # Tokens that do not route are not read: what stands there may be anything.
            wanted, held = routes[:, None], present[None, :]
            if not EVEN:
                wanted = both(wanted, (column < size)[None, :])
                held = both(held, (column < size)[:, None])
            query = tl.load(query_rows + column[None, :], mask=wanted, other=0.0)
            key = tl.load(key_rows + column[:, None], mask=held, other=0)
            if FLOAT8:
                key = from_float8(key)
            if WIDE:
                products = tl.dot(query.to(tl.float32), key.to(tl.float32), products, input_precision="ieee")
            else:
                if QUANTIZED:
                    key = key.to(query.dtype)
                # Tensor cores cut sums off where float32 would round them, always towards zero. So they sum a few
                # numbers, and these sums are added outside. A limit other than 0 keeps the compiler from joining both.
                products += tl.dot(query, key, max_num_imprecise_acc=DEPTH)
        products = tl.where(routes[:, None], products, no_score)
        if SAMPLES == 1:
            found = tl.max(products, 0)[None, :]
        else:
            found = tl.max(tl.reshape(products, (SAMPLES, TOKENS, CHUNKS)), 1)
        best = tl.maximum(best, found)
    if QUANTIZED:  # not negative, so the maximum may be taken before
        factors = tl.load(scales + chunk, mask=present, other=0.0)
        best = tl.where(best > no_score, best * factors[None, :], no_score)
    row = first_sample + tl.arange(0, SAMPLES)
    target = scores + row.to(tl.int64)[:, None] * chunks + chunk[None, :]
    tl.store(target, best, mask=both((row < batch)[:, None], present[None, :]))


def score_chunks(queries: Tensor, routing_mask: Tensor, keys: Tensor, scales: Tensor | None) -> Tensor:
    """[B, C] float32, the largest score of each chunk over a sample's routing tokens, `NO_SCORE` without one."""
    batch, tokens, size = queries.shape
    chunks = keys.shape[0]
    scores = queries.new_full((batch, chunks), NO_SCORE, dtype=torch.float32)
    if not scores.numel() or not tokens:
        return scores
    queries, keys = with_dense_rows(queries), with_dense_rows(keys)
    # 16-bit products are exact in float32 where both sides have the type; anything else is taken in float32.
    quantized, float8 = scales is not None, keys.dtype == torch.float8_e4m3fn
    wide = queries.dtype == torch.float32 or not (quantized or keys.dtype == queries.dtype) or INTERPRETED
    width = min(max(triton.next_power_of_2(tokens), 16), TOKENS)
    samples = min(TOKENS // width, triton.next_power_of_2(batch))
    grid = (triton.cdiv(chunks, CHUNKS) * triton.cdiv(batch, samples),)
    with torch.cuda.device_of(queries):
        _scores[grid](
            queries,
            routing_mask.contiguous().view(torch.uint8),
            keys.view(torch.uint8) if float8 else keys,
            scales if scales is not None else scores,
            scores,
            batch,
            tokens,
            chunks,
            size,
            queries.stride(0),
            queries.stride(1),
            keys.stride(0),
            NO_SCORE,
            QUANTIZED=quantized,
            FLOAT8=float8,
            WIDE=wide,
            SAMPLES=samples,
            TOKENS=width,
            CHUNKS=CHUNKS,
            DEPTH=DEPTH if not wide else DEPTH // 2,
            EVEN=size % DEPTH == 0,
            num_warps=8 if samples * width * CHUNKS >= 64 * 128 else 4,
            num_stages=3,
        )
    return scores


def route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    alive: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    batch, count = queries.shape[0], offsets.shape[0] - 1
    if not count or not batch:
        return select_documents(queries.new_empty(batch, count, dtype=torch.float32), k)
    scores = reduce_chunks(score_chunks(queries, routing_mask, keys, scales), offsets, "max")
    scores = scores.masked_fill(~routing_mask.any(1, keepdim=True), NO_SCORE)
    if alive is not None:
        scores = scores.masked_fill(~alive, NO_SCORE)
    return select_documents(scores, k)
