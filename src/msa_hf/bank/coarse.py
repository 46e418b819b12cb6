"""A bank whose routing keys lie in clusters, of which a question reads those that are nearest to it.

    memory = coarse_bank(bank, probes=64)
    model.generate(**inputs, memory=memory)

Which documents are chosen is no longer exact: a document is found by the chunks that lie in the clusters read, and
scored by these. With as many probes as clusters it is what the bank itself chooses. docs/scaling.md says from which
size on this costs less than reading all keys, and what it loses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.chunks_msa import ContextRows
from ..model.dense_layer_msa import DenseLayer
from ..model.document_rows_msa import ChunkLayout
from ..model.memory_msa import LayerMemory, MemoryBank, OpenSession
from ..model.routing_msa import NO_SCORE, RoutingRequest, Scoring, Selection, reduce_queries, select_documents

CLUSTERS = 3.0  # times the root of the chunks
LEARNED = 64  # keys of each cluster that centers are learned from, about
ROUNDS = 8
BLOCK = 8192  # keys compared with all centers, and candidates scored, at a time


def coarse_bank(
    bank: MemoryBank, clusters: int | None = None, probes: int = 64, rounds: int = ROUNDS, seed: int = 0
) -> CoarseBank:
    """Cluster the routing keys of a bank.

    Args:
        bank: in memory as a whole, where its layers' keys lie; nothing of it is copied.
        clusters: of each layer. Default: three times the root of its chunks.
        probes: clusters that a question reads in each layer.
        rounds, seed: of k-means.

    Raises:
        ValueError: for a bank without documents or in tiers, and numbers below 1.
    """
    if not bank.is_whole:
        raise ValueError("Clusters can be made of a bank in memory alone, not of one in tiers; load it as MemoryBank.")
    if not len(bank):
        raise ValueError("A bank without documents has no routing keys to cluster.")
    for name, value in (("clusters", clusters), ("probes", probes), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    found = {}
    for layer, memory in bank.layers.items():
        keys = memory.routing_keys
        count = min(clusters or max(round(CLUSTERS * math.sqrt(len(keys))), 1), len(keys))
        centers, nearest = cluster_keys(keys, count, rounds, seed)
        sizes = torch.bincount(nearest, minlength=count)
        found[layer] = Clusters(centers, nearest.argsort(stable=True), sizes.cumsum(0) - sizes, sizes)
    return CoarseBank(bank, found, probes)


@torch.no_grad()
def cluster_keys(keys: Tensor, count: int, rounds: int = ROUNDS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means over routing keys.

    Args:
        keys: [C, W], any floating dtype.
        count: clusters, at most C.

    Returns:
        centers [count, W] float32, and the cluster of each key, [C] int64.
    """
    chance = torch.Generator().manual_seed(seed)

    def drawn(total: int, number: int) -> Tensor:
        return torch.randperm(total, generator=chance)[:number].to(keys.device)

    sample = keys[drawn(len(keys), LEARNED * count)].float()
    centers = sample[drawn(len(sample), count)].clone()
    for _ in range(rounds):
        nearest = _nearest(sample, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        sizes = torch.bincount(nearest, minlength=count)
        empty = sizes == 0
        centers = sums / sizes.clamp(min=1)[:, None]
        centers[empty] = sample[drawn(len(sample), count)][empty]  # such a cluster begins again at a key
    return centers, _nearest(keys, centers)


def _nearest(keys: Tensor, centers: Tensor) -> Tensor:
    half = centers.square().sum(1) / 2
    return torch.cat([(part.float() @ centers.T - half).argmax(1) for part in keys.split(BLOCK)])


@dataclass(frozen=True)
class Clusters:
    """The clusters of a layer's routing keys.

    Attributes:
        centers: [M, W] float32.
        chunks: [C] int64, the chunks, those of a cluster next to each other.
        starts, sizes: [M] int64, where each cluster begins in `chunks`, and how many it has.
    """

    centers: Tensor
    chunks: Tensor
    starts: Tensor
    sizes: Tensor


class CoarseBank(MemoryBank):
    """A bank in which questions read some clusters of routing keys; `coarse_bank` makes one.

    It is one state of a bank: make it again to see later commits.

    Attributes:
        clusters: of each layer.
        probes: clusters that a question reads in each layer.
    """

    def __init__(self, bank: MemoryBank, clusters: Mapping[int, Clusters], probes: int) -> None:
        counts = bank.num_chunks, bank.num_tokens
        super().__init__(bank.layers, bank.offsets, bank.prefix, bank.documents, bank.origin, counts, bank.next_id)
        self.home, self.indexes = bank.home, dict(bank.indexes)
        self.clusters, self.probes = dict(clusters), probes
        owners = torch.arange(len(bank.offsets) - 1).repeat_interleave(bank.offsets.diff())
        self._owners = owners.to(bank.device)

    def session(self, request: RoutingRequest) -> AbstractContextManager[Mapping[int, LayerMemory]]:
        """The layers, for one forward; see `Memory`.

        Raises:
            ValueError: for a model that scores documents otherwise than by the mean over heads and maxima.
        """
        if not request.scoring.has_operation:
            raise ValueError(
                f"Clusters find documents by the mean over heads and the maxima over tokens and chunks; this model "
                f"scores by {request.scoring}. Give it the bank itself."
            )
        layout = self.layout.renewed()
        layers = {
            layer: CoarseLayer(memory.over(layout), layout, self.clusters[layer], self._owners, self.probes)
            for layer, memory in self.layers.items()
        }
        return OpenSession(layers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryBank:
        """Not of a bank in clusters."""
        raise ValueError("These clusters lie where the bank's keys do; move the bank and call `coarse_bank` with it.")


@dataclass(frozen=True)
class CoarseLayer:
    """A layer that routes by clusters, and does everything else as the layer that it is made of.

    Attributes:
        exact: that layer.
        owners: [C] int64, the document row of each chunk.
    """

    exact: DenseLayer
    layout: ChunkLayout
    clusters: Clusters
    owners: Tensor
    probes: int

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Exact scores; see `LayerMemory`."""
        return self.exact.score(queries, mask, scoring, documents)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of documents; see `LayerMemory`."""
        return self.exact.gather(selection, dtype)

    @torch.no_grad()
    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The best documents among those with a chunk in the clusters read; see `LayerMemory`.

        Waits for the device once, to learn how many chunks these clusters have.
        """
        keys = self.exact.routing_keys
        groups = keys.shape[1] // queries.shape[-1]
        vectors = reduce_queries(queries.to(keys.device), groups, scoring.similarity).flatten(2)
        mask = mask.to(keys.device)
        near = _best_token(vectors @ self.clusters.centers.T, mask)
        probed = near.topk(min(self.probes, near.shape[1]), dim=1).indices
        chunks, there = self._chunks_of(probed)
        rows = self.owners[chunks].masked_fill(~there, len(self.layout.offsets) - 1)  # behind all documents
        rows, order = rows.sort(dim=1)
        chunks, there = chunks.gather(1, order), there.gather(1, order)
        scores = torch.cat(
            [_best_token(vectors @ keys[part].float().mT, mask) for part in chunks.split(BLOCK, dim=1)], dim=1
        )
        has_nan = (scores.isnan() & there).any()
        found = self._by_document(rows, scores.masked_fill(~there, NO_SCORE))
        return replace(found.best(k, self.layout.alive_on(keys.device)), has_nan=has_nan)

    def _chunks_of(self, probed: Tensor) -> tuple[Tensor, Tensor]:
        """The chunks of clusters [B, P], as [B, L], and which of these places have one."""
        sizes = self.clusters.sizes[probed]
        ends = sizes.cumsum(1)
        places = torch.arange(max(int(ends[:, -1].max()), 1), device=ends.device).expand(len(ends), -1).contiguous()
        which = torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[1] - 1)
        there = places < ends[:, -1:]
        inside = places - (ends - sizes).gather(1, which)
        at = (self.clusters.starts[probed].gather(1, which) + inside).masked_fill(~there, 0)
        return self.clusters.chunks[at], there

    def _by_document(self, rows: Tensor, scores: Tensor) -> _Found:
        """The best score of each document; rows ascend."""
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
        place = begins.long().cumsum(1) - 1
        best = torch.full_like(scores, NO_SCORE).scatter_reduce_(1, place, scores, "amax")
        return _Found(torch.full_like(rows, -1).scatter_(1, place, rows), best)


@dataclass(frozen=True)
class _Found:
    """Documents that were found: rows [B, L], ascending, -1 behind the last; their scores [B, L]."""

    rows: Tensor
    scores: Tensor

    def best(self, k: int, alive: Tensor | None) -> Selection:
        scores = self.scores
        if alive is not None:
            hidden = ~alive[self.rows.clamp(min=0, max=len(alive) - 1)]
            scores = scores.masked_fill(hidden, NO_SCORE)
        places, chosen = select_documents(scores, k)
        documents = self.rows.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)
        return Selection(documents, chosen)


def _best_token(scores: Tensor, mask: Tensor) -> Tensor:
    """[B, T, N] -> [B, N], the best of the tokens that route; -inf where none does."""
    return scores.masked_fill(~mask[:, :, None], float("-inf")).amax(1)
