"""Static caches that calls of `generate` leave for the next ones.

What was recorded of a run holds for the tensors it ran on, so these are used again.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch

from .cache_msa import MSAStaticCache
from .options_msa import static_cache, static_room
from .recording_msa import autocast_of

if TYPE_CHECKING:
    from .generating_msa import GeneratingMixin

MOST_SPARE = 4  # caches of a model that wait for the next call of a like size
# Dtype and device of the model; samples, room, made in inference mode, dtype of autocast.
Place = tuple[torch.dtype, torch.device]
Kind = tuple[Place, int, int, bool, torch.dtype | None]

_spare: weakref.WeakKeyDictionary[torch.nn.Module, dict[Kind, MSAStaticCache]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def spare_cache(model: GeneratingMixin, samples: int, tokens: int) -> MSAStaticCache:
    """A `static_cache` for so many tokens of each sample: one that an earlier call left, or a new one."""
    free_displaced(model)
    with _lock:
        kept = _spare.get(model, {}).pop(_kind_of(model, samples, static_room(tokens)), None)
    if kept is None:
        return static_cache(model.config, tokens)
    kept.reset()
    return kept


def keep_spare(model: GeneratingMixin, samples: int, cache: MSAStaticCache) -> None:
    """Keep a cache that nobody uses any more: `MOST_SPARE` for each model, those that were used last.

    One that holds another number of samples, as beams make it, is freed.
    """
    if cache.is_initialized and cache.layers[0].keys.shape[0] != samples:
        _free([cache])
        return
    with _lock:
        kept = _spare.setdefault(model, {})
        kind = _kind_of(model, samples, cache.room)
        old = [kept.pop(kind)] if kind in kept else []
        kept[kind] = cache
        old += [kept.pop(next(iter(kept))) for _ in range(len(kept) - MOST_SPARE)]
    _free(old)


def free_displaced(model: GeneratingMixin) -> None:
    """Free the spare caches of a model that lie on another device than it does, or have another dtype."""
    with _lock:
        kept = _spare.get(model, {})
        # Most modules that are moved have none, and some have no weights yet.
        place = _place_of(model) if kept else None
        old = [kept.pop(kind) for kind in list(kept) if kind[0] != place]
    _free(old)


def free_all(model: GeneratingMixin) -> None:
    """Free all spare caches of a model."""
    with _lock:
        old = list(_spare.pop(model, {}).values())
    _free(old)


def _free(caches: list[MSAStaticCache]) -> None:
    # A recorded run and its cache hold each other: without this, their memory would wait for the garbage collector,
    # which knows nothing of what a device has left.
    for cache in caches:
        cache.recordings.clear()


def _kind_of(model: GeneratingMixin, samples: int, room: int) -> Kind:
    # Tensors that were made in inference mode cannot be written to outside of it, and autocast keeps others.
    return _place_of(model), samples, room, torch.is_inference_mode_enabled(), autocast_of(model.device)


def _place_of(model: GeneratingMixin) -> Place:
    return model.dtype, model.device
