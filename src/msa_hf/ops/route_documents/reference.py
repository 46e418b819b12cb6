"""`route_documents` in PyTorch, and the shapes of its results for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.routing_msa import NO_SCORE, pack_routing_tokens, reduce_chunks, score_chunks, select_documents


def route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    alive: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        batch, count = queries.shape[0], offsets.shape[0] - 1
        if not count or not batch:
            return select_documents(queries.new_empty(batch, count, dtype=torch.float32), k)
        packed, valid = pack_routing_tokens(queries[:, :, None].float(), routing_mask)
        chunk_scores = score_chunks(packed, valid, keys)
        if scales is not None:
            chunk_scores = chunk_scores * scales  # positive, so that maxima over tokens may be taken before
        scores = reduce_chunks(chunk_scores, offsets, "max").masked_fill(~valid.any(1, keepdim=True), NO_SCORE)
        if alive is not None:
            scores = scores.masked_fill(~alive, NO_SCORE)
        return select_documents(scores, k)


def fake_route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    alive: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    shape = queries.shape[0], k
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)
