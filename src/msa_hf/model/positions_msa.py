"""Rotary positions that do not depend on company.

Some position schemes (LongRoPE, dynamic NTK) change their frequencies with the longest text of a batch, and some keep
what they changed to in a module that all calls share. Then a document encoded beside a long one would differ from
itself alone. So whatever works on a memory has the frequencies of one length, `rope_length` of the configuration; it
computes them in modules of its own, which always see that length. A run of the base alone is left as it is.
"""

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from .types_msa import Arguments

# Kinds of rotary embeddings whose frequencies are the same in every call. A kind unknown here is taken for one that
# switches, which computes the same where it does not.
STEADY_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional", "axial")

_length: contextvars.ContextVar[int | None] = contextvars.ContextVar("rope_length", default=None)
# Module -> device and length -> a module of our own.
_steady: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, int], nn.Module]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def switching_rope(config: PreTrainedConfig) -> list[Arguments]:
    """The `rope_parameters` of a configuration whose frequencies depend on the length of a batch, one per layer type
    that has its own; empty where none do."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [item for item in parameters.values() if item]
    return [item for item in each if isinstance(item, dict) and _switches(item.get("rope_type", "default"))]


def _switches(rope_type: str) -> bool:
    return rope_type not in STEADY_ROPE_TYPES


def reach(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that the position scheme of a configuration is made for; None where it does not say.

    Dynamic NTK stretches the base's positions by its factor, LongRoPE has been stretched already.
    """
    positions = getattr(config, "max_position_embeddings", None)
    stretched = [item.get("factor") or 1.0 for item in switching_rope(config) if "dynamic" in item["rope_type"]]
    return None if positions is None else int(positions * max(stretched, default=1.0))


def position_limit(config: PreTrainedConfig) -> int | None:
    """Positions that a text may take up, None where nothing limits them."""
    length = getattr(config, "rope_length", None)
    return length if length is not None else getattr(config, "max_position_embeddings", None)


def equivalent_length(config: PreTrainedConfig) -> int | None:
    """The greatest `rope_length` with the frequencies that a configuration has, None where they never change.

    Two models whose numbers are equal place tokens alike.
    """
    length, positions = config.rope_length, getattr(config, "max_position_embeddings", None) or 0
    if length is None:
        return None
    greatest = []
    for parameters in switching_rope(config):
        if parameters["rope_type"] == "longrope":
            threshold = parameters["original_max_position_embeddings"]
            greatest.append(threshold if length <= threshold else max(positions, threshold + 1))
        elif "dynamic" in parameters["rope_type"]:
            greatest.append(max(length, positions))
        else:
            greatest.append(length)
    return min(greatest)


def steady_rotary_embeddings(model: nn.Module, config: PreTrainedConfig) -> None:
    """Make the rotary embeddings of a model heed `in_positions_of`.

    Raises:
        ValueError: where their frequencies depend on the length of a batch and cannot be chosen once.
    """
    if config.rope_length is None:
        return
    kinds = sorted({item["rope_type"] for item in switching_rope(config)})
    found = _switching_modules(model)
    inside = [
        module
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for module in layer.modules()
        if any(module is item for item in found)
    ]
    if not found or inside:
        where = "its layers compute them by themselves" if inside else "it has no rotary embedding of transformers"
        raise ValueError(
            f"{type(model).__name__} cannot hold a memory: its positions ({', '.join(kinds)}) change with the longest "
            f"text of a batch, so that documents would depend on what they are encoded beside, and {where}, so that "
            "one choice cannot be made. Set another `rope_type` in `rope_parameters` of the base's configuration."
        )
    for module in found:
        module.__dict__["forward"] = functools.partial(_rotate, module)


def restore_rotary_embeddings(model: nn.Module) -> None:
    """Undo `steady_rotary_embeddings`."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func is _rotate:
            del module.__dict__["forward"]


def _switching_modules(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model whose kind, one or one per layer type, switches."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None) if "RotaryEmbedding" in type(module).__name__ else None
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if any(isinstance(item, str) and _switches(item) for item in kinds):
            found.append(module)
    return found


@contextlib.contextmanager
def in_positions_of(config: PreTrainedConfig, position_ids: Tensor | None = None) -> Iterator[None]:
    """A run of the base with the frequencies that its configuration chose.

    Args:
        config: of a model with a memory; without a `rope_length` this does nothing.
        position_ids: any shape, those of the run; on the meta device, where there are no numbers, nothing is done.

    Raises:
        ValueError: for a position that `rope_length` does not cover, where that was chosen below the scheme's reach.
    """
    length = config.rope_length
    if length is None or (position_ids is not None and position_ids.is_meta):
        yield
        return
    limited = length < (reach(config) or 0)  # beyond its reach, no scheme does better with other frequencies
    if limited and position_ids is not None and position_ids.numel() and int(position_ids.max()) >= length:
        raise ValueError(
            f"A token stands at position {int(position_ids.max())}, but the frequencies of the model's positions are "
            f"those of texts of up to {length} tokens. Shorten the text, or load the model with a greater "
            "`rope_length` and encode the documents anew."
        )
    token = _length.set(length)
    try:
        yield
    finally:
        _length.reset(token)


def _rotate(module: nn.Module, *args: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """The forward of a rotary embedding: (hidden states, position ids [..., T]) -> cosines and sines [..., T, D]."""
    length = _length.get()
    if length is None:
        return type(module).forward(module, *args, **kwargs)
    states = args[0] if args else next(item for item in kwargs.values() if isinstance(item, Tensor))
    if "position_ids" in kwargs:
        kwargs = {**kwargs, "position_ids": _with_last(kwargs["position_ids"], length)}
    else:
        args = (args[0], _with_last(args[1], length), *args[2:])
    found = _steady_module(module, states.device, length)(*args, **kwargs)
    return tuple(item[..., :-1, :] for item in found) if isinstance(found, tuple) else found[..., :-1, :]


def _with_last(positions: Tensor, length: int) -> Tensor:
    """Positions [..., T] and behind them the last one of a text of `length` tokens, by which the module chooses."""
    return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), length - 1)], dim=-1)


def _steady_module(module: nn.Module, device: torch.device, length: int) -> nn.Module:
    """A rotary embedding like `module` that nobody else calls, with the frequencies of this length."""
    if (found := _steady.get(module, {}).get((device, length))) is not None:
        return found
    with _lock:
        own = _steady.setdefault(module, {})
        if (device, length) not in own:
            # Not a copy: calls of others may have changed what the module keeps.
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                made = type(module)(module.config)
            made.to(device)
            kinds = module.rope_type if isinstance(module.rope_type, dict) else None
            with torch.inference_mode(False), torch.no_grad():
                last = torch.tensor([[length - 1]], device=device)
                for options in [{}] if kinds is None else [{"layer_type": layer_type} for layer_type in kinds]:
                    made(torch.zeros(1, 1, 1, device=device), last, **options)
            # It has what it needs: from here on nothing is computed again or kept.
            made.rope_type = "default" if kinds is None else dict.fromkeys(kinds, "default")
            own[device, length] = made
        return own[device, length]
