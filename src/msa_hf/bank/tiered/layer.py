"""`TieredLayer`: a memory layer whose routing keys and rows lie where a plan put them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...model.bank_format_msa import chunk_ranges
from ...model.chunks_msa import ContextRows
from ...model.dense_layer_msa import address_of, select_scored
from ...model.document_rows_msa import ChunkLayout, DocumentRows, score_rows
from ...model.renamed_msa import renamed_attribute
from ...model.routing_msa import Scoring, Selection, score_documents, select_of_rankings
from ...ops import gather_documents, rescore_documents, route_documents
from ...ops.formats import join_rows
from ...ops.gather_documents import most_rows
from ...ops.route_documents import for_both_stages
from ..host_memory import is_read_by
from .lru_cache import DocumentLRU
from .rows import Rows

# Bytes of routing keys that are on the device at once where they are read from host memory for every question.
STREAMED_BYTES = 1 << 28


@dataclass(frozen=True)
class RoutingKeys:
    """The routing keys of a layer.

    Attributes:
        rows: what questions are scored with.
        exact: the bank's own keys, where `rows` are others.
        streamed: `rows` lie in host memory and go through the device for every question.
        candidates: documents whose scores are taken again from `exact`; 0 for none, None for `usual` times `k`.
        usual: `Format.candidates` of `rows`.
    """

    rows: Rows
    exact: Rows | None
    streamed: bool
    candidates: int | None
    usual: int

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def best(self) -> Rows:
        """The keys that are exact."""
        return self.rows if self.exact is None else self.exact

    def route(
        self, queries: Tensor, routing_mask: Tensor, layout: ChunkLayout, k: int, similarity: str
    ) -> tuple[Tensor, Tensor]:
        """`ops.route_documents` of the documents of `layout`."""
        offsets, alive, wanted = layout.offsets_on(self.device), layout.alive_on(self.device), k
        if again := self.exact is not None and self.candidates != 0:
            usual = max(min(self.usual * k, offsets.shape[0] - 1), k)
            wanted = usual if self.candidates is None else self.candidates
            if wanted < k:
                raise ValueError(f"`candidates` must be at least the {k} documents of `top_k`, or 0, got {wanted}.")
        exact_dtype = None if self.exact is None else self.exact.dtype
        queries, precise = for_both_stages(queries, self.rows.shape[1], similarity, self.rows.dtype, exact_dtype)
        if self.streamed:
            documents, scores = self._streamed(queries, routing_mask, layout, wanted)
        else:
            assert self.rows.whole is not None
            documents, scores = route_documents(
                queries, routing_mask, self.rows.whole, offsets, wanted, scales=self.rows.scales, alive=alive
            )
        if not again:
            return documents, scores
        assert self.exact is not None
        keys = self.exact.whole
        if keys is not None and (keys.device == queries.device or keys.is_pinned()):
            return rescore_documents(precise, routing_mask, keys, offsets, documents, k)
        chosen = DocumentRows(documents, layout.offsets)
        (keys,) = self.exact.select(chosen.rows)
        places, scores = rescore_documents(precise, routing_mask, keys, chosen.offsets, chosen.documents, k)
        return _named(places, chosen), scores

    def _streamed(self, queries: Tensor, routing_mask: Tensor, layout: ChunkLayout, k: int) -> tuple[Tensor, Tensor]:
        """The best of all from the best of every block of documents."""
        offsets, alive = layout.offsets_on(self.device), layout.alive_on(self.device)
        starts = layout.offsets.numpy()
        row_bytes = self.rows.dtype.itemsize * self.rows.shape[1]
        found: list[tuple[Tensor, Tensor]] = []
        for first, end in chunk_ranges(starts, max(STREAMED_BYTES // row_bytes, 1)) or [(0, 0)]:
            low, high = (int(np.searchsorted(starts, edge)) for edge in (first, end))
            keys, scales = self.rows.between(first, end)
            documents, scores = route_documents(
                queries,
                routing_mask,
                keys,
                offsets[low : high + 1] - offsets[low],
                k,
                scales=scales,
                alive=None if alive is None else alive[low:high],
            )
            found.append((torch.where(documents < 0, documents, documents + low), scores))
        documents, scores = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
        return select_of_rankings(documents, scores, k)


def _named(places: Tensor, chosen: DocumentRows) -> Tensor:
    """Documents [B, k] from places among the distinct ones."""
    known = torch.tensor([*chosen.distinct, -1], device=places.device)  # -1 counts from the end
    return known[places]


@dataclass(frozen=True)
class PooledKV:
    """The pooled keys and values of a layer.

    Attributes:
        rows: keys and values.
        dtype: of the rows that are given out.
        hot: the documents used last; None without a cache.
    """

    rows: Rows
    dtype: torch.dtype
    hot: DocumentLRU | None = None

    def gather(self, documents: Tensor, layout: ChunkLayout) -> ContextRows:
        """The rows of documents [B, n] of `layout`, on the device."""
        documents, offsets = documents.to(self.rows.device), layout.offsets_on(self.rows.device)
        if self.rows.whole is not None and self.hot is None:
            width = layout.width_for(documents)
            width = most_rows(documents, offsets) if width is None else width
            return ContextRows(
                *gather_documents(documents, offsets, self.rows.whole, width, scales=self.rows.scales, dtype=self.dtype)
            )
        chosen = DocumentRows(documents, layout.offsets)
        if self.hot is None:
            numbers, *scales = self.rows.select(chosen.rows)
        else:
            numbers, *scales = self._through(self.hot, chosen, layout)
        return ContextRows(
            *gather_documents(
                chosen.documents,
                chosen.offsets,
                numbers,
                chosen.width,
                scales=scales[0] if scales else None,
                dtype=self.dtype,
            )
        )

    def _through(self, hot: DocumentLRU, chosen: DocumentRows, layout: ChunkLayout) -> tuple[Tensor, ...]:
        """The rows of the documents chosen, from the cache where they are there."""

        def fetch(documents: list[int]) -> list[tuple[Tensor, ...]]:
            missing = DocumentRows(torch.tensor(documents)[None], layout.offsets)
            columns = (tensor.split(missing.counts) for tensor in self.rows.select(missing.rows))
            return list(zip(*columns, strict=True))

        parts = hot.take(chosen.distinct, fetch)
        return tuple(map(join_rows, zip(*parts, strict=True))) or self.rows.select(chosen.rows)


@dataclass(frozen=True)
class TieredLayer:
    """A memory layer in tiers.

    Attributes:
        routing_keys: finds documents.
        pooled_kv: what is attended to.
        layout: whose chunks these are.
    """

    routing_keys: RoutingKeys
    pooled_kv: PooledKV
    layout: ChunkLayout

    content = renamed_attribute("content", "pooled_kv")

    def over(self, layout: ChunkLayout) -> TieredLayer:
        """The same chunks as those of the documents of `layout`."""
        return replace(self, layout=layout)

    # `LayerMemory` ----------------------------------------------------------------------------------------------------

    def addresses(self, device: torch.device, samples: int, k: int) -> Hashable | None:
        """The addresses of all that is read; see `LaunchesAlone`. What streams, and what is on disk, needs the host."""
        keys, kept, layout = self.routing_keys, self.pooled_kv.rows, self.layout
        width = layout.known_width(samples, k)
        if width is None or keys.streamed or self.pooled_kv.hot is not None or not layout.is_shared:
            return None
        exact = [] if keys.exact is None or keys.candidates == 0 else [keys.exact.whole]
        read = [keys.rows.whole, kept.whole, *exact]
        if keys.device != device or any(part is None or not is_read_by(device, part) for part in read):
            return None
        parts = *read, keys.rows.scales, kept.scales, layout.offsets_on(device), layout.alive_on(device)
        return width, *map(address_of, parts)

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample: what is kept in fewer bits finds candidates, exact keys decide."""
        keys = self.routing_keys
        differentiable = queries.requires_grad and torch.is_grad_enabled()
        if differentiable or not scoring.has_operation or not self.layout.is_shared:
            return select_scored(self.score(queries, mask, scoring), k)
        with torch.no_grad():
            queries, mask = queries.to(keys.device), mask.to(keys.device)
            return Selection(*keys.route(queries, mask, self.layout, k, scoring.similarity))

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores of all documents, always exact: exact keys go through the device, tile by tile.

        Of `documents` that are given, the exact keys of those alone, which may lie in host memory or on disk.
        """
        layout, keys = self.layout, self.routing_keys
        queries, mask = queries.to(keys.device), mask.to(keys.device)
        if documents is None:
            return layout.hide(score_documents(queries, mask, keys.best, layout.offsets_on(keys.device), scoring))
        chosen = layout.rows_of(documents, keys.device)
        rows, *_ = keys.best.select(chosen.rows)
        return score_rows(queries, mask, rows, chosen, scoring)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of documents, from wherever they lie."""
        with torch.no_grad():
            return self.pooled_kv.gather(selection.documents, self.layout).to(self.routing_keys.device, dtype)
