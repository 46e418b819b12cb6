"""Exact scores of candidates that quantized routing keys found, and the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Operation, alignment, choose, not_floating, size_class
from . import reference


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
    return RESCORE_DOCUMENTS.on(namespace)(queries, routing_mask, exact_keys, offsets, candidates, k)


def _cuda_limit(
    *, queries: torch.dtype, keys: torch.dtype, width: int, k: int, source: str, contiguous: bool, **_: object
) -> str | None:
    if source == "host":
        return "the exact keys lie in memory that is not pinned"
    if not contiguous:
        return "the exact keys are not contiguous"
    too_large = "E is above 8192" if width > 8192 else "k is above 1024" if k > 1024 else None
    return not_floating(queries, keys) or too_large


# Features: as `route_documents`, of the exact keys, and source ("device", "pinned" or "host") and contiguous of them.
RESCORE_DOCUMENTS = Operation(
    "rescore_documents",
    "(Tensor queries, Tensor routing_mask, Tensor exact_keys, Tensor offsets, Tensor candidates, int k) -> "
    "(Tensor documents, Tensor scores)",
    __name__,
    reference.rescore_documents,
    checks.check_rescore_documents,
    reference.fake_rescore_documents,
    {"cuda": _cuda_limit},
)
