"""The processes that share a memory, and how they talk: exchanges of tensors, messages of hosts, errors of others."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

FAILED = "failed"
SEEN = "seen/{}"
PATIENCE = timedelta(seconds=5)  # of a process that fails, for the others to read its error


class Exchange(Protocol):
    """One exchange of tensors among the processes of a group."""

    def __call__(self, result: Tensor, given: Tensor, /, group: dist.ProcessGroup | None) -> None: ...


class RankFailed(RuntimeError):
    """Another process of a shared memory failed. The message holds its error where it could still tell it."""


class Collectives:
    """The processes that share a memory, and how they talk.

    Tensors of the CPU go through gloo, others through the backend of `group`. All of it over process groups of its own,
    so that nothing else that the processes exchange gets in between.

    Args:
        group: of the processes; None for all. Without torch.distributed there is one process.
        timeout: of every exchange.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank, self.size, self.control, self.data = 0, 1, None, None
        self.closed = False
        if not dist.is_available() or not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RuntimeError(
                    "This is one of several processes, but they are not connected yet: make an `accelerate.Accelerator`"
                    " or call `torch.distributed.init_process_group` first."
                )
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("This process does not belong to `group`.")
        options: dict[str, Any] = {"timeout": timeout}
        if group is not None:  # processes outside of it do not take part
            options.update(ranks=dist.get_process_group_ranks(group), use_local_synchronization=True)
        backend = dist.get_backend(group)
        self.control = dist.new_group(backend="gloo", **options)
        if backend != "gloo":
            self.data = dist.new_group(backend=backend, **options)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes [W, ...], of one shape."""
        if self.size == 1:
            return part[None]
        return self._talk(_gather_into, part, lambda shape: (self.size, *shape))

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return part
        return self._talk(_sum_into, part, lambda shape: shape)

    def scatter_sum(self, parts: Tensor) -> Tensor:
        """[W, ...] -> this process' part of the sum over all processes."""
        if self.size == 1:
            return parts[0]
        return self._talk(_scatter_sum, parts, lambda shape: shape[1:])

    def _talk(self, exchange: Exchange, given: Tensor, shape_of: Callable[[torch.Size], tuple[int, ...]]) -> Tensor:
        self.check_open()
        device = given.device
        group = self.control if device.type == "cpu" or self.data is None else self.data
        sent = given.contiguous() if group is self.data else given.cpu().contiguous()
        if not given.numel():
            return given.new_empty(shape_of(given.shape))
        if sent.element_size() == 1 and sent.is_floating_point():
            sent = sent.view(torch.uint8)  # of content in eight bits all but one part are zero
        # Backends take the first dimension of the longer tensor for the processes.
        result = sent.new_empty(shape_of(sent.shape))
        flat = result.flatten() if exchange is not _sum_into else result
        try:
            exchange(flat, sent.flatten() if exchange is not _sum_into else sent, group=group)
        except RuntimeError as error:
            raise self.failure(error) from error
        return result.view(given.dtype).to(device)

    def everyone(self, value: object) -> list[Any]:
        """The values of all processes, any that can be pickled."""
        if self.size == 1:
            return [value]
        self.check_open()
        values: list[object] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.control)
        except RuntimeError as error:
            raise self.failure(error) from error
        return values

    def check_open(self) -> None:
        if self.closed:
            raise RankFailed("This shared memory was closed, or a process of it failed before; share the bank again.")

    def failure(self, error: BaseException) -> RankFailed:
        """The error that an exchange that broke off stands for: another process' error, or that it is gone."""
        message = (
            f"Another process of this shared memory died, or did not answer within {self.timeout.total_seconds():g} "
            f"seconds ({error})."
        )
        with suppress(RuntimeError):  # the store goes with the process that holds it
            store = self._store()
            deadline = time.monotonic() + 1.0  # connections may break before the error is written
            while not store.check([FAILED]) and time.monotonic() < deadline:
                time.sleep(0.05)
            if store.check([FAILED]):
                message = store.get(FAILED).decode(errors="replace")
                store.set(SEEN.format(self.rank), "")
        self.close()
        return RankFailed(message)

    def fail(self, error: BaseException) -> None:
        """Tell the others of this process' error, and leave."""
        if self.closed or isinstance(error, RankFailed):
            return
        if self.size > 1:
            with suppress(RuntimeError):
                text = "".join(traceback.format_exception(error))
                text = f"Process {self.rank} of this shared memory failed:\n{text}"
                store = self._store()
                first = store.compare_set(FAILED, "", text).decode(errors="replace") == text
                store.set(SEEN.format(self.rank), "")
                self.close()
                if first:  # the store may lie in this process
                    store.wait([SEEN.format(rank) for rank in range(self.size)], PATIENCE)
        self.close()

    def _store(self) -> dist.Store:
        assert self.control is not None
        return self.control.get_group_store()

    def close(self) -> None:
        """Close the connections: whoever waits for this process hears of it."""
        self.closed = True
        data, control, self.data, self.control = self.data, self.control, None, None
        for group in (data, control):
            with suppress(RuntimeError, ValueError):
                if group is data and group is not None:
                    group.abort()  # what the device still waits for
                if group is not None:
                    dist.destroy_process_group(group)


# Newer versions of PyTorch name these otherwise.
def _gather_into(result: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(result, part, group=group)


def _scatter_sum(result: Tensor, parts: Tensor, group: dist.ProcessGroup | None) -> None:
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(result, parts, group=group)


def _sum_into(result: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    dist.all_reduce(result.copy_(part), group=group)
