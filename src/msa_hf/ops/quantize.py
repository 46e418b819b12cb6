"""Routing keys in fewer bits, one scale per chunk, and how many of the right documents they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .route_documents import route_documents

# The largest number of each format: a chunk's scale is its largest absolute value over this.
LARGEST: dict[Any, float] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, "int4": 7.0}
KINDS: dict[str, Any] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": "int4"}


def quantize_keys(keys: Tensor, kind: torch.dtype | str) -> tuple[Tensor, Tensor]:
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
        kind: `"fp8"`, `"int8"` or `"int4"`.
        candidates: how many, several.

    Returns:
        candidates -> recall from 0 to 1: after exact scoring, the share of right documents.
    """
    exact, _ = route_documents(queries, routing_mask, keys, offsets, k, similarity=similarity, backend=backend)
    numbers, scales = quantize_keys(keys, kind)
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
