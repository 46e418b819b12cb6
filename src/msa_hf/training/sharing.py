"""Rows that the processes of a training run bring together: every process sees those of all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def count_rows(rows: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """The rows that each process brings, in order of ranks; without a group those of this process alone."""
    if group is None:
        return [rows.shape[0]]
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device), group=group)
    return [int(count) for count in counts]


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None, counts: list[int] | None = None) -> Tensor:
    """The rows of all processes, in order of ranks, without a gradient.

    Args:
        rows: [n, ...], n may differ between processes; everything else is the same in all.
        group: None returns `rows`.
        counts: of `count_rows`, if they are known already.
    """
    if group is None:
        return rows
    counts = count_rows(rows, group) if counts is None else counts
    most = max(counts)
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]] = rows.detach()
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def own_rows(counts: list[int], group: dist.ProcessGroup | None) -> slice:
    """The places of this process's rows among those of all."""
    rank = 0 if group is None else dist.get_rank(group)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def sum_over_processes(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace tensors of one dtype by their sums over all processes, in one collective."""
    if group is None or not tensors:
        return
    flat = torch.cat([item.reshape(-1) for item in tensors])
    dist.all_reduce(flat, group=group)
    for item, part in zip(tensors, flat.split([item.numel() for item in tensors]), strict=True):
        item.copy_(part.view_as(item))
