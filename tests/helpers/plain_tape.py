"""Stands for CUDA graphs on the CPU."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msa_hf.model import compiled_msa

HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")  # what no graph can hold


class PlainTape(TorchDispatchMode):
    """A tape of operations: played again they read the same tensors, and write to those that they gave before.

    What a CUDA graph does not see, as a number that Python computed, is as lost here as it is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] | None = None
        self.parts = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self:
            yield

    def begin(self) -> None:
        self.part = []

    def end(self) -> Callable[[], None]:
        part, self.part, done = self.part, None, []
        assert part is not None
        self.parts += 1

        def step() -> None:
            if not done:  # it ran while it was recorded, as a graph does not
                done.append(True)
                return
            for operation, args, kwargs, result in part:
                again = operation(*args, **kwargs)
                for place, item in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != item.data_ptr():
                        place.copy_(item)
                    elif operation.namespace == "c10d" and not isinstance(place, Tensor):
                        dist.Work.unbox(item).wait()  # a device would wait for an exchange

        return step

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.part is not None and func.namespace != compiled_msa.NAMESPACE:
            assert str(func).split(".")[1] not in HOST, f"{func} within a recording"
            self.part.append((func, args, kwargs, result))
        return result
