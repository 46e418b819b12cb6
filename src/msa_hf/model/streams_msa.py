"""Copies between the host and a device that keep neither of them waiting; elsewhere than with CUDA, plain copies."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, for what is queued there from now on; the host does not wait for what was queued before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Departures:
    """Tensors that leave a device for host memory by a stream of their own, while it computes on.

    Args:
        source: where they are. Where that is none of CUDA's devices, they are copied at once.
    """

    def __init__(self, source: torch.device) -> None:
        self._stream = torch.cuda.Stream(source) if source.type == "cuda" else None

    def send(self, tensor: Tensor, target: torch.device) -> Tensor:
        """The tensor at its target; in host memory to be read once what `mark` returns has happened."""
        stream = self._stream
        if stream is None or tensor.device != stream.device or target.type != "cpu":
            return tensor.to(target)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before it was read
        return host

    def mark(self) -> torch.cuda.Event | None:
        """An event that happens once all that was sent by now has arrived; None where that was waited for."""
        return None if self._stream is None else self._stream.record_event()


@contextmanager
def beside_the_queue(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """A maker of blocks that look at tensors as they were when this one was entered, without waiting for what it has
    queued since."""
    if device.type != "cuda":
        yield nullcontext
        return
    entered, stream = torch.cuda.current_stream(device).record_event(), torch.cuda.Stream(device)

    @contextmanager
    def look() -> Iterator[None]:
        stream.wait_event(entered)
        with torch.cuda.stream(stream):
            yield

    yield look
