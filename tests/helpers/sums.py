"""What is summed up, or asked whether all of it is true."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Sums(TorchDispatchMode):
    """Notes the shapes of what is summed up to one number, or asked whether all of it is true."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.sum.default, torch.ops.aten.all.default):
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))
