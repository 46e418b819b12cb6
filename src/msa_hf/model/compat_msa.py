"""The differences between versions of transformers; no other file asks for a version or for a name that changed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

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

# Transformers 5.17 alone adapts a model, and leaves whole modules of the adapter (`modules_to_save`) as they were.
LEAVES_WHOLE_MODULES = re.match(r"5\.17(\D|$)", transformers.__version__) is not None
DOWNLOADING = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")

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


def adapter_weights(
    model_id: str | None,
    adapter_name: str,
    config: Any,
    weights: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
) -> Mapping[str, Tensor] | None:
    """The weights to hand to transformers' `load_adapter`, so that it loads whole modules of the adapter too.

    Where it does so itself they are those given. Else they are read here, and those of whole modules get the names
    that PEFT has for them in a model.

    Args:
        model_id: directory or name of the adapter.
        adapter_name: its name in the model.
        config: of the adapter, where it is given.
        weights: of the adapter, where they are given.
        options: the further arguments of `load_adapter`.
    """
    loading = options.get("load_config")
    model_id = model_id or getattr(loading, "pretrained_model_name_or_path", None)
    if not LEAVES_WHOLE_MODULES or (model_id is None and (config is None or weights is None)):
        return weights
    peft = importlib.import_module("peft")
    found = {**(getattr(loading, "download_kwargs", None) or {}), **(options.get("adapter_kwargs") or {}), **options}
    download = {name: found[name] for name in DOWNLOADING if found.get(name) is not None}
    config = peft.PeftConfig.from_pretrained(model_id, **download) if config is None else config
    whole = getattr(config, "modules_to_save", None)
    if not whole:
        return weights
    weights = peft.load_peft_weights(model_id, device="cpu", **download) if weights is None else weights
    return {_within_wrapper(key, whole, adapter_name): value for key, value in weights.items()}


def _within_wrapper(key: str, modules: Iterable[str], adapter_name: str) -> str:
    """A weight's name where PEFT wraps its module; a module's name may be the end of the whole, as PEFT takes it."""
    for name in modules:
        if found := re.match(rf"(.*?{re.escape(name)})\.(.+)", key):
            return f"{found[1]}.modules_to_save.{adapter_name}.{found[2]}"
    return key


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
