"""Samples of all weights at once: the bits of the samples of each, of now, wherever and whatever they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from msa_hf.model.sampling_msa import layout_of, read_samples, sample_of


class Operations(TorchDispatchMode):
    """How many operations there were."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def bits_of(tensors: list[Tensor]) -> bytes:
    return b"".join(item.contiguous().view(torch.uint8).cpu().numpy().tobytes() for item in tensors)


def read(model: nn.Module, tensors: list[Tensor]) -> bytes:
    """What is read, which must be what each tensor has."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for item in tensors:
        if item.numel() and not item.is_meta:
            groups.setdefault(item.dtype, []).append(sample_of(item))
    found = bits_of(read_samples(model, tensors, layout_of(tensors)))
    assert found == bits_of([torch.cat(group) for group in groups.values()])
    return found


GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="reads a GPU's memory")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_samples_are_those_of_each(device: str) -> None:
    model, kinds = nn.Module(), (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.bool)
    tensors = [
        (torch.randn(size, 3, device=device) * 9).to(kind)
        for kind in kinds
        for size in (1, 7, 64, 300)
        for _ in range(5)
    ] + [
        torch.empty(0),
        torch.empty(3, device="meta"),
        torch.tensor(2.5, device=device),
    ]
    read(model, tensors)
    before = read(model, tensors)
    with torch.no_grad():
        tensors[3].data.add_(1)  # past the counters
        assert read(model, tensors) != before
        tensors[3].data.sub_(1)
        tensors[4].data = tensors[4] * 2  # elsewhere
        assert read(model, tensors) != before
        tensors[18].data = tensors[18].data[:9]  # where it was, but fewer
        read(model, tensors)
        tensors[0] = torch.randn(40, device=device)
        read(model, tensors)


def test_tensors_that_are_read_apart() -> None:
    """Whose values do not follow each other, or lie between the addresses of whole ones."""
    between = torch.arange(1, 9 * 4 + 1, dtype=torch.uint8).numpy()[1:33]
    odd = torch.frombuffer(between, dtype=torch.float32)
    assert odd.data_ptr() % 4
    for tensors in ([torch.randn(30, 40).T], [torch.randn(9), odd], [torch.randn(4, dtype=torch.complex128)]):
        read(nn.Module(), tensors)


def test_a_few_operations_that_keep_nothing() -> None:
    model, tensors = nn.Module(), [torch.randn(100) for _ in range(50)]
    read(model, tensors)
    with Operations() as operations:
        read_samples(model, tensors, layout_of(tensors))
    assert operations.count <= 2
    memory = StorageWeakRef(tensors[7].untyped_storage())
    del tensors[7]
    assert memory.expired()
    read(model, tensors)
