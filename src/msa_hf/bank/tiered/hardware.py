"""The resources of a machine: memory that is free on each tier, and the speed of its device."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Rates:
    """The speed of a device.

    Attributes:
        name: as `torch.cuda.get_device_name()` has it.
        copy: bytes per second of a copy within the device, read and written both counted.
        matmul: floating point operations per second of a large bf16 matrix product.
        narrow_matmul: the same with numbers of 8 bits (None: no faster).
        host_link: bytes per second from pinned host memory to the device, in one long copy.
        host_fetch: bytes per second of rows gathered in host memory, then copied to the device.
        disk: bytes per second of rows read from disk.
        source: where the figures come from. None stands for a rate that is not known.
    """

    name: str
    copy: float | None = None
    matmul: float | None = None
    narrow_matmul: float | None = None
    host_link: float | None = None
    host_fetch: float | None = None
    disk: float | None = None
    source: str = "given by the caller"


RATES = {
    "H200": Rates(
        "NVIDIA H200",
        copy=4.25e12,
        matmul=779e12,
        narrow_matmul=1436e12,
        host_link=55.5e9,
        host_fetch=5.3e9,
        source="measured on one H200 with torch 2.11: copy, 8192^3 bf16 product, route_documents of 1,024 tokens with "
        "fp8 keys, pinned copy, index_select of 1 MB",
    ),
    "H100": Rates(
        "NVIDIA H100 80GB HBM3",
        copy=3.0e12,
        matmul=798e12,
        source="measured on one H100 80GB HBM3 with torch 2.11: copy, 8192^3 bf16 product",
    ),
}


def rates_of(name: str) -> Rates | None:
    """The rates of a device by its name, None for one that was not measured."""
    return next((rates for rates in RATES.values() if rates.name == name), None)


@dataclass(frozen=True)
class Tiers:
    """Bytes that are free, for one GPU's share of the bank.

    Attributes:
        device: of the GPU; None: there is none.
        host: of host memory, pinned where there is a device.
        disk: for what is mapped from disk. Files of the bank that lie there already count as free.
        rates: how fast the device is; None: not known, and no times are stated.
    """

    device: int | None
    host: int
    disk: int
    rates: Rates | None = None

    def __post_init__(self) -> None:
        if min(self.device or 0, self.host, self.disk) < 0:
            raise ValueError(
                f"Free bytes cannot be negative: device {self.device}, host {self.host}, disk {self.disk}."
            )

    def capacity(self, tier: str) -> int:
        return {"device": self.device, "host": self.host, "disk": self.disk}[tier] or 0


def measured_tiers(device: torch.device | str | None = None, directory: str | Path = ".", present: int = 0) -> Tiers:
    """The memory that is free on this machine now.

    Args:
        device: a CUDA device; None for the current one, or none where there is none. `"cpu"` for none.
        directory: where the bank lies or will lie on disk.
        present: bytes of the bank's files that lie there already.
    """
    import torch  # here, as the options of `msa-hf plan` are known without it

    free, rates = None, None
    if torch.device("cuda" if device is None else device).type == "cuda" and torch.cuda.is_available():
        free, rates = torch.cuda.mem_get_info(device)[0], rates_of(torch.cuda.get_device_name(device))
    return Tiers(free, free_host_memory(), shutil.disk_usage(directory).free + present, rates)


def free_host_memory(root: str | Path = "/") -> int:
    """Bytes of memory that programs may still take: the kernel's estimate, or less where a control group says so.

    A virtual machine whose memory grows as it is used tells less than it can give; pass `Tiers` yourself there.

    Raises:
        OSError: on systems without /proc/meminfo.
    """
    root = Path(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration) as error:
        raise OSError("The free memory of this system cannot be read; pass it in `Tiers`.") from error
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        path = next(line.removeprefix("0::/") for line in groups if line.startswith("0::/"))
    except (OSError, StopIteration):
        return free  # no control groups, or version 1
    group = root / "sys/fs/cgroup" / path
    while group != root / "sys/fs":
        left = _group_free(group)
        free = free if left is None else min(free, left)
        group = group.parent
    return free


def _group_free(group: Path) -> int | None:
    """Bytes that a control group leaves, None if it has no limit; file pages that are not in use can be taken back."""
    try:
        limit, current = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(int(limit) - current + int(stat.get("inactive_file", 0)), 0)
    except (OSError, ValueError):
        return None
