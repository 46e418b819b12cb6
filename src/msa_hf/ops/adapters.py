"""The operations as the model calls them; see `Operations` in ops_msa.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.ops_msa import PLAIN, Operations, install_operations
from ..model.streams_msa import send
from .gather_documents import gather_documents, most_rows
from .pool_chunks import pool_chunks
from .route_documents import route_documents


def pool_documents(
    keys: Tensor, values: Tensor, router_keys: Tensor, lengths: Tensor, chunk_size: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """`chunks_msa.pool_documents` of packed documents."""
    padded = keys.transpose(1, 2), values.transpose(1, 2), router_keys
    # Under autocast RoPE leaves keys in float32.
    dtype = torch.promote_types(keys.dtype, values.dtype)
    width, lengths = padded[0].shape[1], lengths.cpu()
    counts = lengths.tolist()
    if min(counts) == width:
        packed = [states.flatten(0, 1) for states in padded]
    else:
        real = torch.arange(width) < lengths[:, None]
        rows = send(real.flatten().nonzero().squeeze(1), keys.device)
        packed = [states[rows // width, rows % width] for states in padded]
    packed_keys, packed_values, packed_router_keys = (states.to(dtype) for states in packed)
    content, routing_keys, _ = pool_chunks(
        packed_keys,
        packed_values,
        packed_router_keys,
        send(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), keys.device),
        chunk_size,
        normalize=normalize,
        chunks=sum(-(-count // chunk_size) for count in counts),
    )
    return content.to(values.dtype), routing_keys.to(values.dtype)


def gather(
    documents: Tensor, offsets: Tensor, content: Tensor, width: int | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunks_msa.gather_documents`."""
    if width is None:
        width = most_rows(documents, offsets)
    return gather_documents(documents, offsets, content, width, dtype=dtype)


def register() -> None:
    """Make the model use these."""
    install_operations(
        Operations(route_documents=route_documents, pool_documents=pool_documents, gather_documents=gather)
    )


def unregister() -> None:
    """Make the model compute everything in plain PyTorch again."""
    install_operations(PLAIN)
