"""Rankings of several processes: one tensor for one exchange, and the best of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.routing_msa import select_of_rankings


def pack(documents: Tensor, scores: Tensor) -> Tensor:
    """Documents [B, k] int64 and their scores [B, k] float32 as one tensor [B, n] int32, the bits of both.

    n is even, so that documents can be seen in it again without a copy.
    """
    bits = scores.view(torch.int32)
    padding = (bits[:, :1],) if scores.shape[1] % 2 else ()
    return torch.cat((documents.view(torch.int32), bits, *padding), dim=1)


def merge(packed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of what all processes found.

    Args:
        packed: [W, B, n] int32, as `pack`, each process' best first. Documents of a later process have higher numbers.

    Returns:
        documents [B, k] int64, scores [B, k] float32, as `routing_msa.select_documents`: equal scores go to the lower
        number.
    """
    both = packed[..., : 2 * k].view(torch.int64), packed[..., 2 * k : 3 * k].view(torch.float32)
    documents, scores = (part.transpose(0, 1).flatten(1) for part in both)
    return select_of_rankings(documents, scores, k)
