"""Decoder layers compiled for runs with a memory and a static cache: one graph for all layers that are alike.

Compiling a model of 36 layers as a whole takes minutes, one layer takes seconds. Nothing that a graph sees may tell
which layer it is: each is handed its own part of the pass and of the cache, under the same number.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_msa import AttendingPass
from .cache_msa import MSAStaticCache
from .compat_msa import CACHE, in_dtypes_of
from .ops_msa import OPERATIONS
from .retrofit_msa import attention_layers

THE_LAYER = 0  # number of a layer among its own things
MOST_GRAPHS = 64  # of one kind of run; behind it torch.compile gives up, and its own limit of 8 is soon reached
Part = TypeVar("Part")
Run = Callable[..., object]

# What the layers of this thread's run are called through. Another thread's find their own, or none.
_run: contextvars.ContextVar[Run | None] = contextvars.ContextVar("run_of_a_layer", default=None)


class OneLayerPass(AttendingPass):
    """An `AttendingPass` of a single layer.

    Args:
        whole: the pass through all layers.
        layer: number of the layer.
        is_memory_layer: it has routers.
    """

    def __init__(self, whole: AttendingPass, layer: int, is_memory_layer: bool) -> None:
        routes = is_memory_layer and whole.request is not None
        super().__init__(
            config=whole.config,
            layers=_part(whole.layers, layer) if routes else {},
            prefix=_part(whole.prefix, layer),
            request=whole.request if routes else None,
            contexts=_part(whole.previous, layer),
            keep_contexts=whole.keep_contexts,
        )

    def place(self, module: nn.Module) -> int:
        return THE_LAYER

    def routes(self, module: nn.Module) -> bool:
        return True  # where something is asked at all

    def hand_over(self, whole: AttendingPass, layer: int) -> None:
        """Put what was recorded where the whole pass keeps it."""
        if THE_LAYER in self.contexts and whole.keep_contexts:
            whole.contexts[layer] = self.contexts[THE_LAYER]
        if THE_LAYER in self.routing:
            whole.routing[layer], whole.not_finite[layer] = self.routing[THE_LAYER], self.not_finite[THE_LAYER]


class OneLayerCache:
    """The part of a static cache that a layer writes to; whichever it names, it is that one.

    Args:
        cache: of all layers.
        layer: number of the layer.
    """

    def __init__(self, cache: MSAStaticCache, layer: int) -> None:
        self.layer = cache.layers[layer]

    def update(self, key: Tensor, value: Tensor, layer: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, G, T, D] of new tokens; gives those of all places."""
        return self.layer.update(*in_dtypes_of(self.layer, key, value), *args, **kwargs)


def _prompt_layer(layer: nn.Module, *args: object, **kwargs: object) -> object:
    return layer._call_impl(*args, **kwargs)


def _token_layer(layer: nn.Module, *args: object, **kwargs: object) -> object:
    return layer._call_impl(*args, **kwargs)


def options_of_tokens(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options of torch.compile for layers that see one token: fewer kernels, as products are compiled too.

    Inductor leaves products with a single row to the library of the device, unless it may tune their tiles.
    """
    if options.get("backend", "inductor") != "inductor":
        return options
    mode = options.get("mode")
    of_mode = {} if mode is None else torch._inductor.list_mode_options(mode)
    given = options.get("options") or {}
    tuned = {"coordinate_descent_tuning": True, **of_mode, **given}
    return {**options, "backend": OPERATIONS["token_backend"](), "mode": None, "options": tuned}


class AttendingLayers:
    """The compiled layers of one model.

    Args:
        options: of torch.compile.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        # Two functions: sizes of one are no reason to make those of the other symbols.
        self.prompt = torch.compile(_prompt_layer, **options)
        self.token = torch.compile(_token_layer, **options_of_tokens(options))
        self.found: list[tuple[int, nn.Module]] = []

    @contextlib.contextmanager
    def of(self, model: PreTrainedModel, token: bool) -> Iterator[None]:
        """A model whose layers run compiled where they get an `AttendingPass` and an `MSAStaticCache`.

        Args:
            token: of one token of each sample.
        """
        memory_layers = set(model.config.memory_layers)
        if not self.found:
            names = {module: name for name, module in model.named_modules()}
            owners = {
                number: names[attention].rpartition(".")[0] for number, attention in attention_layers(model).items()
            }
            self.found = [(number, model.get_submodule(owner)) for number, owner in owners.items()]
        changed: dict[nn.Module, Run] = {}
        entered = _run.set(self.token if token else self.prompt)
        try:
            for number, layer in self.found:
                if layer._compiled_call_impl is None:
                    changed[layer] = _calling(layer, number, number in memory_layers)
                    layer._compiled_call_impl = changed[layer]
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                yield
        finally:
            _run.reset(entered)
            for layer, call in changed.items():
                if layer._compiled_call_impl is call:
                    layer._compiled_call_impl = None


def _calling(layer: nn.Module, number: int, is_memory_layer: bool) -> Run:
    """Wrap the call of a layer; another thread's call of it, for something else, stays as it is."""

    def call(*args: object, **kwargs: object) -> object:
        run, whole, cache = _run.get(), kwargs.get("memory_pass"), kwargs.get(CACHE)
        if run is None or not isinstance(whole, AttendingPass) or not isinstance(cache, MSAStaticCache):
            return layer._call_impl(*args, **kwargs)
        own = OneLayerPass(whole, number, is_memory_layer)
        output = run(layer, *args, **{**kwargs, "memory_pass": own, CACHE: OneLayerCache(cache, number)})
        own.hand_over(whole, number)
        return output

    return call


def _part(parts: Mapping[int, Part], layer: int) -> dict[int, Part]:
    """What is the layer's, under `THE_LAYER`; nothing where there is nothing."""
    return {THE_LAYER: parts[layer]} if layer in parts else {}
