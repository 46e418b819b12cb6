"""Shapes that stay: the tokens that prompts are padded to, and the masks over all places of a static cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache_msa import MSAStaticCache
from .types_msa import Arguments

if TYPE_CHECKING:
    from .generating_msa import GeneratingMixin

LEAST_PROMPT = 16  # tokens of the smallest prompt that is compiled for
MOST_PROMPT = 1024  # longer ones are bound by their arithmetic, not by launches


def bucket_of_prompt(length: int) -> int:
    """Tokens to which a prompt is padded: the next power of two, or what there is where that is long already."""
    return length if length > MOST_PROMPT else max(1 << (length - 1).bit_length(), LEAST_PROMPT)


def is_in_bucket(width: int) -> bool:
    """Tell whether `width` is a number of tokens to which prompts are padded."""
    return width == bucket_of_prompt(width) <= MOST_PROMPT


def padded(inputs: Arguments, missing: int) -> Arguments:
    """Inputs whose tensors of tokens [B, T, ...] have so many more, which are padding; the rest as it is."""
    of_tokens = ("input_ids", "inputs_embeds", "position_ids", "routing_mask")
    return {
        name: torch.nn.functional.pad(item, (0, 0) * (item.dim() - 2) + (0, missing))
        if name in of_tokens and isinstance(item, Tensor)
        else item
        for name, item in inputs.items()
    }


def kept_places(inputs: Arguments, length: int) -> Tensor:
    """[n] int64, the tokens whose logits are wanted; the same of a run whose prompt is padded."""
    kept = inputs.get("logits_to_keep", 0)
    if isinstance(kept, int):
        return torch.arange(length - kept if kept else 0, length, device=inputs["position_ids"].device)
    return kept


def heads_of(model: GeneratingMixin) -> tuple[int, int]:
    """Key/value heads and their width, of every attention layer."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, width


def real_places(cache: MSAStaticCache, mask: Tensor | None, positions: Tensor) -> Tensor:
    """[B, room] bool, the places of a static cache that hold no padding, or nothing yet.

    Args:
        mask: [B, past + T] of the tokens that are there; None for all.
        positions: [B, T], on the device.
    """
    room = cache.get_max_length()
    if mask is None:
        return torch.ones(positions.shape[0], room, dtype=torch.bool, device=positions.device)
    return torch.nn.functional.pad(mask.to(positions.device).bool(), (0, room - mask.shape[1]), value=True)


def visible_tokens(model: GeneratingMixin, cache: MSAStaticCache, real: Tensor, length: int) -> Tensor:
    """The mask [B, 1, T, room] of the next T tokens over all places of a static cache, as the base takes it.

    Args:
        real: [B, room] bool, places that may be seen.
        length: T.
    """
    places = torch.arange(real.shape[1], device=real.device)
    queries = torch.arange(length, device=real.device) + cache.get_seq_length()
    visible = (places <= queries[:, None])[None, None] & real[:, None, None]
    if model.config._attn_implementation != "eager":
        return visible
    low = torch.finfo(model.dtype).min
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, low)
