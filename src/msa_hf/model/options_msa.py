"""The options of a `generate` call, as transformers will resolve them, and the cache that they ask for."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from types import MethodType
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PreTrainedConfig, StaticCache
from transformers.generation import GenerationMode

from .cache_msa import MSACache, MSAQuantizedCache, MSAStaticCache
from .types_msa import Arguments

# Implementations of transformers' cache that hold a memory; "hybrid" is what old configurations call the dynamic one.
GROWING_CACHES = (None, "dynamic", "hybrid", "offloaded", "quantized")
STATIC = "static"
# Rooms for tokens that a static cache may have are multiples of this: every other room is compiled for anew.
STATIC_STEP = 256
UNSET_NEW_TOKENS = 20  # that transformers generates where no length is set anywhere


class GenerationOptions:
    """Options by name: a keyword of the call counts most, then the configuration given, then the model's own.

    Args:
        arguments: keywords of the call.
        own: `model.generation_config`.

    Raises:
        TypeError: where `generation_config` is none.
    """

    def __init__(self, arguments: Mapping[str, object], own: GenerationConfig) -> None:
        given = arguments.get("generation_config")
        if given is not None and not isinstance(given, GenerationConfig):
            raise TypeError(
                f"`generation_config` must be a GenerationConfig, got {type(given).__name__}. The second argument of "
                "generate() is the generation configuration, as in transformers; a bank is passed as `memory=bank`."
            )
        self.arguments, self.given, self.own = arguments, given, own

    def __getitem__(self, name: str) -> Any:
        """The option, None where it is not set anywhere."""
        if name in self.arguments:
            return self.arguments[name]
        found = getattr(self.given, name, None)
        return getattr(self.own, name, None) if found is None else found

    def mode(self) -> GenerationMode:
        """The way in which transformers will decode."""
        resolved = copy.copy(self.own)
        for name in vars(resolved):
            setattr(resolved, name, self[name])
        return resolved.get_generation_mode(self["assistant_model"])


def bind_positional(
    function: Callable[..., object], values: tuple[object, ...], arguments: Mapping[str, object]
) -> Arguments:
    """`arguments` with the positional `values` of a call of `function` under their names.

    Raises:
        TypeError: for too many values, and for one that is given twice.
    """
    names = _positional_names(function)
    if len(values) > len(names):
        raise TypeError(f"{function.__name__}() takes at most {len(names)} positional arguments, got {len(values)}.")
    bound = dict(zip(names, values, strict=False))
    if twice := sorted(bound.keys() & arguments.keys()):
        raise TypeError(f"{function.__name__}() got {twice} twice.")
    return {**bound, **arguments}


@functools.lru_cache
def _names_of_own(function: Hashable) -> list[str]:
    """The names of positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert callable(function)
    return [name for name, item in inspect.signature(function).parameters.items() if item.kind in kinds]


def _positional_names(function: Callable[..., object]) -> list[str]:
    if isinstance(function, MethodType):  # a new one at every call, of the same function
        return _names_of_own(function.__func__)[1:]
    return _names_of_own(function)


def cache_for(options: GenerationOptions, config: PreTrainedConfig, device: torch.device, prompt: int) -> Cache:
    """An empty cache that keeps the chosen documents, of the kind that `cache_implementation` names.

    Args:
        config: the model's.
        device: where the model computes.
        prompt: tokens of the prompt, padding included.

    Raises:
        ValueError: for a kind that cannot keep them, with the reason and the remedy.
        ImportError: where what quantizes is not installed.
    """
    kind = options["cache_implementation"]
    refuse_fixed_cache(kind)
    if kind == STATIC:
        return static_cache(config, most_tokens(options, prompt))
    if kind == "quantized":
        given = options["cache_config"]
        settings = dict(copy.deepcopy(given) if given is not None else {})
        return MSAQuantizedCache(**{"backend": "quanto", "config": config, **settings})
    if kind == "offloaded" and device.type != "cuda":
        raise ValueError(
            "`cache_implementation='offloaded'` keeps keys and values of a CUDA device in host memory, but the model "
            f"computes on {device.type!r}; leave it out."
        )
    return MSACache(config=config, offloading=kind == "offloaded")


def static_cache(config: PreTrainedConfig, tokens: int) -> MSAStaticCache:
    """A static cache with room for so many tokens, and for those up to the next `STATIC_STEP`."""
    return MSAStaticCache(config=config, max_cache_len=static_room(tokens))


def static_room(tokens: int) -> int:
    """The room of a static cache for so many tokens."""
    return -(-tokens // STATIC_STEP) * STATIC_STEP


def most_tokens(options: GenerationOptions, prompt: int) -> int:
    """The most tokens that a call of `generate` can have seen at its end, as transformers will count them."""
    if options["max_new_tokens"] is not None:
        return prompt + int(options["max_new_tokens"])
    length = options["max_length"]
    return prompt + UNSET_NEW_TOKENS if length in (None, UNSET_NEW_TOKENS) else max(int(length), prompt)


def refuse_small_cache(cache: Cache | None, options: GenerationOptions, prompt: int) -> None:
    """Raise ValueError where a static cache has no room for the `prompt` tokens seen so far and those to come."""
    if isinstance(cache, StaticCache) and most_tokens(options, prompt) > (room := cache.get_max_length()) > 0:
        raise ValueError(
            f"The cache has room for {room} tokens, but this call may come to {most_tokens(options, prompt)}. Make it "
            "greater: MSAStaticCache(config=model.config, max_cache_len=...), or generate fewer tokens."
        )


def refuse_fixed_cache(kind: str | None) -> None:
    """Raise ValueError for a `cache_implementation` whose caches cannot keep the documents chosen."""
    if kind not in (*GROWING_CACHES, STATIC):
        reason = (
            "it answers through continuous batching, whose pages have no place for them"
            if kind == "paged"
            else "no cache of this kind has a place for them"
        )
        raise ValueError(
            f"`cache_implementation={kind!r}` cannot keep the documents that a memory's layers have chosen: {reason}. "
            "Leave it out (also in `model.generation_config`), or use 'dynamic', 'static', 'quantized' or 'offloaded'."
        )


def refuse_attentions(options: GenerationOptions, attention: str | None) -> None:
    """Raise ValueError where attention weights are asked for that the model's kernels never hold; transformers would
    return none, or fail in the middle."""
    if options["output_attentions"] and attention != "eager":
        raise ValueError(
            f"`output_attentions` needs the attention weights, which attn_implementation={attention!r} does not hold; "
            "call `model.set_attn_implementation('eager')` first."
        )


def leave_out(option: str, arguments: Arguments, options: GenerationOptions) -> None:
    """Have transformers see `option` unset, in the keywords `arguments` of a call, in place."""
    if options[option] is None:
        return
    if options.given is None or getattr(options.own, option, None) is not None:
        arguments[option] = None
        return
    arguments.pop(option, None)  # beside a configuration, a keyword that is an option draws a warning
    arguments["generation_config"] = given = copy.deepcopy(arguments["generation_config"])
    setattr(given, option, None)
