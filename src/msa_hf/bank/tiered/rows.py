"""Rows of chunks where they lie: one tensor of a tier, or parts in files; and how they get there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...ops.formats import FORMATS, index_rows
from ..host_memory import pinned
from .parts import Part, tensor_of

# Numbers that move at once while a bank is placed; a few times as many bytes are needed beside its final place.
MOVED_ELEMENTS = 1 << 24


class Rows:
    """Rows [C, ...] of the chunks of a bank, in one tensor or in parts that follow each other.

    Args:
        parts: at least one.
        device: where they are used.
        scales: [C] or [C, 2] float32 of quantized numbers beside the only part, None for others.

    Attributes:
        whole: the only part, which stays mapped if it is a file's; None where there are several.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, scales: Tensor | None = None) -> None:
        self.device = device
        self.scales = scales
        self.whole = tensor_of(parts[0]) if len(parts) == 1 else None
        self.parts = list(parts) if self.whole is None else [self.whole]
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + len(part))
        self.starts = torch.tensor(starts)
        self.count = starts[-1]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, *self.parts[0].shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + (0 if self.scales is None else self.scales.nbytes)

    def select(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [n] int64 on the CPU, ascending -> numbers [n, ...], and scales where there are any, on the device."""
        edges = torch.searchsorted(rows, self.starts).tolist()
        found = [
            _selected(tensor_of(part), rows[first:end] - start)
            for part, start, first, end in zip(self.parts, self.starts.tolist(), edges[:-1], edges[1:], strict=False)
            if end > first
        ]
        numbers = torch.cat(found) if len(found) > 1 else found[0] if found else tensor_of(self.parts[0])[:0]
        scales = () if self.scales is None else (self.scales.index_select(0, rows.to(self.scales.device)),)
        return tuple(tensor.to(self.device) for tensor in (numbers, *scales))

    def between(self, first: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Numbers and scales of the rows from `first` to `end`, on the device."""
        edges = self.starts.tolist()
        found = [
            tensor_of(part)[max(first - start, 0) : max(min(end, stop) - start, 0)]
            for part, start, stop in zip(self.parts, edges[:-1], edges[1:], strict=True)
            if start < end and first < stop
        ]
        moved = [part.to(self.device, non_blocking=True) for part in found or [tensor_of(self.parts[0])[:0]]]
        scales = None if self.scales is None else self.scales[first:end].to(self.device, non_blocking=True)
        return torch.cat(moved) if len(moved) > 1 else moved[0], scales

    def split(self, size: int) -> Iterator[Tensor]:
        """The numbers, so many rows at a time, on the device; as `Tensor.split` one empty piece of none."""
        for first in range(0, max(self.count, 1), size):
            yield self.between(first, min(first + size, self.count))[0]


def _selected(part: Tensor, rows: Tensor) -> Tensor:
    return index_rows(part, rows.to(part.device))


def placed_rows(parts: Sequence[Part], form: str, device: torch.device, *, on_device: bool) -> Rows:
    """Read rows piece by piece into one tensor of a tier, in the format wanted.

    Args:
        parts: routing keys [c, E] or content [c, 2, G, D] that follow each other, on the CPU; at least one.
        form: a name of ops/formats.py, one number an element; quantized ones have a scale per key and value.
        device: where the rows are used, and converted.
        on_device: put them there; else in host memory, locked into place ("pinned") where `device` is a GPU.
    """
    format = FORMATS[form]
    count, shape = sum(map(len, parts)), parts[0].shape[1:]
    on_gpu = device.type == "cuda"
    place = device if on_device else torch.device("cpu")
    locked = not on_device and on_gpu

    def empty(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return pinned(size, kind) if locked else torch.empty(size, dtype=kind, device=place)

    numbers = empty((count, *shape), format.dtype)
    vectors = shape[:-2] if len(shape) > 1 else ()  # () for routing keys, (2,) for content
    scales = empty((count, *vectors), torch.float32) if format.scaled else None
    width = math.prod(shape[len(vectors) :])
    step, start = max(MOVED_ELEMENTS // max(math.prod(shape), 1), 1), 0
    # What stays in host memory as it is does not go through the device.
    through = on_device or scales is not None
    staging = Staging(device, step * math.prod(shape), parts[0].dtype) if on_gpu and through else None
    for part in parts:
        for piece in tensor_of(part).split(step):
            rows = slice(start, start + len(piece))
            moved = piece if staging is None else staging.moved(piece)
            if scales is not None:
                flat = moved.to(device).reshape(len(piece) * math.prod(vectors), width)
                narrow, factors = format.quantize(flat)
                numbers[rows].copy_(narrow.view(piece.shape), non_blocking=on_gpu)
                scales[rows].copy_(factors.view(len(piece), *vectors), non_blocking=on_gpu)
            else:
                numbers[rows].copy_(moved)
            start += len(piece)
    if staging is not None:
        torch.cuda.synchronize(device)  # what goes back to host memory is there now
    return Rows([numbers], device, scales)


class Staging:
    """The way of pieces to a GPU from memory that is not locked, such as mapped files.

    A copy from such memory waits until it is through, and the driver makes it with one thread. Here all threads fill
    one of two locked buffers while the GPU reads the other.

    Args:
        device: the GPU.
        size: most numbers of a piece.
        dtype: of the pieces.
    """

    def __init__(self, device: torch.device, size: int, dtype: torch.dtype) -> None:
        self.device = device
        self.buffers = [_buffer(size, dtype) for _ in range(2)]
        self.read = [torch.cuda.Event() for _ in self.buffers]
        self.next = 0

    def moved(self, piece: Tensor) -> Tensor:
        """The piece on the GPU, in the order of its current stream."""
        if piece.is_pinned():
            return piece.to(self.device, non_blocking=True)
        buffer, read = self.buffers[self.next], self.read[self.next]
        self.next = (self.next + 1) % len(self.buffers)
        read.synchronize()  # of an event that was not recorded yet: at once
        staged = buffer[: piece.numel()].view(piece.shape)
        staged.copy_(piece)
        moved = staged.to(self.device, non_blocking=True)
        read.record(torch.cuda.current_stream(self.device))
        return moved


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, pin_memory=True)  # PyTorch's own: it keeps them for the next one
