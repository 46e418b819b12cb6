"""Evaluation mode, lent: modules are in it while something is measured or answered, and get their own mode back."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

# How many are at work on a module that was in training mode before the first of them came.
_at_work: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode and without gradients.

    Every module gets its own mode back, also after an error: a frozen part that stood in evaluation mode inside a model
    in training mode stays there. Where several threads are at work on a model, the last to leave gives the modes back.
    """
    with _lock:
        lent = [module for module in model.modules() if module.training or module in _at_work]
        for module in lent:
            _at_work[module] = _at_work.get(module, 0) + 1
            module.training = False  # `eval()` may be overridden, and would then do what nothing undoes
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            for module in lent:
                _at_work[module] -= 1
                if not _at_work[module]:
                    del _at_work[module]
                    module.training = True
