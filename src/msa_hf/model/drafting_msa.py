"""Assisted generation: what an assistant that drafts tokens for a model with a memory is called with.

Drafts are proposals; the model with the memory checks every one of them, so they change how fast an answer comes and
never the answer. An assistant with a memory drafts from the same documents; a plain one, and the model's own lower
layers (`assistant_early_exit`), draft without.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

from .memory_msa import Memory
from .options_msa import GenerationOptions
from .types_msa import Arguments


def has_memory(assistant: PreTrainedModel) -> bool:
    """Tell whether an assistant is a model that can draw on a bank."""
    return hasattr(assistant, "memory_origin")


def refuse_assistant(assistant: PreTrainedModel | None, memory: Memory | None, options: GenerationOptions) -> None:
    """Refuse what cannot draft for a model with a memory.

    Raises:
        ValueError: for an assistant with a memory that did not make the bank, and for drafting from hidden states.
    """
    if options["use_mtp"] or options["speculation_type"] is not None:
        name = "use_mtp" if options["use_mtp"] else "speculation_type"
        raise ValueError(
            f"`{name}` drafts from the model's hidden states with a cache of its own, which does not hold the "
            "documents of a memory. Leave it out; `assistant_model` and `prompt_lookup_num_tokens` work."
        )
    if memory is not None and assistant is not None and has_memory(assistant):
        try:
            assistant._check_bank(memory)
        except ValueError as error:
            raise ValueError(
                f"The assistant has a memory, but cannot read this bank, so it would draft blindly. {error}\nOr let "
                "its plain base draft: `assistant.to_base()`."
            ) from error


def drafting_option(options: GenerationOptions) -> str | None:
    """The option that asks for drafts, None where none does."""
    names = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
    return next((name for name in names if options[name] is not None), None)


def refuse_drafts_of_offloaded(model: PreTrainedModel, options: GenerationOptions) -> None:
    """Raise ValueError where tokens are to be drafted with a model whose first weights are offloaded: transformers
    moves drafts to where these are, which is nowhere."""
    drafting = drafting_option(options)
    for who, item in (("the model", model), ("the assistant", options["assistant_model"])):
        if drafting and item is not None and item.device.type == "meta":
            raise ValueError(
                f"`{drafting}` drafts tokens where the first weights are, but those of {who} are offloaded. Keep its "
                "embedding on a device, or leave the drafting out."
            )


def refuse_drafts_behind_a_window(cache: Cache | None, options: GenerationOptions) -> None:
    """Raise ValueError where tokens are to be drafted into a static cache whose layers with a window cannot take them
    back: what they would need may be written over. From transformers 5.24 on they can where the window has all the
    room."""
    drafting = drafting_option(options)
    if drafting is None or not isinstance(cache, StaticCache):
        return
    windowed = [layer for layer, slides in zip(cache.layers, cache.is_sliding, strict=True) if slides]
    if not all(layer.is_croppable for layer in windowed):
        raise ValueError(
            f"`{drafting}` drafts tokens of which some are taken back, but a static cache cannot take back tokens of "
            "layers with a window, whose places are written over. Leave `cache_implementation='static'` out, or leave "
            "the drafting out."
        )


def refuse_drafts(options: GenerationOptions) -> None:
    """Raise ValueError where tokens are to be drafted behind a cache that holds a conversation already."""
    if given := drafting_option(options):
        raise ValueError(
            f"`{given}` drafts from the start of a conversation, and would have the model see again what its cache "
            "holds. Pass the whole conversation without the cache, or leave the drafting out of later turns."
        )


def drafting_arguments(arguments: Arguments, ours: Collection[str]) -> Arguments:
    """A model's keyword `arguments` that any assistant may see: without those of a memory (`ours`), and without
    positions, which leave room for a prefix and documents."""
    return {name: value for name, value in arguments.items() if name not in (*ours, "position_ids")}


def memory_arguments(arguments: Arguments, input_ids: Tensor, device: torch.device) -> Arguments:
    """The arguments of an assistant with a memory besides: the bank itself, and tensors on its device."""
    mask = arguments.get("attention_mask")  # None where it hides nothing
    given = {
        "memory": arguments["memory"],
        "routing_mask": arguments.get("routing_mask"),
        "force_documents": arguments.get("force_documents"),
        "attention_mask": torch.ones_like(input_ids) if mask is None else mask,
    }
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
        if value is not None
    }
