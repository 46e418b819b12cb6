"""The processes that share a memory, and how they talk: exchanges of tensors, messages of hosts, errors of others.

Exchanges of tensors on a device are queued there, and the host goes on. What keeps a device waiting for ever, a process
that failed, is noticed beside (notices.py), and ends what waits.
"""

from __future__ import annotations

import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .notices import PATIENCE, Notices, within

_numbers = itertools.count()


class Exchange(Protocol):
    """One exchange of tensors among the processes of a group."""

    def __call__(
        self, result: Tensor, given: Tensor, /, group: dist.ProcessGroup | None, async_op: bool = False
    ) -> dist.Work | None: ...


@dataclass(frozen=True)
class Message:
    """A message of all hosts on its way.

    Attributes:
        parts: [W, ...], those of all processes once `wait` has returned.
        work: None for one that has arrived.
        ranks: the processes.
    """

    parts: Tensor
    work: dist.Work | None
    ranks: Collectives

    def wait(self) -> Tensor:
        """The parts of all processes [W, ...].

        Raises:
            RankFailed: where another process failed.
        """
        started = time.monotonic()
        try:
            if self.work is not None:
                self.work.wait()
        except RuntimeError as error:
            raise self.ranks.failure(error, started) from error
        return self.parts


class RankFailed(RuntimeError):
    """Another process of a shared memory failed. The message holds its error, or says which one does not answer."""


class Collectives:
    """The processes that share a memory, and how they talk.

    Tensors of the CPU go through gloo, others through the backend of `group`. All of it over process groups of its own,
    so that nothing else that the processes exchange gets in between.

    Args:
        group: of the processes; None for all. Without torch.distributed there is one process.
        timeout: of every exchange, and of connecting; after a tenth of it without a sign of life a process counts as
            gone, but not before 20 seconds.

    Raises:
        RankFailed: where the processes could not be connected in time.
        RuntimeError: where torch.distributed is not connected, but should be.

    Attributes:
        number: of this connection, another one for each that this process makes.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: timedelta) -> None:
        self.timeout = timeout
        self.number = next(_numbers)
        self.rank, self.size, self.control, self.data = 0, 1, None, None
        self.closed = False
        self._notices: Notices | None = None
        self._holds_store = False
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
        self._holds_store = dist.get_rank() == 0  # by torch.distributed's custom
        index = torch.cuda.current_device() if backend != "gloo" and torch.cuda.is_initialized() else None
        device = None if index is None else torch.device("cuda", index)

        def connect() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # every thread has its own
            self.control = dist.new_group(backend="gloo", **options)
            if backend != "gloo":
                # Told which device is meant, it connects now and not in the first forward.
                self.data = dist.new_group(backend=backend, device_id=device, **options)
            if self.size > 1:
                # Or one that fails right behind this is gone before another has connected to it, which cannot be told.
                dist.barrier(group=self.control)
                store, heard = self.control.get_group_store().clone(), None if self.data is None else self.data.abort
                self._notices = Notices(store, self.rank, self.size, heard, timeout.total_seconds() / 10)

        connect_within(timeout, connect)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes [W, ...], of one shape."""
        if self.size == 1:
            return part[None]
        return self._talk(_gather_into, part, (self.size, *part.shape))

    def is_queued_on(self, device: torch.device) -> bool:
        """Tell whether exchanges of a device's tensors are work of that device, in which no host has a part."""
        return self.size == 1 or (self.data is not None and device.type != "cpu")

    def start_gather(self, part: Tensor) -> Message:
        """The same of a tensor on the CPU, without waiting for the others."""
        if self.size == 1:
            return Message(part[None], None, self)
        self.check_open()
        result = part.new_empty(self.size, *part.shape)
        started = time.monotonic()
        try:
            work = _gather_into(result.flatten(), part.flatten(), group=self.control, async_op=True)
        except RuntimeError as error:
            raise self.failure(error, started) from error
        return Message(result, work, self)

    def join(self, part: Tensor) -> Tensor:
        """The numbers of all processes, to the bit, where each is zero in all of them but one; in place where it can.

        Sums of integers, whatever the numbers are: among these zeros nothing is rounded, and no sign is lost.
        """
        if self.size == 1:
            return part
        return self._talk(_sum_into, part.contiguous().view(_bits_of(part)), part.shape).view(part.dtype)

    def scatter_join(self, parts: Tensor) -> Tensor:
        """[W, ...] -> this process' part of what `join` gives."""
        if self.size == 1:
            return parts[0]
        bits = parts.contiguous().view(_bits_of(parts))
        return self._talk(_scatter_sum, bits, bits.shape[1:]).view(parts.dtype)

    def _talk(self, exchange: Exchange, given: Tensor, shape: tuple[int, ...]) -> Tensor:
        self.check_open()
        device = given.device
        group = self.control if device.type == "cpu" or self.data is None else self.data
        sent = given.contiguous() if group is self.data else given.cpu().contiguous()
        if not given.numel():
            return given.new_empty(shape)
        # Backends take the first dimension of the longer tensor for the processes.
        result = sent if exchange is _sum_into else sent.new_empty(shape)
        started = time.monotonic()
        try:
            exchange(result.flatten(), sent.flatten(), group=group)
        except RuntimeError as error:
            raise self.failure(error, started) from error
        return result.to(device)

    def everyone(self, value: object) -> list[Any]:
        """The values of all processes, any that can be pickled."""
        if self.size == 1:
            return [value]
        self.check_open()
        values: list[object] = [None] * self.size
        started = time.monotonic()
        try:
            dist.all_gather_object(values, value, group=self.control)
        except RuntimeError as error:
            raise self.failure(error, started) from error
        return values

    @property
    def error(self) -> str | None:
        """The first error of a process, as far as this one knows; looked for beside the work."""
        return None if self._notices is None else self._notices.error

    def check_open(self) -> None:
        """Make sure that no process has left or failed.

        Raises:
            RankFailed: where one has, as far as is known here.
        """
        if self.closed:
            raise RankFailed("This shared memory was closed, or a process of it failed before; share the bank again.")
        if self.error is not None:
            raise self.failure(ConnectionError(), time.monotonic())

    def failure(self, error: BaseException, started: float) -> RankFailed:
        """The error that an exchange that broke off stands for: another process' error, or which one does not answer.

        Args:
            started: when this process began to wait, by `time.monotonic`.
        """
        notices, message = self._notices, str(error)
        if notices is not None:
            message = notices.explain(error, started, self.timeout.total_seconds())
        self._leave(notices, stay=self._holds_store)
        return RankFailed(message)

    def fail(self, error: BaseException) -> None:
        """Tell the others of this process' error, and leave."""
        if self.closed or isinstance(error, RankFailed):
            return
        notices, first = self._notices, False
        if notices is not None:
            text = "".join(traceback.format_exception(error))
            first = notices.tell(f"Process {self.rank} of this shared memory failed:\n{text}")
        self._leave(notices, stay=first or self._holds_store)

    def _leave(self, notices: Notices | None, stay: bool) -> None:
        """Close the connections, and `stay` until the others know why: the store may lie in this process."""
        self._notices = None
        if notices is not None:
            notices.leave()
        self.close()
        if notices is not None:
            if stay:
                notices.wait_until_heard()
            notices.close()

    def part(self) -> None:
        """Leave together with the others, once all have what was told last: who leaves earlier breaks connections that
        others still read from."""
        if not self.closed:
            if self._notices is not None:
                self._notices.leave()
            with suppress(RankFailed):
                self.everyone(None)
        self.close()

    def close(self) -> None:
        """Close the connections: whoever waits for this process hears of it."""
        self.closed = True
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        data, control, self.data, self.control = self.data, self.control, None, None
        for group in (data, control):
            with suppress(RuntimeError, ValueError):
                if group is data and group is not None:
                    group.abort()  # what the device still waits for
                if group is not None:
                    dist.destroy_process_group(group)


