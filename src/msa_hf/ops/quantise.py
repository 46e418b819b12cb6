"""Routing keys in fewer bits, one scale per chunk, and the exact scores of the candidates that they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chunks_msa import chunk_rows
from ..routing_msa import NO_SCORE, TILE_ELEMENTS, pack_routing_tokens, select_documents

# The largest number of each format: a chunk's scale is its largest absolute value over this.
LARGEST: dict[Any, float] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, "int4": 7.0}
KINDS: dict[str, Any] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": "int4"}


def quantise_keys(keys: Tensor, kind: torch.dtype | str) -> tuple[Tensor, Tensor]:
    """Numbers and scales of routing keys: `key = scale * number`, rounded to the nearest.

    Args:
        keys: [C, E] floating.
        kind: `"fp8"` (`torch.float8_e4m3fn`), `"int8"` (`torch.int8`) or `"int4"`.

    Returns:
        numbers [C, E] float8_e4m3fn or int8, for int4 packed [C, ceil(E / 2)] uint8 (`unpack_int4`); scales [C]
        float32, positive, also for a key of zeros.
    """
    kind = KINDS.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in LARGEST:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    keys = keys.float()
    largest = keys.abs().amax(1) if keys.shape[1] else keys.new_zeros(keys.shape[0])
    scales = torch.where(largest > 0, largest / LARGEST[kind], 1.0)
    # Subnormal scales would overflow the division.
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (keys / scales[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    if kind == torch.float8_e4m3fn:
        return numbers.to(torch.float8_e4m3fn), scales
    numbers = numbers.round().to(torch.int8)
    return (numbers, scales) if kind == torch.int8 else (pack_int4(numbers), scales)


def pack_int4(numbers: Tensor) -> Tensor:
    """[C, E] int8 from -8 to 7 -> [C, ceil(E / 2)] uint8; the even columns are the low halves."""
    numbers = torch.nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).view(torch.uint8) & 15
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_int4`: [C, width] int8."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)[:, :width].view(torch.int8)
    return ((halves ^ 8) - 8).contiguous()


def rescore_documents(
    queries: Tensor, routing_mask: Tensor, exact_keys: Tensor, offsets: Tensor, candidates: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The `k` best of each sample's candidates by their exact scores.

    Args:
        queries: [B, T, E] reduced router queries.
        routing_mask: [B, T] bool.
        exact_keys: [C, E] floating, on any device; only the candidates' rows travel.
        offsets: [N + 1] int64 on the device of `queries`.
        candidates: [B, m] int64, -1 for none.
        k: how many.

    Returns:
        As `route_documents`.
    """
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


def recall_of_candidates(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    offsets: Tensor,
    k: int,
    kind: str,
    candidates: Sequence[int],
    *,
    similarity: str = "cosine",
    backend: str | None = None,
) -> dict[int, float]:
    """Which share of the exact `k` best documents is among the best candidates of the quantised keys.

    Args:
        queries, routing_mask, keys, offsets, k, similarity, backend: as `route_documents`; `keys` exact.
        kind: `"fp8"`, `"int8"` or `"int4"`.
        candidates: how many, several.

    Returns:
        candidates -> recall from 0 to 1: after exact scoring, the share of right documents.
    """
    from .route_documents import route_documents

    exact, _ = route_documents(queries, routing_mask, keys, offsets, k, similarity=similarity, backend=backend)
    numbers, scales = quantise_keys(keys, kind)
    if kind == "int4":
        numbers = unpack_int4(numbers, keys.shape[1])
    found, _ = route_documents(
        queries,
        routing_mask,
        numbers,
        offsets,
        max(candidates),
        scales=scales,
        similarity=similarity,
        backend=backend,
    )
    wanted = exact >= 0
    total = max(int(wanted.sum()), 1)
    return {
        count: int(((exact[:, :, None] == found[:, None, :count]).any(2) & wanted).sum()) / total
        for count in candidates
    }
