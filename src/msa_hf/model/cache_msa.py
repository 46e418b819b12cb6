"""`MSACache`: the keys and values of the tokens seen, and beside them the memory rows each layer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from .renamed_msa import renamed_attribute


@dataclass(frozen=True)
class MemoryContext:
    """The rows before a layer's own tokens: the rows of the prefix, then those of the chosen documents.

    Attributes:
        keys, values: [B, G, R, D] (G key/value heads), padded to the most rows of any sample.
        row_mask: [B, R] bool, rows that are there.
        prefix_length: how many of the first rows are the prefix.
        bias: [B, R] float32 added to the attention logits (score bias), or None.
        documents: [B, n] int64 that the rows belong to, -1 for none; None in layers without memory.
    """

    keys: Tensor
    values: Tensor
    row_mask: Tensor
    prefix_length: int
    bias: Tensor | None = None
    documents: Tensor | None = None

    valid = renamed_attribute("valid", "row_mask")

    @property
    def rows_per_sample(self) -> Tensor:
        """[B] int64, memory rows of each sample, the prefix not counted."""
        return self.row_mask[:, self.prefix_length :].sum(1)

    def index(self, samples: Tensor) -> MemoryContext:
        """The contexts of `samples` [B'] int64, in that order."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, samples.to(tensor.device))

        return MemoryContext(
            pick(self.keys),
            pick(self.values),
            pick(self.row_mask),
            self.prefix_length,
            None if self.bias is None else pick(self.bias),
            None if self.documents is None else pick(self.documents),
        )

    def where(self, samples: Tensor, other: MemoryContext) -> MemoryContext:
        """This context for `samples` ([B] bool), `other` for the rest: a step in which only some samples route."""
        width = max(self.keys.shape[2], other.keys.shape[2])

        def widen(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = width - shape[dim]
            return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim) if shape[dim] else tensor

        def choose(mine: Tensor, theirs: Tensor, dim: int) -> Tensor:
            mine, theirs = widen(mine, dim), widen(theirs, dim)
            return torch.where(samples.view(-1, *(1,) * (mine.dim() - 1)).to(mine.device), mine, theirs)

        bias = None
        if self.bias is not None or other.bias is not None:
            mine = self.bias if self.bias is not None else torch.zeros_like(self.row_mask, dtype=torch.float32)
            theirs = other.bias if other.bias is not None else torch.zeros_like(other.row_mask, dtype=torch.float32)
            bias = choose(mine, theirs, 1)
        documents = None
        if self.documents is not None and other.documents is not None:
            columns = max(self.documents.shape[1], other.documents.shape[1])
            mine, theirs = (
                torch.nn.functional.pad(item, (0, columns - item.shape[1]), value=-1)
                for item in (self.documents, other.documents)
            )
            documents = torch.where(samples[:, None].to(mine.device), mine, theirs)
        return MemoryContext(
            choose(self.keys, other.keys, 2),
            choose(self.values, other.values, 2),
            choose(self.row_mask, other.row_mask, 1),
            self.prefix_length,
            bias,
            documents,
        )


class KeepsContexts(Cache):
    """A cache of transformers that also keeps each layer's memory rows; in front of the class of that cache.

    The rows lie beside the keys and values, not among them: lengths and masks count the tokens seen alone, every layer
    may have its own number of rows, and decoding never copies them.

    Attributes:
        contexts: layer index -> `MemoryContext`.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.contexts: dict[int, MemoryContext] = {}

    def _index_contexts(self, samples: Tensor) -> None:
        self.contexts = {layer: context.index(samples) for layer, context in self.contexts.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._index_contexts(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for batch in {context.keys.shape[0] for context in self.contexts.values()}:
            self._index_contexts(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for batch in {context.keys.shape[0] for context in self.contexts.values()}:
            self._index_contexts(torch.arange(batch)[indices.cpu()])

    def reset(self) -> None:
        super().reset()
        self.contexts = {}


class MSACache(KeepsContexts, DynamicCache):
    """A `DynamicCache` with the documents chosen. With `offloading` the memory rows stay on the device."""


class MSAQuantizedCache(KeepsContexts, QuantizedCache):
    """A `QuantizedCache` with the documents chosen. Keys and values of the tokens seen are quantized, memory rows are
    not."""


@runtime_checkable
class HoldsContexts(Protocol):
    """A cache that keeps each layer's memory rows, whatever its class; a checkpoint's copy has classes of its own."""

    contexts: dict[int, MemoryContext]


def contexts_of(cache: Cache | None) -> dict[int, MemoryContext]:
    """The contexts that a cache keeps; empty for a cache that keeps none, and for None."""
    return cache.contexts if isinstance(cache, HoldsContexts) else {}
