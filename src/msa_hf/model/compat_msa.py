"""The differences between versions of transformers; no other file asks for a version or for a name that changed."""

from __future__ import annotations

import re
from dataclasses import fields

import transformers
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, logging

from .types_msa import Arguments

logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24"  # the newest minor release that the tests of this code ran on

# An argument, and a field of outputs: `past_key_values` until 5.23, `cache` from 5.24 on. Callers may use either.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})

PEFT_CACHE = "past_key_values"  # what PEFT, up to 0.21, asks a base's inputs for, whatever transformers says


def rename_cache(arguments: Arguments) -> Cache | None:
    """Put the cache among the keyword arguments of a call under the name that this transformers knows, in place.

    A paged cache, which continuous batching hands to attention functions as `cache` in every version, is none of these.

    Returns:
        The cache, None where there is none.

    Raises:
        ValueError: where two different caches are given.
    """
    paged = arguments.get("cache") is not None and not isinstance(arguments["cache"], Cache)
    names = [name for name in CACHE_NAMES if name == CACHE or not (name == "cache" and paged)]
    given = {name: arguments.pop(name) for name in names if name in arguments}
    caches = [cache for cache in given.values() if cache is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise ValueError("`cache` and `past_key_values` are two names of one argument, and each has another value.")
    cache = caches[0] if caches else None
    if given:
        arguments[CACHE] = cache
    return cache


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache that a forward or `generate` returned, None where it returned none."""
    return getattr(output, CACHE, None)


def empty_cache(cache: Cache) -> None:
    """Make a cache as new; up to 5.23, `reset` leaves zeros in the places of what a growing one holds."""
    cache.reset()
    if not cache.is_compileable:
        for layer in cache.layers:
            layer.is_initialized = False


def in_dtypes_of(layer: StaticLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of new tokens in the dtypes that a static layer keeps them in, which it makes ready if it is new.

    Under autocast keys may be wider than values. Transformers 5.17 makes places for both in the dtype of the first
    keys, and writes nothing else to them.
    """
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    return keys.to(layer.keys.dtype), values.to(layer.values.dtype)


def readable_by_both_names(output_class: type) -> type:
    """Let the cache of an output class be read as `cache` and as `past_key_values`; a class decorator."""
    for name in CACHE_NAMES:
        if name != CACHE:
            setattr(output_class, name, property(cache_of, doc=f"The same as `{CACHE}`."))
    return output_class


def warn_of_untested_version() -> None:
    """Say in one line, once, that transformers is newer than what this code was tested with."""
    installed = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    newest = tuple(map(int, NEWEST_TESTED.split(".")))
    if installed and tuple(map(int, installed.groups())) > newest:
        logger.warning_once(
            f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest that this code of "
            "msa-hf was tested with; update msa-hf, or install an older transformers, if something is amiss."
        )
