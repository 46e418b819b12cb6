"""Routing keys in fewer bits, one scale per chunk, and how many of the right documents they find."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import FORMATS, format_of, pack_int4, scaled_formats, unpack_int4
from .route_documents import route_documents

__all__ = ["pack_int4", "quantize_keys", "recall_of_candidates", "unpack_int4"]


def quantize_keys(keys: Tensor, kind: torch.dtype | str) -> tuple[Tensor, Tensor]:
    """Numbers and scales of routing keys: `key = scale * number`, rounded to the nearest.

    Args:
        keys: [C, E] floating.
        kind: a format with scales (formats.py): `"fp8"` (or `torch.float8_e4m3fn`), `"int8"` (or `torch.int8`) or
            `"int4"`.

    Returns:
        numbers [C, E] float8_e4m3fn or int8, for int4 packed [C, ceil(E / 2)] uint8 (`unpack_int4`); scales [C]
        float32, positive, also for a key of zeros.
    """
    found = FORMATS.get(kind) if isinstance(kind, str) else format_of(kind)
    if found is None or not found.scaled:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, scaled_formats()))}, got {kind!r}.")
    return found.quantize(keys)


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
    """Which share of the exact `k` best documents is among the best candidates of the quantized keys.

    Args:
        queries, routing_mask, keys, offsets, k, similarity, backend: as `route_documents`; `keys` exact.
        kind: a format with scales, such as `"int8"`.
        candidates: how many, several.

    Returns:
        candidates -> recall from 0 to 1: after exact scoring, the share of right documents.
    """
    exact, _ = route_documents(queries, routing_mask, keys, offsets, k, similarity=similarity, backend=backend)
    numbers, scales = quantize_keys(keys, kind)
    numbers = FORMATS[kind].unpacked(numbers, keys.shape[1])
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
