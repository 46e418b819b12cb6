"""Compiled decoder layers for training: those that a memory leaves as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model.retrofit_msa import attention_layers


def decoder_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that hold one attention layer each, as they stand in the model's list of layers, by layer index."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for index, attention in attention_layers(model).items():
        name = names[attention].rpartition(".")[0]
        found[index] = model.get_submodule(name)
    return found


@contextmanager
def compiled_layers(model: Any, dynamic: bool | None = True, **options: Any) -> Iterator[None]:
    """Compile the decoder layers without memory while the context lasts; one compilation serves all that are alike.

    What a run of the model is for (its pass) does not reach these layers. They then compute the base's own attention,
    which is what every pass asks of them where there is no prefix.

    Args:
        model: a model with a memory, or a plain one.
        dynamic: as `torch.compile` takes it; True: one compilation for all shapes.
        options: of `torch.compile`.

    Raises:
        ValueError: for a model with a prefix, whose rows every layer sees.
    """
    if getattr(model.config, "prefix_token_ids", None):
        raise ValueError("Layers of a model with a prefix cannot be compiled here: each of them attends to the prefix.")
    memory = set(getattr(model.config, "memory_layers", None) or ())
    plain = [layer for index, layer in decoder_layers(model).items() if index not in memory]
    try:
        for layer in plain:
            layer.forward = _without_pass(torch.compile(layer.forward, dynamic=dynamic, **options))
        yield
    finally:
        for layer in plain:
            layer.__dict__.pop("forward", None)


def _without_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, memory_pass: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call
