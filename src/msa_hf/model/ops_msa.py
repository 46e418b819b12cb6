"""The operations of a memory layer and the seam where a faster implementation takes their place.

Here they are plain PyTorch, so that a checkpoint's code needs nothing beside itself. Where the package is installed,
its `ops` folder installs its own, which take the same arguments and give the same results.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from .cache_msa import MemoryContext
from .chunks_msa import gather_documents, pool_documents
from .context_attention_msa import LogitOptions
from .routing_msa import route_documents

Backend = str | Callable[..., Any]  # of torch.compile


class RouteDocuments(Protocol):
    """`routing_msa.route_documents`: the `k` best documents of every sample and their scores, without a gradient."""

    def __call__(
        self,
        queries: Tensor,
        routing_mask: Tensor,
        keys: Tensor,
        offsets: Tensor,
        k: int,
        /,
        *,
        alive: Tensor | None = None,
        similarity: str = "cosine",
    ) -> tuple[Tensor, Tensor]: ...


class PoolDocuments(Protocol):
    """`chunks_msa.pool_documents`: content and routing keys of right-padded documents."""

    def __call__(
        self, keys: Tensor, values: Tensor, router_keys: Tensor, lengths: Tensor, chunk_size: int, normalize: bool, /
    ) -> tuple[Tensor, Tensor]: ...


class GatherDocuments(Protocol):
    """`chunks_msa.gather_documents`: keys, values, which rows are valid and their columns of `documents`."""

    def __call__(
        self,
        documents: Tensor,
        offsets: Tensor,
        content: Tensor,
        width: int | None = None,
        dtype: torch.dtype | None = None,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class AttendToken(Protocol):
    """`leave_to_pytorch`, or a kernel for the attention of a single token of every sample."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        context: MemoryContext | None,
        /,
        **options: Unpack[LogitOptions],
    ) -> Tensor | None: ...


def leave_to_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext | None,
    /,
    **options: Unpack[LogitOptions],
) -> Tensor | None:
    """Attend as `context_attention` for a query [B, H, 1, D]: [B, 1, H, D], or None, as here, for a call not taken.

    Args:
        context: None for own tokens alone.
    """
    return None


def inductor() -> Backend:
    """The backend of torch.compile for layers that see one token of each sample, where Inductor was asked for."""
    return "inductor"


class Operations(TypedDict):
    """An implementation of every operation."""

    route_documents: RouteDocuments  # has no gradient
    pool_documents: PoolDocuments
    gather_documents: GatherDocuments  # where `content` needs no gradient
    attend_token: AttendToken
    token_backend: Callable[[], Backend]  # as `inductor`


PLAIN = Operations(
    route_documents=route_documents,
    pool_documents=pool_documents,
    gather_documents=gather_documents,
    attend_token=leave_to_pytorch,
    token_backend=inductor,
)
# Those in use.
OPERATIONS = Operations(**PLAIN)


def install_operations(operations: Operations) -> None:
    """Make every model of this process use these; `PLAIN` brings the plain ones back."""
    OPERATIONS.update(operations)
