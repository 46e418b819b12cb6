"""`rescore_documents` in PyTorch, and the shapes of its results for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.chunks_msa import chunk_rows
from ...model.routing_msa import NO_SCORE, TILE_ELEMENTS, pack_routing_tokens, select_documents


def rescore_documents(
    queries: Tensor, routing_mask: Tensor, exact_keys: Tensor, offsets: Tensor, candidates: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        batch = candidates.shape[0]
        if offsets.shape[0] < 2 or not candidates.numel():
            return select_documents(queries.new_empty(batch, 0, dtype=torch.float32), k)
        # Ascending, so that equal scores go to the lower index; -1 last.
        order = candidates.masked_fill(candidates < 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        ascending = candidates.gather(1, order)
        rows, slots, valid = chunk_rows(ascending, offsets)
        packed, real = pack_routing_tokens(queries[:, :, None].float(), routing_mask)
        packed = packed.flatten(2)
        width, size = packed.shape[1:]
        scores = queries.new_full(ascending.shape, NO_SCORE, dtype=torch.float32)
        step = max(TILE_ELEMENTS // max(batch * max(width, size), 1), 1)
        for start in range(0, rows.shape[1], step):
            part = slice(start, start + step)
            keys = exact_keys.index_select(0, rows[:, part].flatten().to(exact_keys.device))
            keys = keys.to(queries.device).float().unflatten(0, (batch, -1))
            found = (packed @ keys.transpose(1, 2)).masked_fill(~real[..., None], NO_SCORE).amax(1)
            scores.scatter_reduce_(1, slots[:, part], found.masked_fill(~valid[:, part], NO_SCORE), "amax")
        places, best = select_documents(scores, k)
        return ascending.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1), best


def fake_rescore_documents(
    queries: Tensor, routing_mask: Tensor, exact_keys: Tensor, offsets: Tensor, candidates: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    shape = queries.shape[0], k
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)
