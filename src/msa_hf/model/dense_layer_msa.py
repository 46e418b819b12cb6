"""`DenseLayer`: what a memory layer keeps of documents, as tensors that lie in one place."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .chunks_msa import ContextRows, chunk_counts, gather_documents
from .document_rows_msa import ChunkLayout, score_chosen, scores_at
from .ops_msa import OPERATIONS, PLAIN
from .renamed_msa import renamed_attribute
from .routing_msa import Scoring, Selection, score_documents, select_documents


@dataclass(frozen=True)
class DenseLayer:
    """The tensors that one memory layer keeps of the corpus; the chunks of a document are neighbors.

    Attributes:
        routing_keys: [C, G * D], one routing key per chunk; the groups lie one after the other.
        pooled_kv: [C, 2, G, D], pooled keys after RoPE (`[:, 0]`) and pooled values (`[:, 1]`).
        layout: whose chunks these are. None: not said yet; such a layer cannot be asked.
    """

    routing_keys: Tensor
    pooled_kv: Tensor
    layout: ChunkLayout | None = field(default=None, kw_only=True)

    content = renamed_attribute("content", "pooled_kv")

    @property
    def keys(self) -> Tensor:
        """Pooled keys [C, G, D], a view."""
        return self.pooled_kv[:, 0]

    @property
    def values(self) -> Tensor:
        """Pooled values [C, G, D], a view."""
        return self.pooled_kv[:, 1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "DenseLayer":
        """The same on another device or in another dtype; itself where nothing changes."""
        keys, pooled = self.routing_keys.to(device, dtype), self.pooled_kv.to(device, dtype)
        unchanged = keys is self.routing_keys and pooled is self.pooled_kv
        return self if unchanged else replace(self, routing_keys=keys, pooled_kv=pooled)

    def over(self, layout: ChunkLayout) -> "DenseLayer":
        """The same chunks as those of the documents of `layout`."""
        return replace(self, layout=layout)

    def _layout(self) -> ChunkLayout:
        if self.layout is None:
            raise ValueError("These chunks are of no documents yet: say whose they are with `layer.over(layout)`.")
        return self.layout

    def __getstate__(self) -> dict[str, object]:
        """The tensors without what else lies in the file or the buffer that they are a part of; kept, as a bank's."""
        for name in ("routing_keys", "pooled_kv"):
            object.__setattr__(self, name, own_tensor(getattr(self, name)))
        return dict(vars(self))

    def clone(self) -> "DenseLayer":
        """Copies of the tensors."""
        return replace(self, routing_keys=self.routing_keys.clone(), pooled_kv=self.pooled_kv.clone())

    # `LayerMemory` ----------------------------------------------------------------------------------------------------

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The `k` best documents of each sample; see `LayerMemory`."""
        layout, device = self._layout(), self.routing_keys.device
        differentiable = queries.requires_grad and torch.is_grad_enabled()
        if differentiable or not scoring.has_operation or not layout.is_shared:
            return select_scored(self.score(queries, mask, scoring), k)
        documents, scores = OPERATIONS["route_documents"](
            queries.detach().to(device),  # has no derivative
            mask.to(device),
            self.routing_keys,
            layout.offsets_on(device),
            k,
            alive=layout.alive_on(device),
            similarity=scoring.similarity,
        )
        return Selection(documents, scores)

    def addresses(self, device: torch.device, samples: int, k: int) -> Hashable | None:
        """The addresses of all that is read; see `LaunchesAlone`."""
        layout, plain = self._layout(), OPERATIONS["route_documents"] is PLAIN["route_documents"]
        if plain or not layout.is_shared or not device == self.routing_keys.device == self.pooled_kv.device:
            return None
        width = layout.known_width(samples, k)
        parts = self.routing_keys, self.pooled_kv, layout.offsets_on(device), layout.alive_on(device)
        return None if width is None else (width, *map(address_of, parts))

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        """Scores of all documents, or of those that are given; see `LayerMemory`."""
        layout, keys = self._layout(), self.routing_keys
        queries, mask = queries.to(keys.device), mask.to(keys.device)
        if documents is not None:
            return score_chosen(queries, mask, keys, layout.rows_of(documents, keys.device), scoring)
        return layout.hide(score_documents(queries, mask, keys, layout.offsets_on(keys.device), scoring))

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows of documents; see `LayerMemory`."""
        device = self.pooled_kv.device
        gather = gather_documents if self.pooled_kv.requires_grad else OPERATIONS["gather_documents"]
        layout, documents = self._layout(), selection.documents.to(device)
        found = gather(documents, layout.offsets_on(device), self.pooled_kv, layout.width_for(documents))
        return ContextRows(*found).to(device, dtype)


def address_of(tensor: Tensor | None) -> tuple[object, ...] | None:
    """Where a tensor lies, its shape and dtype."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype)


def own_tensor(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of other memory: pickling a tensor takes all of the memory that it lies in."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def select_scored(scores: Tensor, k: int) -> Selection:
    """The `k` best documents by the scores of all, [B, R] with `NO_SCORE` for those that may not be chosen.

    Their scores carry the gradient.
    """
    documents, _ = select_documents(scores, k)
    chosen = scores_at(scores, documents).masked_fill(documents < 0, float("-inf"))
    return Selection(documents, chosen, has_nan=scores.detach().isnan().any())


def layers_over(
    layers: Mapping[int, DenseLayer], lengths: Tensor, chunk_size: int, visible: Tensor | None = None
) -> dict[int, DenseLayer]:
    """The layers of documents that were just encoded.

    Args:
        layers: layer -> their chunks, documents in order.
        lengths: [N] int64, tokens of the documents.
        chunk_size: tokens of a chunk.
        visible: as of `ChunkLayout`.
    """
    layout = ChunkLayout(chunks_of(lengths, chunk_size), visible)
    return {layer: memory.over(layout) for layer, memory in layers.items()}


def chunks_of(lengths: Tensor, chunk_size: int) -> Tensor:
    """Chunk offsets [N + 1] int64 of documents with `lengths` [N] tokens."""
    return torch.nn.functional.pad(chunk_counts(lengths, chunk_size).cumsum(0), (1, 0))
