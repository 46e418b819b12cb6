"""From router queries and the routing keys of a bank to the best documents, in one call (paper, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.routing_msa import reduce_queries
from .. import checks
from ..dispatch import Operation, alignment, choose, not_floating, size_class
from ..formats import is_scaled, scaled_names, usual_candidates
from ..rescore_documents import rescore_documents
from . import reference

# Devices whose matrix units want queries of 16 bits beside keys of 16 or fewer.
NARROWING = ("cuda",)


def route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    offsets: Tensor,
    k: int,
    *,
    scales: Tensor | None = None,
    alive: Tensor | None = None,
    similarity: str = "cosine",
    exact_keys: Tensor | None = None,
    candidates: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` best documents of every sample; inference only.

    The score of a document is the largest `<q_t, key_c>` over its chunks and the sample's routing tokens, accumulated
    in float32. Equal scores go to the lower index; the same inputs give the same documents.

    Args:
        queries: [B, T, H, D] router queries, or [B, T, E] already reduced (`reduce_queries`), E = G * D.
        routing_mask: [B, T] bool, tokens that route. What stands at the others, NaN too, has no effect.
        keys: [C, E] routing keys, floating; or int8 or float8_e4m3fn with `scales`.
        offsets: [N + 1] int64, chunks of document i are `offsets[i]:offsets[i + 1]`; each has at least one.
        k: how many.
        scales: [C] float32, a key is `scale * number`; for quantized keys.
        alive: [N] bool, documents that may be chosen; None for all.
        similarity: `"cosine"` or `"dot"`, which says how [B, T, H, D] queries are reduced.
        exact_keys: [C, E] floating, on any device; with quantized keys, the scores of the candidates are taken again
            from these. Without them the scores are those of the quantized keys.
        candidates: documents whose scores are taken again, at least `k` (default: `Format.candidates * k` of the keys'
            format, `4 * k`).
        backend: `"cuda"`, `"triton"`, `"cpp"` or `"pytorch"`; default the best that takes the call.

    Returns:
        documents [B, k] int64, best first, -1 where fewer can be chosen; scores [B, k] float32, -inf beside -1. A
        sample without a routing token chooses nothing.

    Raises:
        ValueError: for tensors that contradict each other.
        BackendError: where the backend asked for does not take the call.
    """
    exact_dtype = None if exact_keys is None else exact_keys.dtype
    queries, precise = for_both_stages(queries, keys.shape[1], similarity, keys.dtype, exact_dtype)
    _check(queries, routing_mask, keys, scales, offsets, alive, k)
    if exact_keys is None and candidates is not None:
        raise ValueError("`candidates` are scored again from `exact_keys`, but there are none.")
    wanted = k
    if exact_keys is not None:
        if exact_keys.shape != keys.shape:
            raise ValueError(f"`exact_keys` must be {list(keys.shape)} like `keys`, got {list(exact_keys.shape)}.")
        wanted = usual_candidates(keys.dtype) * k if candidates is None else candidates
        if wanted < k:
            raise ValueError(f"`candidates` must be at least k = {k}, got {candidates}.")
    namespace = choose(
        "route_documents",
        queries.device.type,
        backend,
        queries=queries.dtype,
        keys=keys.dtype,
        multiple=alignment(keys.shape[1]),
        width=size_class(keys.shape[1]),
        k=size_class(wanted),
    )
    documents, scores = ROUTE_DOCUMENTS.on(namespace)(queries, routing_mask, keys, scales, offsets, alive, wanted)
    if exact_keys is None:
        return documents, scores
    return rescore_documents(precise, routing_mask, exact_keys, offsets, documents, k, prefer=namespace)


def reduced(queries: Tensor, width: int, similarity: str) -> Tensor:
    """[B, T, H, D] queries -> [B, T, E] for keys [C, E = width]."""
    return reduce_queries(queries, width // queries.shape[3], similarity).flatten(2)


def for_both_stages(
    queries: Tensor, width: int, similarity: str, dtype: torch.dtype, exact_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Queries for two stages: keys of `dtype` find candidates, and exact keys decide among these.

    Each are rounded for their own keys, if at all. [B, T, E] queries, which are reduced already, stay as they are.
    """
    if queries.dim() != 4:
        return queries, queries
    whole = reduced(queries, width, similarity)
    return narrowed(whole, dtype), whole if exact_dtype is None else narrowed(whole, exact_dtype)


def narrowed(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, E] queries as keys of a dtype are scored with on their device."""
    if queries.device.type in NARROWING and dtype != torch.float32:
        queries = queries.to(torch.bfloat16 if is_scaled(dtype, "route_documents") else dtype)
    return queries


def _check(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    alive: Tensor | None,
    k: int,
) -> None:
    def require(valid: bool, problem: str) -> None:
        if not valid:
            raise ValueError(problem)

    require(queries.dim() == 3 and queries.is_floating_point(), "`queries` must be [B, T, H, D] or [B, T, E] floating.")
    require(
        routing_mask.dtype == torch.bool and routing_mask.shape == queries.shape[:2],
        f"`routing_mask` must be {list(queries.shape[:2])} bool like `queries`, got {list(routing_mask.shape)} "
        f"{routing_mask.dtype}.",
    )
    require(
        keys.dim() == 2 and keys.shape[1] == queries.shape[2],
        f"`keys` must be [C, {queries.shape[2]}] like `queries`, got {list(keys.shape)}.",
    )
    require(
        is_scaled(keys.dtype, "route_documents") == (scales is not None),
        f"`scales` belong to {scaled_names('route_documents')} keys, and only to them; the keys are {keys.dtype}.",
    )
    if scales is not None:
        require(
            scales.shape == keys.shape[:1] and scales.dtype == torch.float32,
            f"`scales` must be [{keys.shape[0]}] float32, got {list(scales.shape)} {scales.dtype}.",
        )
    require(offsets.dim() == 1 and offsets.dtype == torch.int64, "`offsets` must be [N + 1] int64.")
    require(offsets.shape[0] >= 1, "`offsets` must begin with 0.")
    if alive is not None:
        require(
            alive.dtype == torch.bool and alive.dim() == 1 and alive.shape[0] == offsets.shape[0] - 1,
            f"`alive` must be [{offsets.shape[0] - 1}] bool, got {list(alive.shape)} {alive.dtype}.",
        )
    require(k >= 1, f"`k` must be at least 1, got {k}.")
    tensors = [routing_mask, keys, offsets, *(item for item in (scales, alive) if item is not None)]
    require(
        all(item.device == queries.device for item in tensors),
        f"All tensors but `exact_keys` must lie on the device of `queries`, {queries.device}.",
    )


def _limit(*, queries: torch.dtype, keys: torch.dtype, **_: object) -> str | None:
    return not_floating(queries, *([] if keys in (torch.int8, torch.float8_e4m3fn) else [keys]))


# Features: queries, keys (dtypes), multiple (the largest power of two up to 64 that divides E), width (the least power
# of two from E), k (likewise).
ROUTE_DOCUMENTS = Operation(
    "route_documents",
    "(Tensor queries, Tensor routing_mask, Tensor keys, Tensor? scales, Tensor offsets, Tensor? alive, int k) -> "
    "(Tensor documents, Tensor scores)",
    __name__,
    reference.route_documents,
    checks.check_route_documents,
    reference.fake_route_documents,
    {"cuda": _limit, "triton": _limit},
)
