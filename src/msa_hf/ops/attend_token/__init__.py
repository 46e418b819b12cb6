"""Attention of one token of every sample over the rows of its context and the tokens before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..dispatch import Operation, choose, not_floating, size_class, too_old
from . import reference

__all__ = ["attend_token"]


def attend_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    context_keys: Tensor,
    context_values: Tensor,
    row_mask: Tensor,
    bias: Tensor | None,
    scaling: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """One softmax over `[context rows; own tokens]` for a single query token of every sample; inference only.

    Args:
        query: [B, H, D].
        keys, values: [B, G, S, D] of the own tokens, the new one among them; H is a multiple of G.
        mask: [B or 1, S] bool, own tokens that are visible; None for all.
        context_keys, context_values: [B, G, R, D].
        row_mask: [B, R] bool, rows that are there.
        bias: [B, R] float32 added to the logits of rows, or None.
        scaling: of the logits.
        backend: `"triton"` or `"pytorch"`; default the best that takes the call.

    Returns:
        [B, H, D] in the dtype of `values`. Where nothing is visible, finite numbers of no meaning.

    Raises:
        ValueError: for tensors that contradict each other.
        BackendError: where the backend asked for does not take the call.
    """
    checks.check_attend_token(query, keys, values, mask, context_keys, context_values, row_mask, bias, scaling)
    namespace = choose(
        "attend_token",
        query.device.type,
        backend,
        query=query.dtype,
        keys=keys.dtype,
        values=values.dtype,
        context_keys=context_keys.dtype,
        context_values=context_values.dtype,
        dim=size_class(query.shape[2]),
        shared_by=size_class(query.shape[1] // keys.shape[1]),
    )
    return ATTEND_TOKEN.on(namespace)(query, keys, values, mask, context_keys, context_values, row_mask, bias, scaling)


def _triton_limit(
    *,
    device: str,
    query: torch.dtype,
    keys: torch.dtype,
    values: torch.dtype,
    context_keys: torch.dtype,
    context_values: torch.dtype,
    dim: int,
    shared_by: int,
    **_: object,
) -> str | None:
    if device == "cuda" and (reason := too_old()) is not None:
        return reason
    if len({query, keys, values, context_keys, context_values}) > 1:
        return "its tensors have different dtypes"
    too_large = "D is above 256" if dim > 256 else "a group has more than 64 heads" if shared_by > 64 else None
    return not_floating(query) or too_large


# Features: query, keys, values, context_keys, context_values (dtypes), dim (D) and shared_by (H / G), as size classes.
ATTEND_TOKEN = Operation(
    "attend_token",
    "(Tensor query, Tensor keys, Tensor values, Tensor? mask, Tensor context_keys, Tensor context_values, "
    "Tensor row_mask, Tensor? bias, float scaling) -> Tensor",
    __name__,
    reference.attend_token,
    checks.check_attend_token,
    reference.fake_attend_token,
    {"triton": _triton_limit},
)
