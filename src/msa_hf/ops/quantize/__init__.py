"""Routing keys in fewer bits, one scale per chunk, and how many of the right documents they find."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..formats import FORMATS, pack_int4, unpack_int4
from ..route_documents import route_documents
from .reference import quantize_keys

__all__ = ["pack_int4", "quantize_keys", "recall_of_candidates", "unpack_int4"]


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
    """The share of the exact `k` best documents that is among the best candidates of the quantized keys.

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
