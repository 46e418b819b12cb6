"""Compiled decoder layers for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model.attending_layers_msa import MOST_GRAPHS
from ..model.attention_msa import MemoryPass
from ..model.compiled_layers_msa import SeparatePass
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
    """Compile the decoder layers while the context lasts; one compilation serves all that are alike.

    What a run of the model is for (its pass) does not reach layers without a memory. They then compute the base's own
    attention, which is what every pass asks of them where there is no prefix. A layer with one is compiled in pieces,
    between which the pass does its part.

    On newer GPUs attention is cuDNN's, the quickest, which plans for every number and width of rows that it has not
    seen: a tenth of a second each, once. So parts of few sizes (`part_sizes`) are quicker than any.

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
    layers = decoder_layers(model)
    try:
        for index, layer in layers.items():
            run = torch.compile(layer.forward, dynamic=dynamic, **options)
            layer.forward = _with_separate_pass(run) if index in memory else _without_pass(run)
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def _without_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, memory_pass: MemoryPass | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def _with_separate_pass(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, memory_pass: MemoryPass | None = None, **kwargs: Any) -> Any:
        return forward(*args, memory_pass=None if memory_pass is None else SeparatePass(memory_pass), **kwargs)

    return call
