"""Memory layers whose documents lie in several processes: `ShardedLayer`; `ReplicatedLayer`, with all content here."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...model.chunks_msa import ContextRows
from ...model.dense_layer_msa import DenseLayer, address_of, select_scored
from ...model.document_rows_msa import scores_at
from ...model.routing_msa import NO_SCORE, Scoring, Selection
from ...ops.gather_documents import gather_documents, most_rows
from ..host_memory import is_read_by
from .session import ShardSession


@dataclass(frozen=True)
class ShardedLayer:
    """A memory layer whose documents lie in several processes; for one forward, in all of them at once.

    Attributes:
        part: this process' chunks.
        session: the forward.
    """

    part: DenseLayer
    session: ShardSession

    @staticmethod
    def moved(part: DenseLayer, device: torch.device | str | None, dtype: torch.dtype | None) -> DenseLayer:
        """The same part on another device or in another dtype."""
        return part.to(device, dtype)

    def serve(self, similarity: str) -> None:
        """Do this process' part of a forward of others, by the similarity of the bank."""
        session, keys = self.session, self.part.routing_keys
        sizes = session.sizes
        queries = keys.new_zeros(0, sizes.tokens, sizes.heads, self.part.pooled_kv.shape[-1])
        mask = torch.zeros(0, sizes.tokens, dtype=torch.bool, device=keys.device)
        if sizes.all_scores:
            session.score(queries, mask, keys, similarity)
        else:
            session.exchange(queries, mask, keys, similarity)
        self.rows_of(torch.empty(0, sizes.columns, dtype=torch.int64, device=keys.device))

    def rows_of(self, documents: Tensor) -> ContextRows:
        """The rows of documents [B, n] of the whole bank, on the device of the routing keys."""
        return self.session.gather(documents, self.part.pooled_kv)

    def width(self, samples: int, k: int) -> int | None:
        """Rows of each sample that are enough for `k` documents and known beforehand, None where there are none."""
        return self.session.layout.most_rows(k)

    # `LayerMemory` ----------------------------------------------------------------------------------------------------

    def addresses(self, device: torch.device, samples: int, k: int) -> Hashable | None:
        """The addresses of all that is read; see `LaunchesAlone`. Exchanges between devices are recorded too."""
        keys, content, width = self.part.routing_keys, self.part.pooled_kv, self.width(samples, k)
        if width is None or keys.device != device or not is_read_by(device, content):
            return None
        shared = self.session.addresses(device, k)
        return None if shared is None else (width, address_of(keys), address_of(content), *shared)

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample, from the best of every process."""
        if self.session.sizes.all_scores:
            return select_scored(self.score(queries, mask, scoring), k)
        keys = self.part.routing_keys
        with torch.no_grad():
            queries, mask = queries.to(keys.device), mask.to(keys.device)
            documents, scores, _ = self.session.exchange(queries, mask, keys, scoring.similarity)
        return Selection(documents, scores)

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores of all documents, or of those that are given; no gradient."""
        session, keys = self.session, self.part.routing_keys
        queries, mask = queries.to(keys.device), mask.to(keys.device)
        if documents is None:
            return session.layout.hide(session.score(queries, mask, keys, scoring.similarity))
        if session.sizes.all_scores:
            scores = session.layout.hide(session.score(queries, mask, keys, scoring.similarity))
            return scores_at(scores, documents.to(keys.device))
        with torch.no_grad():
            *_, scores = session.exchange(queries, mask, keys, scoring.similarity)
            shown = session.layout.without_hidden(documents).to(keys.device)
            return scores[:, : shown.shape[1]].masked_fill(shown < 0, NO_SCORE)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of documents, wherever they lie."""
        device = self.part.routing_keys.device
        return self.rows_of(selection.documents.to(device)).to(device, dtype)


class ReplicatedLayer(ShardedLayer):
    """A layer of which every process has its own documents' routing keys, and all documents' content.

    Content lies where the bank has it, such as in host memory that all processes of a host share; nothing of it is
    exchanged.
    """

    @staticmethod
    def moved(part: DenseLayer, device: torch.device | str | None, dtype: torch.dtype | None) -> DenseLayer:
        """The routing keys on another device or in another dtype; content stays where and as it is."""
        return replace(part, routing_keys=part.routing_keys.to(device, dtype))

    def width(self, samples: int, k: int) -> int | None:
        """Rows of each sample that are enough for `k` documents and known beforehand, None where there are none."""
        return self.session.layout.known_width(samples, k)

    def rows_of(self, documents: Tensor) -> ContextRows:
        """The rows of documents [B, n], read from where they lie."""
        layout, device = self.session.layout, documents.device
        width = layout.width_for(documents)
        width = most_rows(documents, layout.offsets_on(device)) if width is None else width
        return ContextRows(*gather_documents(documents, layout.offsets_on(device), self.part.pooled_kv, width))
