"""From the states of documents to the means of their chunks, in one pass (paper, 3.1)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...model import chunks_msa
from .. import checks
from ..dispatch import Backward, Operation, SetupContext, alignment, choose, not_floating, size_class
from ..formats import is_scaled, scaled_dtypes
from . import reference


def pool_chunks(
    keys: Tensor,
    values: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    *,
    normalize: bool = True,
    routing_dtype: torch.dtype | None = None,
    chunks: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means of chunks, accumulated in float32; a partial last chunk is the mean of its real tokens. Differentiable.

    Args:
        keys, values, router_keys: [tokens, G, D] of one floating dtype; documents one after the other.
        token_offsets: [N + 1] int64, tokens of document i are `token_offsets[i]:token_offsets[i + 1]`. A document
            without tokens has no chunks.
        chunk_size: tokens per chunk.
        normalize: L2-normalize the routing keys per head; zero vectors stay zero.
        routing_dtype: of the routing keys: `torch.int8` or `torch.float8_e4m3fn` with scales, which have no
            derivative; None for the inputs'.
        chunks: how many there are together, where the caller knows; else one look at the device.
        backend: `"cuda"`, `"triton"`, `"cpp"` or `"pytorch"`; default the best that takes the call.

    Returns:
        content [C, 2, G, D], the mean key and value of each chunk, in the inputs' dtype; routing keys [C, G * D]; their
        scales [C] float32, None where they are not quantized.

    Raises:
        ValueError: for tensors that contradict each other.
        BackendError: where the backend asked for does not take the call.
    """
    if values.dim() != 3 or any(
        item.shape != values.shape or item.dtype != values.dtype or item.device != values.device
        for item in (keys, router_keys)
    ):
        raise ValueError("`keys`, `values` and `router_keys` must be [tokens, G, D] of one shape, dtype and device.")
    if token_offsets.dim() != 1 or token_offsets.dtype != torch.int64 or token_offsets.device != values.device:
        raise ValueError(f"`token_offsets` must be [N + 1] int64 on {values.device}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    if routing_dtype is not None and not is_scaled(routing_dtype, "pool_chunks"):
        known = ", ".join(map(str, scaled_dtypes("pool_chunks")))
        raise ValueError(f"`routing_dtype` must be {known} or None, got {routing_dtype}.")
    if chunks is None:
        chunks = int(chunks_msa.chunk_counts(token_offsets.diff(), chunk_size).sum())
    namespace = choose(
        "pool_chunks",
        values.device.type,
        backend,
        states=values.dtype,
        multiple=alignment(values.shape[2]),
        width=size_class(values.shape[1] * values.shape[2]),
        routing_dtype=routing_dtype,
    )
    content, routing_keys, scales = POOL_CHUNKS.on(namespace)(
        keys, values, router_keys, token_offsets, chunk_size, chunks, normalize, routing_dtype
    )
    return content, routing_keys, None if routing_dtype is None else scales


class PooledContext(Protocol):
    """Keep what autograd needs between `pool_chunks` and its backward."""

    saved_tensors: tuple[Tensor, ...]
    chunk_size: int
    normalize: bool
    quantized: bool

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _derivative(namespace: str) -> tuple[Backward, SetupContext]:
    """Backward and setup_context of `namespace::pool_chunks`; the backward runs in the same namespace if it can."""

    def setup_context(
        ctx: PooledContext,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, int, bool, *tuple[torch.dtype | None, ...]],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        _, _, router_keys, token_offsets, chunk_size, _, normalize, *rest = inputs
        ctx.save_for_backward(router_keys, token_offsets)
        ctx.chunk_size, ctx.normalize, ctx.quantized = chunk_size, normalize, bool(rest) and rest[0] is not None

    def backward(
        ctx: PooledContext, grad_content: Tensor, grad_routing_keys: Tensor, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        router_keys, token_offsets = ctx.saved_tensors
        if ctx.quantized:
            raise RuntimeError(
                f"{namespace}::pool_chunks is inference only with a `routing_dtype`: rounding has no derivative."
            )
        chosen = choose(
            "pool_chunks_backward",
            router_keys.device.type,
            prefer=namespace,
            states=router_keys.dtype,
            multiple=alignment(router_keys.shape[2]),
            width=size_class(router_keys.shape[1] * router_keys.shape[2]),
            routing_dtype=None,
        )
        grads = POOL_CHUNKS_BACKWARD.on(chosen)(
            grad_content.contiguous(),
            grad_routing_keys.contiguous(),
            router_keys,
            token_offsets,
            ctx.chunk_size,
            ctx.normalize,
        )
        return *grads, None, None, None, None, None

    return backward, setup_context


# Features: states (dtype), multiple (of D), width (of G * D), routing_dtype (dtype or None).
def _cuda_limit(*, states: torch.dtype, width: int, **_: object) -> str | None:
    # The means of a chunk lie in 96 KB of shared memory; its gradient too, in the backward.
    return not_floating(states) or ("G * D is above 16384" if width > 16384 else None)


def _cuda_backward_limit(*, states: torch.dtype, width: int, **_: object) -> str | None:
    return not_floating(states) or ("G * D is above 8192" if width > 8192 else None)


def _triton_limit(*, states: torch.dtype, **_: object) -> str | None:
    return not_floating(states)


POOL_CHUNKS = Operation(
    "pool_chunks",
    "(Tensor keys, Tensor values, Tensor router_keys, Tensor token_offsets, int chunk_size, SymInt chunks, "
    "bool normalize, ScalarType? routing_dtype=None) -> (Tensor content, Tensor routing_keys, Tensor scales)",
    __name__,
    reference.pool_chunks,
    checks.check_pool_chunks,
    reference.fake_pool_chunks,
    {"cuda": _cuda_limit, "triton": _triton_limit},
    _derivative,
)
POOL_CHUNKS_BACKWARD = Operation(
    "pool_chunks_backward",
    "(Tensor grad_content, Tensor grad_routing_keys, Tensor router_keys, Tensor token_offsets, int chunk_size, "
    "bool normalize) -> (Tensor grad_keys, Tensor grad_values, Tensor grad_router_keys)",
    __name__,
    reference.pool_chunks_backward,
    checks.check_pool_chunks_backward,
    reference.fake_pool_chunks_backward,
    {"cuda": _cuda_backward_limit, "triton": _triton_limit},
)
