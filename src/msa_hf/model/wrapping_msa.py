"""Models whose weights come and go around the calls of modules: offloaded by accelerate, or cut in parts by FSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn


def has_come_and_go_weights(model: nn.Module) -> bool:
    """Tell whether weights are there only while what wraps a module knows that it runs.

    Such a model must be entered through its own call and left through its end: an exception would leave weights
    behind, and a call of an inner module would not find those that the outer one looks after.
    """
    # Looked at before every batch, and `hasattr` takes a module ten times as long where there is nothing.
    return is_sharded(model) or any("_hf_hook" in vars(module) for module in model.modules())


def is_entered_by_its_call(model: nn.Module) -> bool:
    """Tell whether every run must go through the model's own call and to its end.

    Its weights come and go, or hooks on the whole model look at what goes in, as PEFT's Shadow adapters do.
    """
    return bool(model._forward_pre_hooks) or has_come_and_go_weights(model)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `torch.distributed.fsdp.fully_shard` was applied to the model or a part of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def without_outer_hook(model: nn.Module) -> Iterator[None]:
    """A model without what accelerate puts around its forward, which would keep the forward of another class."""
    hook = getattr(model, "_hf_hook", None)
    if hook is None:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(model)
    try:
        yield
    finally:
        add_hook_to_module(model, hook)


def input_device(model: nn.Module) -> torch.device:
    """The device for a model's inputs: that of the first parameter or buffer that is not offloaded."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))
