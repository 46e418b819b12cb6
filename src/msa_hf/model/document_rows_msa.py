"""Places of the chunks of documents, of all and of those that were chosen, and the scores of these alone."""

import copy

import torch
from torch import Tensor

from .routing_msa import DEFAULT_SCORING, NO_SCORE, Scoring, score_documents

# Rows of a sample, and of a batch, up to which more are taken than may be there: nobody waits to learn how many are.
UNKNOWN_ROWS, UNKNOWN_ROWS_OF_ALL = 1024, 16384


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


class ChunkLayout:
    """The chunks of every document, and the documents that a sample may choose; on every device that asks.

    Args:
        offsets: [R + 1] int64, chunks of the document in row i are `offsets[i]` up to `offsets[i + 1]`.
        visible: [B, R] bool, the documents that each sample may choose, or [1, R] for every sample; None for all.
    """

    def __init__(self, offsets: Tensor, visible: Tensor | None = None) -> None:
        self.offsets = offsets
        self.visible = visible
        self._offsets: dict[torch.device, Tensor] = {}
        self._visible: dict[torch.device, Tensor] = {}
        self._bounds: dict[int, int] = {}
        self._named: tuple[Tensor, dict[torch.device, DocumentRows]] | None = None

    def most_rows(self, documents: int) -> int:
        """The most chunks that so many documents have together."""
        if documents not in self._bounds:
            chunks = self.offsets.diff()
            self._bounds[documents] = int(chunks.topk(min(documents, len(chunks))).values.sum())
        return self._bounds[documents]

    def width_for(self, chosen: Tensor) -> int | None:
        """Rows per sample that are enough for documents [B, n] and known without waiting for their device.

        None where these would be too many beside those that are there, or nobody waits.
        """
        return None if chosen.device.type == "cpu" else self.known_width(*chosen.shape)

    def known_width(self, samples: int, documents: int) -> int | None:
        """Rows per sample that are enough for so many documents of each; None where these would be too many."""
        most = self.most_rows(documents)
        return most if most <= UNKNOWN_ROWS and most * samples <= UNKNOWN_ROWS_OF_ALL else None

    def renewed(self) -> "ChunkLayout":
        """The same for another forward, whose documents are looked up anew; what was moved to a device is shared."""
        other = copy.copy(self)
        other._named = None
        return other

    def offsets_on(self, device: torch.device) -> Tensor:
        """`offsets`, moved once."""
        if device not in self._offsets:
            self._offsets[device] = self.offsets.to(device)
        return self._offsets[device]

    def visible_on(self, device: torch.device) -> Tensor | None:
        """`visible`, moved once."""
        if self.visible is not None and device not in self._visible:
            self._visible[device] = self.visible.to(device)
        return self._visible.get(device)

    @property
    def is_shared(self) -> bool:
        """All samples may choose the same documents."""
        return self.visible is None or self.visible.shape[0] == 1

    def alive_on(self, device: torch.device) -> Tensor | None:
        """[R] bool, the documents that all samples may choose; None for all."""
        visible = self.visible_on(device)
        return None if visible is None else visible[0]

    def hide(self, scores: Tensor) -> Tensor:
        """Scores [B, R] with `NO_SCORE` for documents that a sample may not choose."""
        visible = self.visible_on(scores.device)
        return scores if visible is None else scores.masked_fill(~visible, NO_SCORE)

    def without_hidden(self, documents: Tensor) -> Tensor:
        """Documents [B, n], -1 for those that their sample may not choose."""
        if self.visible is None or not self.visible.shape[1]:
            return documents
        places = documents.clamp(min=0).to(self.visible.device)
        visible = self.visible.expand(len(documents), -1).gather(1, places)
        return documents.masked_fill(~visible.to(documents.device), -1)

    def rows_of(self, documents: Tensor, device: torch.device) -> DocumentRows:
        """The rows of documents [B, n] that were chosen beforehand and may be, for a device.

        Looked up once for all layers of a forward, which hand the same tensor.
        """
        named = self._named
        if named is None or named[0] is not documents:
            self._named = named = documents, {}
        known = named[1]
        if device not in known:
            first = next(iter(known.values()), None)
            if first is None:
                first = DocumentRows(self.without_hidden(documents), self.offsets.cpu())
            known[device] = first.to(device)
        return known[device]


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
