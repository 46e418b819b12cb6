"""Models that draw on a small bank wherever nothing else is passed, so that a suite that knows no memory tests one."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

import msa_hf
from msa_hf import MemoryBank

DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22]]


def of_one_call(hook: Any) -> bool:
    """Tell if PEFT put a hook there for the samples of one call, which name their adapters or activate them."""
    return isinstance(hook, partial) and hook.func.__module__.startswith("peft.")


@contextmanager
def as_between_calls(model: nn.Module) -> Iterator[None]:
    """The model as it is where banks are made: evaluating, and without what PEFT does to the samples of one call."""
    training = {module: module.training for module in model.modules()}
    hooks = {module: module._forward_pre_hooks for module in model.modules()}
    model.eval()
    for module, kept in hooks.items():
        module._forward_pre_hooks = OrderedDict((key, hook) for key, hook in kept.items() if not of_one_call(hook))
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, kept in hooks.items():
            module._forward_pre_hooks = kept


class BoundMemory:
    """Passes a bank of `DOCUMENTS`, encoded with the weights and adapters as they are, to forward and generate."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Before the hooks of this call, which would see that of the documents in its midst.
        if kwargs.get("memory") is None and kwargs.get("memory_pass") is None:
            kwargs["memory"] = self.bound_memory()
        return super().__call__(*args, **kwargs)

    def bound_memory(self: Any) -> MemoryBank:
        """The bank that the model as it is now makes; while it is compiled, the one before."""
        if torch.compiler.is_compiling():
            return self.__dict__["_bank"]
        with torch.no_grad(), as_between_calls(self):
            bank = self.encode_documents(DOCUMENTS, show_progress=False)
        self.__dict__["_bank"] = bank
        return bank


class MSAModel(BoundMemory, msa_hf.MSAModel):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("memory") is None and kwargs.get("memory_pass") is None:
            kwargs["memory"] = self.bound_memory()
        return msa_hf.MSAModel.forward(self, input_ids, **kwargs)


class MSAForCausalLM(BoundMemory, msa_hf.MSAForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("memory") is None and kwargs.get("memory_pass") is None:
            kwargs["memory"] = self.bound_memory()
        return msa_hf.MSAForCausalLM.forward(self, input_ids, **kwargs)

    def generate(self, inputs: Any = None, memory: Any = None, **kwargs: Any) -> Any:
        memory = self.bound_memory() if memory is None else memory
        return msa_hf.MSAForCausalLM.generate(self, inputs, memory=memory, **kwargs)