@contextmanager
def agreed(ranks: Collectives) -> Iterator[None]:
    """A block that every process goes through: where it raises in one, that one's error ends it in all.

    Raises:
        RankFailed: naming the process that raised, and its error; or where a process died.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    try:
        told = ranks.everyone(None if error is None else f"{type(error).__name__}: {error}")
    except RankFailed:
        if error is not None:
            raise error from None
        raise
    if any(text is not None for text in told):
        ranks.part()
    if error is not None:
        raise error
    for rank, text in enumerate(told):
        if text is not None:
            raise RankFailed(f"Process {rank} failed: {text}")


def connect_within(timeout: timedelta, connect: Callable[[], None]) -> None:
    """Run what connects processes and has this timeout; it gets a little more.

    Raises:
        RankFailed: where it fails, or takes longer.
    """
    seconds = timeout.total_seconds()
    try:
        within(seconds + PATIENCE, connect)
    except (TimeoutError, RuntimeError) as error:  # gloo's errors are plain ones
        cause = str(error) or "whoever holds their store, process 0 or the launcher, does not answer"
        raise RankFailed(
            f"The processes could not be connected, with a timeout of {seconds:g} seconds: {' '.join(cause.split())}. "
            "Start all of them, and see which one is late."
        ) from error


def _bits_of(tensor: Tensor) -> torch.dtype:
    """Integers as which the rows of a tensor can be seen and every backend adds: four bytes, or one."""
    return torch.int32 if tensor.shape[-1] * tensor.element_size() % 4 == 0 else torch.uint8


# Newer versions of PyTorch name these otherwise.
def _gather_into(
    result: Tensor, part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(result, part, group=group, async_op=async_op)
    return work


def _scatter_sum(
    result: Tensor, parts: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work | None = scatter(result, parts, group=group, async_op=async_op)
    return work


def _sum_into(
    result: Tensor, part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> dist.Work | None:
    """In place: `result` and `part` are the same."""
    return dist.all_reduce(result, group=group, async_op=async_op)
