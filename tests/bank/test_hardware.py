"""What is free on this machine: what the system says, and the tightest control group."""

from pathlib import Path

import pytest
import torch

from msa_hf.bank.tiered import hardware
from msa_hf.bank.tiered.hardware import RATES, Tiers, free_host_memory, measured_tiers


def test_measured_tiers_are_what_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (7, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(hardware, "free_host_memory", lambda: 11)
    monkeypatch.setattr(
        hardware.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 13 if path == tmp_path else 0})
    )
    assert measured_tiers(directory=tmp_path, present=2) == Tiers(7, 11, 15, RATES["H200"])
    assert measured_tiers("cpu", tmp_path) == Tiers(None, 11, 13)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200 NVL")
    assert measured_tiers(directory=tmp_path).rates is None


def system(root: Path, group: str | None, limits: dict[str, tuple[str, int, int]]) -> Path:
    """A root with /proc and control groups: (limit, current, inactive_file) by path."""
    for name in ("proc/self", "sys/fs/cgroup"):
        (root / name).mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable:   50 kB\n")
    if group is not None:
        (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for path, (limit, current, inactive) in limits.items():
        place = root / "sys/fs/cgroup" / path
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{current}\n")
        (place / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    return root


@pytest.mark.parametrize(
    "group, limits, free",
    [
        (None, {}, 51_200),
        ("/", {}, 51_200),
        ("/", {"": ("max", 99, 0)}, 51_200),
        ("/", {"": ("40000", 30_000, 1_000)}, 11_000),
        ("/", {"": ("40000", 41_000, 0)}, 0),
        ("/a/b", {"a/b": ("max", 1, 0), "a": ("20000", 5_000, 0)}, 15_000),
        ("/a", {"a": ("900000", 5_000, 0)}, 51_200),
    ],
)
def test_free_host_memory(tmp_path: Path, group: str | None, limits: dict, free: int) -> None:
    """The kernel's estimate, or what the tightest control group above the process leaves."""
    assert free_host_memory(system(tmp_path, group, limits)) == free


def test_free_host_memory_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="pass it in `Tiers`"):
        free_host_memory(tmp_path)
