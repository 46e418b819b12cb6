"""A sample of all weights of a model, read in one operation per device and size of numbers.

An operation reads memory through a tensor. One over all addresses from the first weight to the last is made for a
moment, and read at the places that are sampled, all of which lie in weights that are alive then. What is kept until the
next time are these places, as numbers: they keep no memory from being freed, and hold while the weights stay.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 64  # values of a tensor
# Bytes of a number -> what holds its bits, here and in C.
BITS = {
    1: (torch.uint8, ctypes.c_uint8),
    2: (torch.int16, ctypes.c_int16),
    4: (torch.int32, ctypes.c_int32),
    8: (torch.int64, ctypes.c_int64),
}
READ_AS_ONE = ("cpu", "cuda")  # devices whose memory a tensor can be made over


def step_of(size: int) -> int:
    """The distance of sampled values in a tensor of `size` values."""
    return max(size // SAMPLES, 1)


def sample_of(tensor: Tensor) -> Tensor:
    """64 evenly strided values of a plain tensor, or all of fewer; a view where it is contiguous."""
    step = step_of(tensor.numel())
    if tensor.is_contiguous():
        taken = min(-(-tensor.numel() // step), SAMPLES)
        return tensor.as_strided((taken,), (step,), tensor.storage_offset())
    return tensor.flatten()[::step][:SAMPLES]


def grouped(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors that have one device and dtype, for each of these."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    return list(groups.values())


@dataclass(frozen=True)
class SampledPlaces:
    """The places of sampled values in the memory of a device.

    Attributes:
        first: address of the first value.
        size: bytes of a value.
        span: values from the first to the last, were all between them such values.
        places: [n] int64 on the device, counted from the first value.
    """

    first: int
    size: int
    span: int
    places: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SampledPlaces:
        """Those in contiguous tensors of one device and dtype; each has a value."""
        size, device = tensors[0].element_size(), tensors[0].device
        addresses = np.array([item.data_ptr() for item in tensors])
        counts = np.array([item.numel() for item in tensors])
        steps = np.maximum(counts // SAMPLES, 1)
        taken = np.minimum(-(-counts // steps), SAMPLES)
        within = np.arange(taken.sum()) - np.repeat(taken.cumsum() - taken, taken)
        first = int(addresses.min())
        places = np.repeat((addresses - first) // size, taken) + np.repeat(steps, taken) * within
        return cls(first, size, int(places.max()) + 1, torch.from_numpy(places).to(device))

    def read(self) -> Tensor:
        """The bits of the values of now, [n] integers; the tensors are alive and lie where they lay."""
        return _memory(self.first, self.span, self.size, self.places.device).index_select(0, self.places)


class _CudaMemory:
    """Memory of a CUDA device as PyTorch takes it from others, whom it leaves it to."""

    def __init__(self, first: int, span: int, size: int) -> None:
        kind = "|u1" if size == 1 else f"<i{size}"
        self.__cuda_array_interface__ = {"data": (first, False), "shape": (span,), "typestr": kind, "version": 2}


def _memory(first: int, span: int, size: int, device: torch.device) -> Tensor:
    """Memory of others as a tensor [span] of integers of `size` bytes; good while it is theirs."""
    dtype, in_c = BITS[size]
    if device.type == "cuda":
        return torch.as_tensor(_CudaMemory(first, span, size), device=device)
    return torch.frombuffer((in_c * span).from_address(first), dtype=dtype)


@dataclass(frozen=True)
class Sampler:
    """The way to sample tensors while they stay where they are.

    Attributes:
        addresses: of the tensors.
        layout: their dtypes, shapes, devices, and whether they are contiguous.
        together: places of those that are read as one.
        apart: places of the others among all tensors.
    """

    addresses: list[int]
    layout: Hashable
    together: list[SampledPlaces]
    apart: list[int]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], addresses: list[int], layout: Hashable) -> Sampler:
        """That of tensors."""
        together, apart = list[SampledPlaces](), list[int]()
        filled = [place for place, tensor in enumerate(tensors) if tensor.numel()]
        for group in grouped([tensors[place] for place in filled]):
            places = [filled[place] for place in group]
            like = tensors[places[0]]
            size = like.element_size()
            as_one = like.device.type in READ_AS_ONE and size in BITS
            ours = [
                place for place in places if as_one and tensors[place].is_contiguous() and not addresses[place] % size
            ]
            if ours:
                together.append(SampledPlaces.of([tensors[place] for place in ours]))
            apart += sorted(set(places) - set(ours))
        return cls(addresses, layout, together, apart)

    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The bits of the samples, joined where they are of one kind, on the devices of the tensors."""
        others = [sample_of(tensors[place]) for place in self.apart]
        joined = [torch.cat([others[place] for place in group]) for group in grouped(others)]
        return [places.read() for places in self.together] + [item.view(torch.uint8) for item in joined]


_samplers: weakref.WeakKeyDictionary[nn.Module, Sampler] = weakref.WeakKeyDictionary()


def layout_of(tensors: Sequence[Tensor]) -> Hashable:
    """All that tells tensors apart but their values and addresses."""
    return tuple((item.dtype, item.shape, item.device, item.is_contiguous()) for item in tensors)


def read_samples(model: nn.Module, tensors: Sequence[Tensor], layout: Hashable) -> list[Tensor]:
    """Samples of all tensors, as bits, in the same order as long as the layout is the same; no values on the meta
    device.

    Args:
        model: that they are parts of.
        tensors: plain ones.
        layout: of the tensors.
    """
    tensors = [tensor for tensor in tensors if not tensor.is_meta]
    addresses = [tensor.data_ptr() for tensor in tensors]
    known = _samplers.get(model)
    if known is None or known.addresses != addresses or known.layout != layout:
        _samplers[model] = known = Sampler.of(tensors, addresses, layout)
    return known.read(tensors)
