"""The operations as the model calls them; see `Operations` in ops_msa.py."""

from __future__ import annotations

import importlib.util
from typing import Unpack

import torch
from torch import Tensor

from ..model.cache_msa import MemoryContext
from ..model.chunks_msa import chunk_counts
from ..model.context_attention_msa import LogitOptions
from ..model.ops_msa import PLAIN, Backend, Operations, inductor, install_operations
from ..model.streams_msa import send
from .attend_token import attend_token
from .dispatch import too_old
from .gather_documents import gather_documents, most_rows
from .pool_chunks import pool_chunks
from .route_documents import route_documents
from .row_products import InductorWithRowProducts

TOKEN_DEVICES = {"cuda"}  # on which a kernel for single tokens is quicker than PyTorch's


def pool_documents(
    keys: Tensor, values: Tensor, router_keys: Tensor, lengths: Tensor, chunk_size: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """`chunks_msa.pool_documents`, of documents one after the other."""
    padded = keys.transpose(1, 2), values.transpose(1, 2), router_keys
    # Under autocast RoPE leaves keys in float32.
    dtype = torch.promote_types(keys.dtype, values.dtype)
    width, lengths = padded[0].shape[1], lengths.cpu()
    # What stands behind a document is pooled as one of its own, and left out then: to copy the chunks costs a
    # `chunk_size`-th of what copying the tokens would.
    parts = torch.stack([lengths, width - lengths], dim=1).flatten()
    counts = chunk_counts(parts, chunk_size)
    packed_keys, packed_values, packed_router_keys = (states.flatten(0, 1).to(dtype) for states in padded)
    content, routing_keys, _ = pool_chunks(
        packed_keys,
        packed_values,
        packed_router_keys,
        send(torch.nn.functional.pad(parts.cumsum(0), (1, 0)), keys.device),
        chunk_size,
        normalize=normalize,
        chunks=int(counts.sum()),
    )
    if counts[1::2].any():
        real = torch.tensor([True, False]).repeat(len(lengths)).repeat_interleave(counts)
        rows = send(real.nonzero().squeeze(1), keys.device)
        content, routing_keys = content.index_select(0, rows), routing_keys.index_select(0, rows)
    return content.to(values.dtype), routing_keys.to(values.dtype)


def gather(
    documents: Tensor, offsets: Tensor, content: Tensor, width: int | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunks_msa.gather_documents`."""
    if width is None:
        width = most_rows(documents, offsets)
    return gather_documents(documents, offsets, content, width, dtype=dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext | None,
    /,
    **options: Unpack[LogitOptions],
) -> Tensor | None:
    """`ops_msa.leave_to_pytorch`, but on a GPU `attend_token`: a kernel or two where PyTorch takes ten."""
    if query.device.type not in TOKEN_DEVICES:
        return None
    if context is None:
        row_mask = torch.ones(key.shape[0], 0, dtype=torch.bool, device=key.device)
        context = MemoryContext(key[:, :, :0], value[:, :, :0], row_mask, prefix_length=0)
    tensors = query, key, value, context.keys, context.values
    if (
        options["softcap"] is not None
        or options["sinks"] is not None
        or options["dropout"]
        or (attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1))
        or key.shape != value.shape  # values of another width than keys
        or any(item.dtype != value.dtype for item in tensors)
        or (torch.is_grad_enabled() and any(item.requires_grad for item in tensors))
    ):
        return None
    mask = None if attention_mask is None else attention_mask[:, 0, 0, : key.shape[2]]
    scaling = query.shape[3] ** -0.5 if options["scaling"] is None else options["scaling"]
    attended = attend_token(
        query[:, :, 0], key, value, mask, context.keys, context.values, context.row_mask, context.bias, scaling
    )
    return attended[:, None]


def token_backend() -> Backend:
    """`ops_msa.inductor`, with the library's own kernel for products of single rows where there is a GPU and Triton."""
    there = torch.cuda.is_available() and torch.version.hip is None and importlib.util.find_spec("triton") is not None
    return InductorWithRowProducts() if there and too_old() is None else inductor()


def register() -> None:
    """Make the model use these."""
    install_operations(
        Operations(
            route_documents=route_documents,
            pool_documents=pool_documents,
            gather_documents=gather,
            attend_token=attend,
            token_backend=token_backend,
        )
    )


def unregister() -> None:
    """Make the model compute everything in plain PyTorch again."""
    install_operations(PLAIN)
