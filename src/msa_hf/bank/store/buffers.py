"""Arrays in memory that grow at their end while views of them stay; the tensors of a bank in such arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...model.bank_format_msa import RESTORE, BankFormatError, Manifest, TensorLayout, TensorPair
from .segments import Segment

GROWTH = 5 / 4  # of a buffer that is full: appending costs a few copies of each row, spare room at most a quarter
SPARE = 16  # one part in so many is left free when tensors are read

Array = TypeVar("Array", Tensor, NDArray[np.int64])


class GrowableArray(Generic[Array]):
    """An array to whose end rows are added; what was handed out before stays as it is."""

    def __init__(self, rows: Array, length: int | None = None) -> None:
        self._all: Array = rows
        self.length = len(rows) if length is None else length

    def view(self, length: int) -> Array:
        return self._all[:length]

    def append(self, rows: Array) -> None:
        needed = self.length + len(rows)
        if needed > len(self._all):
            room = max(needed, int(len(self._all) * GROWTH))
            old, self._all = self._all, _room_like(self._all, room)
            self._all[: self.length] = old[: self.length]
        self._all[self.length : needed] = rows
        self.length = needed


def _room_like(rows: Array, length: int) -> Array:
    if isinstance(rows, Tensor):
        return rows.new_empty(length, *rows.shape[1:])
    return np.empty((length, *rows.shape[1:]), rows.dtype)


def _zeros(layout: TensorLayout, layer: int, chunks: int, device: torch.device) -> TensorPair:
    """Zeros that take up no memory on the CPU until they are written to: what is lost costs nothing."""
    found = []
    for like in layout.zeros(layer, chunks):
        try:
            numbers = np.zeros(like.numel() * like.itemsize, np.uint8)
        except (MemoryError, ValueError) as error:
            cause = f"Tensors of {chunks} chunks, of which some are lost, do not fit into memory"
            raise BankFormatError(f"{cause} ({error}). {RESTORE}.") from error
        found.append(torch.from_numpy(numbers).view(layout.dtype).view(like.shape).to(device))
    return found[0], found[1]


class Committed(Protocol):
    """Everything asked of a state (`State`)."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def segments(self) -> tuple[Segment, ...]: ...
    @property
    def offsets(self) -> NDArray[np.int64]: ...
    @property
    def starts(self) -> NDArray[np.int64]: ...
    @property
    def all_chunks(self) -> int: ...


class Buffers:
    """Routing keys and content of all rows, in memory: what snapshots are views of."""

    def __init__(self, layers: Mapping[int, TensorPair], length: int) -> None:
        self._layers = {
            layer: (GrowableArray(keys, length), GrowableArray(content, length))
            for layer, (keys, content) in layers.items()
        }

    @classmethod
    def load(cls, segments: Mapping[int, Segment], layout: TensorLayout, total: int, device: torch.device) -> Buffers:
        """Read tensors; on the CPU those of a layer that lie in one shard stay memory mapped. What is lost is zero.

        Args:
            segments: by the number of their first chunk in the bank.
            total: chunks of the bank.
        """
        layers = {}
        for layer in layout.shapes:
            shards = [
                (start, shard) for start, item in segments.items() for shard in item.shards if layer in shard.layers
            ]
            if len(shards) == 1 and shards[0][1].file is not None and device.type == "cpu":
                layers[layer] = shards[0][1].tensors(layer)
                continue
            room, lost = total + total // SPARE, any(shard.file is None for _, shard in shards)
            whole = _zeros(layout, layer, room, device) if lost else layout.empty(layer, room, device)
            for start, shard in shards:
                if shard.file is not None:
                    for all_rows, part in zip(whole, shard.tensors(layer), strict=True):
                        all_rows[start + shard.first : start + shard.end] = part
            layers[layer] = whole
        return cls(layers, total)

    def follow(self, old: Committed, new: Committed) -> bool:
        """Append what was committed since; False, and nothing was done, if the tensors must be read again."""
        lineage = old.manifest.get("lineage")
        if lineage is None or lineage != new.manifest.get("lineage") or new.all_chunks < old.all_chunks:
            return False
        if any(segment.lost.any() for segment in new.segments):
            return False
        for segment, start in zip(new.segments, new.offsets[new.starts].tolist(), strict=True):
            for shard in segment.shards:
                first = max(shard.first, old.all_chunks - start)
                if first < shard.end:
                    self.append({layer: shard.tensors(layer, first, shard.end) for layer in shard.layers})
        return True

    def append(self, layers: Mapping[int, TensorPair]) -> None:
        """Add rows at the end, of some layers or all; from any device."""
        for layer, pair in layers.items():
            for rows, fresh in zip(self._layers[layer], pair, strict=True):
                rows.append(fresh)

    @property
    def length(self) -> int:
        return next(iter(self._layers.values()))[0].length

    def view(self, chunks: int) -> dict[int, TensorPair]:
        """The first chunks."""
        return {layer: (keys.view(chunks), content.view(chunks)) for layer, (keys, content) in self._layers.items()}
