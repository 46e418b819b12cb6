"""Exact scores of candidates that quantized routing keys found, and the best of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.chunks_msa import chunk_rows
from ..model.routing_msa import NO_SCORE, TILE_ELEMENTS, pack_routing_tokens, select_documents
from .dispatch import alignment, choose, operator, size_class


def rescore_documents(
    queries: Tensor,
    routing_mask: Tensor,
    exact_keys: Tensor,
    offsets: Tensor,
    candidates: Tensor,
    k: int,
    *,
    backend: str | None = None,
    prefer: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` best of each sample's candidates by their exact scores; inference only.

    Args:
        queries: [B, T, E] reduced router queries.
        routing_mask: [B, T] bool.
        exact_keys: [C, E] floating, on any device (pinned, for kernels to read it directly); only the candidates' rows
            travel.
        offsets: [N + 1] int64 on the device of `queries`.
        candidates: [B, m] int64, distinct, -1 for none.
        k: how many.
        backend: `"cuda"`, `"triton"`, `"cpp"` or `"pytorch"`; default the best that takes the call.
        prefer: a namespace to take where its backend takes the call.

    Returns:
        As `route_documents`.

    Raises:
        BackendError: where the backend asked for does not take the call.
    """
    if exact_keys.device == queries.device:
        source = "device"
    else:
        source = "pinned" if exact_keys.device.type == "cpu" and exact_keys.is_pinned() else "host"
    namespace = choose(
        "rescore_documents",
        queries.device.type,
        backend,
        prefer,
        queries=queries.dtype,
        keys=exact_keys.dtype,
        multiple=alignment(exact_keys.shape[1]),
        width=size_class(exact_keys.shape[1]),
        k=size_class(k),
        source=source,
        contiguous=exact_keys.is_contiguous(),
    )
    return operator("rescore_documents", namespace)(queries, routing_mask, exact_keys, offsets, candidates, k)


def reference_rescore_documents(
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
    queries: Tensor, routing_mask: Tensor, exact_keys: Any, offsets: Any, candidates: Any, k: int
) -> tuple[Tensor, Tensor]:
    shape = queries.shape[0], k
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)
