"""Checks of the operations' arguments in front of the backends that are written in Python, as csrc/checks.h has them.

The functions that people call check too; these are for who calls an operation directly, through `torch.ops`.
Numbers in a tensor are looked at on the CPU alone: nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.chunks_msa import chunk_counts
from .formats import is_scaled

MOST_SIZE = 2**31 - 1


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor of another shape, in which -1 stands for any size, or of another dtype."""
    if not isinstance(tensor, Tensor):  # a schema lets None through
        raise ValueError(f"`{name}` must be a tensor, got {tensor!r}.")
    fits = tensor.dim() == len(shape) and all(
        wanted < 0 or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or (dtype is not None and tensor.dtype != dtype):
        wanted = ", ".join("*" if size < 0 else str(size) for size in shape)
        kind = "" if dtype is None else f" {dtype}"
        raise ValueError(f"`{name}` must be [{wanted}]{kind}, got {list(tensor.shape)} {tensor.dtype}.")


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse numbers that are not floating, or have one byte."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(f"`{name}` must be floating, got {tensor.dtype}.")


def check_size(name: str, size: int, least: int = 0) -> None:
    """Refuse a size that is too small, or that is counted in more than 32 bits."""
    if not least <= size <= MOST_SIZE:
        raise ValueError(f"`{name}` must lie from {least} to 2^31 - 1, got {size}.")


def check_devices(first: Tensor, others: dict[str, Tensor | None]) -> None:
    """Refuse tensors that lie on another device than the first."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"`{name}` lies on {tensor.device} instead of {first.device}.")


def check_offsets(name: str, offsets: Tensor, end: int | None) -> None:
    """Refuse offsets that do not rise from 0 to `end`, or to any number."""
    check_tensor(name, offsets, [-1], torch.int64)
    if not len(offsets):
        raise ValueError(f"`{name}` must begin with 0.")
    if offsets.device.type == "cpu" and (
        int(offsets[0]) != 0
        or int(offsets[-1]) != (offsets[-1] if end is None else end)
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise ValueError(f"`{name}` must rise from 0{'' if end is None else f' to {end}'}.")


def check_route_documents(
    queries: Tensor,
    routing_mask: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    alive: Tensor | None,
    k: int,
) -> None:
    """Refuse contradictions; see `route_documents`."""
    check_tensor("queries", queries, [-1, -1, -1])
    check_floating("queries", queries)
    check_tensor("routing_mask", routing_mask, queries.shape[:2], torch.bool)
    check_tensor("keys", keys, [-1, queries.shape[2]])
    if is_scaled(keys.dtype, "route_documents") != (scales is not None):
        raise ValueError(f"`scales` belong to quantized keys, and only to them; the keys are {keys.dtype}.")
    if scales is None:
        check_floating("keys", keys)
    else:
        check_tensor("scales", scales, keys.shape[:1], torch.float32)
        if scales.device.type == "cpu" and not bool((scales >= 0).all()):
            raise ValueError("`scales` must not be negative or NaN.")
    check_offsets("offsets", offsets, keys.shape[0])
    if alive is not None:
        check_tensor("alive", alive, [len(offsets) - 1], torch.bool)
    check_size("k", k)
    others = {"routing_mask": routing_mask, "keys": keys, "scales": scales, "offsets": offsets, "alive": alive}
    check_devices(queries, others)


def check_rescore_documents(
    queries: Tensor, routing_mask: Tensor, exact_keys: Tensor, offsets: Tensor, candidates: Tensor, k: int
) -> None:
    """Refuse contradictions; see `rescore_documents`."""
    check_tensor("queries", queries, [-1, -1, -1])
    check_floating("queries", queries)
    check_tensor("routing_mask", routing_mask, queries.shape[:2], torch.bool)
    check_tensor("exact_keys", exact_keys, [-1, queries.shape[2]])
    check_floating("exact_keys", exact_keys)
    check_offsets("offsets", offsets, exact_keys.shape[0])
    check_tensor("candidates", candidates, [queries.shape[0], -1], torch.int64)
    check_positions("candidates", candidates, len(offsets) - 1)
    check_size("k", k)
    check_devices(queries, {"routing_mask": routing_mask, "offsets": offsets, "candidates": candidates})


def check_positions(name: str, documents: Tensor, count: int) -> None:
    """Refuse positions of documents that are not there."""
    if documents.device.type == "cpu" and documents.numel() and (last := int(documents.max())) >= count:
        raise ValueError(f"`{name}`: there is no document {last}, only {count} documents.")


def check_pool_chunks(
    keys: Tensor,
    values: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    chunks: int,
    normalize: bool,
    routing_dtype: torch.dtype | None = None,
) -> None:
    """Refuse contradictions; see `pool_chunks`."""
    check_tensor("values", values, [-1, -1, -1])
    check_floating("values", values)
    check_tensor("keys", keys, values.shape, values.dtype)
    check_tensor("router_keys", router_keys, values.shape, values.dtype)
    check_size("G * D", values.shape[1] * values.shape[2])
    if routing_dtype is not None and not is_scaled(routing_dtype, "pool_chunks"):
        raise ValueError(f"`routing_dtype` must be a quantized one or None, got {routing_dtype}.")
    check_chunks(token_offsets, values.shape[0], chunk_size, "chunks", chunks)
    check_devices(values, {"keys": keys, "router_keys": router_keys, "token_offsets": token_offsets})


def check_chunks(token_offsets: Tensor, tokens: int, chunk_size: int, name: str, chunks: int) -> None:
    """Refuse another number of chunks than documents have."""
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}.")
    check_offsets("token_offsets", token_offsets, tokens)
    if token_offsets.device.type == "cpu":
        needed = int(chunk_counts(token_offsets.diff(), chunk_size).sum())
        if chunks != needed:
            raise ValueError(f"`{name}` must be {needed} for these documents, got {chunks}.")
    elif chunks < 0:
        raise ValueError(f"`{name}` must not be negative, got {chunks}.")


def check_pool_chunks_backward(
    grad_content: Tensor,
    grad_routing_keys: Tensor,
    router_keys: Tensor,
    token_offsets: Tensor,
    chunk_size: int,
    normalize: bool,
) -> None:
    """Refuse contradictions; see `pool_chunks`."""
    check_tensor("router_keys", router_keys, [-1, -1, -1])
    groups, dim = router_keys.shape[1:]
    check_size("G * D", groups * dim)
    check_tensor("grad_content", grad_content, [-1, 2, groups, dim])
    check_tensor("grad_routing_keys", grad_routing_keys, [grad_content.shape[0], groups * dim])
    for name, tensor in (("router_keys", router_keys), ("gradients", grad_content), ("gradients", grad_routing_keys)):
        check_floating(name, tensor)
    check_chunks(token_offsets, router_keys.shape[0], chunk_size, "the chunks of gradients", grad_content.shape[0])
    others = {"grad_content": grad_content, "grad_routing_keys": grad_routing_keys, "token_offsets": token_offsets}
    check_devices(router_keys, dict(others))


def check_gather_documents(
    documents: Tensor,
    offsets: Tensor,
    content: Tensor,
    scales: Tensor | None,
    width: int,
    dtype: torch.dtype | None = None,
    first: int | None = None,
) -> None:
    """Refuse contradictions; see `gather_documents`. Content may lie in host memory."""
    check_tensor("documents", documents, [-1, -1], torch.int64)
    check_tensor("content", content, [-1, 2, -1, -1])
    check_size("G * D", content.shape[2] * content.shape[3])
    if is_scaled(content.dtype, "gather_documents") != (scales is not None):
        raise ValueError(f"`scales` belong to quantized content, and only to it; this is {content.dtype}.")
    if scales is None:
        check_floating("content", content)
    else:
        check_tensor("scales", scales, content.shape[:2], torch.float32)
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"`dtype` must be floating, got {dtype}.")
    check_offsets("offsets", offsets, content.shape[0] if first is None else None)
    if first is not None and first < 0:
        raise ValueError(f"`first` must be at least 0, got {first}.")
    check_positions("documents", documents, len(offsets) - 1)
    check_size("width", width)
    check_devices(documents, {"offsets": offsets})


def check_attend_token(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    context_keys: Tensor,
    context_values: Tensor,
    row_mask: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> None:
    """Refuse contradictions; see `attend_token`."""
    check_tensor("query", query, [-1, -1, -1])
    samples, heads, dim = query.shape
    check_tensor("keys", keys, [samples, -1, -1, dim])
    groups = keys.shape[1]
    if not groups or heads % groups:
        raise ValueError(f"`query` has {heads} heads, which {groups} groups of keys cannot share.")
    check_tensor("values", values, keys.shape)
    check_tensor("context_keys", context_keys, [samples, groups, -1, dim])
    check_tensor("context_values", context_values, context_keys.shape)
    if not keys.shape[2] + context_keys.shape[2]:
        raise ValueError("There is nothing to attend to: `keys` and `context_keys` have no rows.")
    states = {"query": query, "keys": keys, "values": values, "context_keys": context_keys}
    for name, tensor in {**states, "context_values": context_values}.items():
        check_floating(name, tensor)
    if mask is not None:
        shape = [1 if mask.shape[:1] == (1,) else samples, keys.shape[2]]
        check_tensor("mask", mask, shape, torch.bool)
    check_tensor("row_mask", row_mask, [samples, context_keys.shape[2]], torch.bool)
    if bias is not None:
        check_tensor("bias", bias, row_mask.shape, torch.float32)
    others = {"keys": keys, "values": values, "mask": mask, "context_keys": context_keys}
    check_devices(query, {**others, "context_values": context_values, "row_mask": row_mask, "bias": bias})
