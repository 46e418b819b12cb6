"""Documents that were chosen: where their chunks lie, as the host sees it, and the scores of them alone."""

import copy

import torch
from torch import Tensor

from .routing_msa import DEFAULT_SCORING, NO_SCORE, Scoring, score_documents


class DocumentRows:
    """The rows of documents that were chosen, as the host sees them; waits for the device that holds `documents`.

    Args:
        documents: [B, n] int64, -1 for none.
        offsets: [R + 1] int64 on the CPU, chunks of all documents.

    Attributes:
        distinct: the documents, ascending, each once.
        counts: how many chunks each of them has.
        rows: [m] int64 on the CPU, their chunks, ascending.
        documents: [B, n] int64 on the device, their places among `distinct`, in the same order as the documents; -1
            for none.
        offsets: [distinct + 1] int64 on the device, where their chunks begin among `rows`.
        width: most chunks that a sample's documents have together.
    """

    def __init__(self, documents: Tensor, offsets: Tensor) -> None:
        known, places = documents.cpu().unique(return_inverse=True)
        absent = int((known < 0).sum())
        known, places = known[absent:], (places - absent).clamp(min=-1)
        counts = offsets[known + 1] - offsets[known]
        own = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self.distinct: list[int] = known.tolist()
        self.counts: list[int] = counts.tolist()
        self.rows = (offsets[known] - own[:-1]).repeat_interleave(counts) + torch.arange(int(own[-1]))
        self.documents, self.offsets = places.to(documents.device), own.to(documents.device)
        each = torch.nn.functional.pad(counts, (0, 1))[places]  # none, -1, counts from the end
        self.width = int(each.sum(1).max()) if each.numel() else 0

    def to(self, device: torch.device) -> "DocumentRows":
        """The same for another device."""
        moved = copy.copy(self)
        moved.documents, moved.offsets = self.documents.to(device), self.offsets.to(device)
        return moved


def score_chosen(
    queries: Tensor,
    routing_mask: Tensor,
    routing_keys: Tensor,
    chosen: DocumentRows,
    scoring: Scoring = DEFAULT_SCORING,
) -> Tensor:
    """Scores of documents that were chosen, each sample's own: `score_documents` that reads their keys alone.

    Args:
        queries, routing_mask, scoring: as `score_documents`.
        routing_keys: [C, G * D] of all documents, on the device of `queries`.
        chosen: the documents, on the same device.

    Returns:
        [B, n] float32, differentiable; `NO_SCORE` where there is no document, and for samples without a routing token.
    """
    keys = routing_keys.index_select(0, chosen.rows.to(queries.device))
    return score_rows(queries, routing_mask, keys, chosen, scoring)


def score_rows(
    queries: Tensor, routing_mask: Tensor, keys: Tensor, chosen: DocumentRows, scoring: Scoring = DEFAULT_SCORING
) -> Tensor:
    """`score_chosen` from the keys [m, G * D] of `chosen.rows`."""
    if not chosen.distinct:
        return queries.new_full(chosen.documents.shape, NO_SCORE, dtype=torch.float32)
    scores = score_documents(queries, routing_mask, keys, chosen.offsets, scoring)
    return scores_at(scores, chosen.documents)


def scores_at(scores: Tensor, places: Tensor) -> Tensor:
    """[B, n] of scores [B, N], in the order of `places` [B, n]; `NO_SCORE` for -1."""
    # A column of its own for none: also of no documents at all.
    scores = torch.nn.functional.pad(scores, (0, 1), value=NO_SCORE)
    return scores.gather(1, places.masked_fill(places < 0, scores.shape[1] - 1))
