"""Attention masks of which the host knows what stands in them, so that nobody waits for a device to look.

transformers asks a mask whether all of it is real, in order to leave it out. On a GPU that answer comes once all that
was queued before is done: documents would be launched no sooner than those before them are encoded.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

ALL, SUM = {Tensor.all, torch.all}, {Tensor.sum, torch.sum}
STAY = {Tensor.to, Tensor.bool, Tensor.long, Tensor.contiguous, Tensor.detach}  # operations that leave ones


class Ones(Tensor):
    """A mask [N, L] of ones, not to be written to.

    Its sum, and whether all of it is true, are there without a look, in host memory; all else is computed from its
    numbers, where they lie.
    """

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function in ALL | SUM and len(args) == 1 and not kwargs and isinstance(mask := args[0], cls):
            return torch.tensor(True if function in ALL else mask.numel())
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        return found.as_subclass(cls) if function in STAY and type(found) is Tensor else found


def ones_like(ids: Tensor) -> Tensor:
    """The attention mask [N, L] of token ids [N, L] of which all are to be seen, in their dtype."""
    return torch.ones_like(ids).as_subclass(Ones)
