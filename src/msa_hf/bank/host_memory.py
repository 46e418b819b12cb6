"""Host memory of exactly the bytes that are asked for: of one process or of several, locked for GPUs or not."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

PORTABLE, MAPPED = 1, 2  # flags of cudaHostRegister: for every device, and to be read by its kernels


class HostMemory(mmap.mmap):
    """Memory that is there as long as a tensor uses it; zeros at first.

    Args:
        size: bytes, at least 1.
        file: a descriptor of a file of that size whose memory this is, the same for all who map it; None: memory of
            this process alone.
    """

    address: int | None

    def __new__(cls, size: int, file: int | None = None) -> HostMemory:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self = super().__new__(cls, -1, size, **private) if file is None else super().__new__(cls, file, size)
        self.address = None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to lock
            with contextlib.suppress(OSError):
                self.madvise(mmap.MADV_HUGEPAGE)
        return self

    def tensor(self, size: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Numbers that lie here, from the byte `offset` on; at least one."""
        return torch.frombuffer(self, dtype=dtype, count=math.prod(size), offset=offset).view(size)

    def lock(self) -> None:
        """Keep it in place as long as it is there, so that GPUs read it directly.

        Raises:
            MemoryError: where the system does not lock so much.
        """
        whole = torch.frombuffer(self, dtype=torch.uint8)
        address, size = whole.data_ptr(), len(self)
        status = int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE | MAPPED))
        if status:
            raise MemoryError(
                f"The driver does not lock {size:,} bytes of host memory (error {status}): raise the limit of locked "
                "memory (`ulimit -l`), or leave content on disk."
            )
        self.address = address

    def __del__(self) -> None:
        if self.address is not None:
            with contextlib.suppress(Exception):  # the driver may be gone at the end of the process
                torch.cuda.cudart().cudaHostUnregister(self.address)


def pinned(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in locked host memory, which the device reads directly.

    Of exactly its bytes: PyTorch's own pinned memory comes in powers of two, up to twice as much.

    Raises:
        MemoryError: where the system does not lock so much.
    """
    count = math.prod(size)
    if not count:
        return torch.empty(size, dtype=dtype)
    memory = HostMemory(count * dtype.itemsize)
    memory.tensor((len(memory),), torch.uint8).zero_()  # all threads touch its pages, which locking would do with one
    memory.lock()
    return memory.tensor(size, dtype)


def is_read_by(device: torch.device, tensor: Tensor) -> bool:
    """Tell whether a device reads a tensor itself."""
    return tensor.device == device or (tensor.device.type == "cpu" and tensor.is_pinned())
