"""`MSACache`: the keys and values of the tokens seen, and beside them the memory rows each layer attends to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import StaticLayer

from .compat_msa import in_dtypes_of
from .recording_msa import Recordings, copy_all
from .renamed_msa import renamed_attribute

LEAST_BUCKET = 64  # rows of the smallest context of a cache whose shapes stay


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

    def padded(self, rows: int) -> MemoryContext:
        """The same with so many rows per sample; those that were not there before are masked."""
        missing = rows - self.keys.shape[2]
        if not missing:
            return self
        keys, values = (torch.nn.functional.pad(states, (0, 0, 0, missing)) for states in (self.keys, self.values))
        bias = None if self.bias is None else torch.nn.functional.pad(self.bias, (0, missing))
        row_mask = torch.nn.functional.pad(self.row_mask, (0, missing))
        return replace(self, keys=keys, values=values, row_mask=row_mask, bias=bias)

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
        self._repeat_contexts(repeats)

    def _repeat_contexts(self, repeats: int) -> None:
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


class MSAStaticCache(KeepsContexts, StaticCache):
    """A `StaticCache` with the documents chosen: shapes, and the places of tensors, are the same at every step.

    torch.compile and CUDA graphs want that. A cache that is used again after `reset` keeps its tensors too.

    Args:
        config: the model's.
        max_cache_len: tokens, questions and answers of all turns together, for which there is room.

    Attributes:
        room: `max_cache_len`.
        recordings: of runs over its tensors.
        counted: tokens that it holds, where the host knows; what writes to it without saying how much makes it None.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, *args: object, **kwargs: object) -> None:
        super().__init__(config, max_cache_len, *args, **kwargs)
        self._settled: dict[int, MemoryContext] = {}
        self.room = max_cache_len
        self.recordings = Recordings()
        self.counted: int | None = 0

    def seen(self) -> int:
        """Tokens that it holds; its device is waited for where the host does not know."""
        if self.counted is None:
            self.counted = int(self.get_seq_length())
        return self.counted

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.counted = None
        keys, values = in_dtypes_of(self.layers[layer_idx], key_states, value_states)
        return super().update(keys, values, layer_idx, *args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sample `repeats` times, as beams begin; the static layers of transformers cannot."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = (item.repeat_interleave(repeats, 0) for item in (layer.keys, layer.values))
                layer.batch_size = layer.keys.shape[0]
                _mark_as_staying([layer.keys, layer.values])
        self._repeat_contexts(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last `-tokens_to_remove` tokens out again, in one launch; transformers below 5.24 cannot."""
        self.counted = None
        if not all(type(layer) is StaticLayer and layer.is_initialized for layer in self.layers):
            super().crop(tokens_to_remove)
            return
        torch._foreach_sub_([layer.cumulative_length for layer in self.layers], abs(tokens_to_remove))

    def reset(self) -> None:
        """Empty it, in a few launches for all layers."""
        self.counted = 0
        if not all(type(layer) is StaticLayer and layer.is_initialized for layer in self.layers):
            super().reset()
            return
        torch._foreach_zero_([states for layer in self.layers for states in (layer.keys, layer.values)])
        torch._foreach_zero_([layer.cumulative_length for layer in self.layers])
        self.contexts = {}

    def settle_contexts(self) -> None:
        """Pad chosen rows to a `bucket_of` them, so that few shapes of a context ever occur, in tensors that stay."""
        self.contexts = self.settled(self.contexts)

    def settled(self, contexts: Mapping[int, MemoryContext]) -> dict[int, MemoryContext]:
        """Contexts in tensors that stay, as after `settle_contexts`; the cache goes on with those that it has."""
        copies: list[tuple[Tensor, Tensor]] = []
        settled = {layer: self._settle(layer, item, copies) for layer, item in contexts.items()}
        copy_all([place for place, _ in copies], [item for _, item in copies])
        return settled

    def take_settled(self, contexts: Mapping[int, MemoryContext]) -> None:
        """Go on with what `settled` gave at some time, whose tensors were written to since."""
        self._settled = dict(contexts)
        self.contexts.update(contexts)

    def _settle(self, layer: int, context: MemoryContext, copies: list[tuple[Tensor, Tensor]]) -> MemoryContext:
        """A context in tensors that stay, to which `copies` are yet to be made: places, and what goes there."""
        settled = self._settled.get(layer)
        if settled is context:
            return context
        if context.documents is not None:
            context = context.padded(bucket_of(context.keys.shape[2]))
        given = tensors_of(context)
        if settled is not None and shapes_of(settled) == shapes_of(context):
            copies += [(place, given[name]) for name, place in tensors_of(settled).items()]
            return settled
        own: dict[str, Any] = {name: item.clone(memory_format=torch.contiguous_format) for name, item in given.items()}
        _mark_as_staying(own.values())
        self._settled[layer] = replace(context, **own)
        return self._settled[layer]


def _mark_as_staying(tensors: Iterable[Tensor]) -> None:
    """Tell torch.compile that tensors stay where they are; not within a trace of its own, which refuses that."""
    if not torch.compiler.is_compiling():
        for item in tensors:
            torch._dynamo.mark_static_address(item)


def tensors_of(context: MemoryContext) -> dict[str, Tensor]:
    """The tensors of a context, by name."""
    return {name: item for name, item in vars(context).items() if isinstance(item, Tensor)}


def shapes_of(context: MemoryContext) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    """Shape, dtype and device of every tensor of a context, by name."""
    return {name: (item.shape, item.dtype, item.device) for name, item in tensors_of(context).items()}


def bucket_of(rows: int) -> int:
    """The least power of two from `rows` on, and from `LEAST_BUCKET`; 0 for none."""
    return max(1 << (rows - 1).bit_length(), LEAST_BUCKET) if rows else 0


@runtime_checkable
class HoldsContexts(Protocol):
    """A cache that keeps each layer's memory rows, whatever its class; a checkpoint's copy has classes of its own."""

    contexts: dict[int, MemoryContext]


def holds_contexts(cache: object) -> TypeGuard[HoldsContexts]:
    """Tell whether a cache is one that `HoldsContexts` describes."""
    return isinstance(cache, (KeepsContexts, HoldsContexts))  # every token asks it, and a protocol takes long to say


@runtime_checkable
class SettlesContexts(Protocol):
    """A cache whose contexts take one of few shapes once a forward has chosen its documents."""

    def settle_contexts(self) -> None: ...


def contexts_of(cache: Cache | None) -> dict[int, MemoryContext]:
    """The contexts that a cache keeps; empty for a cache that keeps none, and for None."""
    return cache.contexts if holds_contexts(cache) else {}
