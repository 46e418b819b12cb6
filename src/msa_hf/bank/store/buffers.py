"""The tensors of a bank in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...model.memory_msa import LayerMemory
from ...model.storage_msa import layer_shapes
from .growable_array import GrowableArray
from .state import State

SPARE = 16  # one part in so many is left free when tensors are read


class Buffers:
    """Routing keys and content of all rows, in memory: what snapshots are views of."""

    def __init__(self, layers: Mapping[int, LayerMemory], length: int) -> None:
        self._layers = {
            layer: (GrowableArray(item.routing_keys, length), GrowableArray(item.content, length))
            for layer, item in layers.items()
        }

    @classmethod
    def load(cls, state: State, device: torch.device, dtype: torch.dtype) -> Buffers:
        """Read the tensors of a state; memory mapped on the CPU where they lie in one shard. What is lost is zero."""
        total = int(state.offsets[-1])
        room = total + total // SPARE
        layers = {}
        for layer, (groups, dim) in layer_shapes(state.manifest).items():
            shards = [(item, shard) for item in state.segments for shard in item.shards if layer in shard.layers]
            if len(shards) == 1 and shards[0][1].file is not None and device.type == "cpu":
                layers[layer] = LayerMemory(*shards[0][0].tensors(shards[0][1], layer))
                continue
            keys = torch.empty(room, groups * dim, dtype=dtype, device=device)
            content = torch.empty(room, 2, groups, dim, dtype=dtype, device=device)
            for segment, start in zip(state.segments, state.offsets[state.starts].tolist(), strict=True):
                for shard in segment.shards:
                    if layer not in shard.layers:
                        continue
                    rows = slice(start + shard.first, start + shard.end)
                    if shard.file is None:
                        keys[rows], content[rows] = 0, 0
                    else:
                        keys[rows], content[rows] = segment.tensors(shard, layer)
            layers[layer] = LayerMemory(keys, content)
        return cls(layers, total)

    def append(self, layers: Mapping[int, LayerMemory]) -> None:
        for layer, memory in layers.items():
            keys, content = self._layers[layer]
            keys.append(memory.routing_keys)
            content.append(memory.content)

    @property
    def length(self) -> int:
        return next(iter(self._layers.values()))[0].length

    def view(self, chunks: int) -> dict[int, LayerMemory]:
        """The first chunks."""
        return {
            layer: LayerMemory(keys.view(chunks), content.view(chunks))
            for layer, (keys, content) in self._layers.items()
        }
