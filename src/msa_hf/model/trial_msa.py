"""A trial of two tokens: whether the layers of a model let a memory in.

What a class looks like does not tell: some families define transformers' attention interface and do not call it, or
call it with states of another shape than a memory keeps. A bank would be empty or wrong, and the first to notice would
be who asks it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_msa import AttentionFunction, AttentionOutput
from .cache_msa import MSACache
from .compat_msa import CACHE
from .configuration_msa import MSAConfig
from .modes_msa import evaluating
from .retrofit_msa import attention_layers, head_shape
from .wrapping_msa import has_come_and_go_weights, input_device

TOKENS = 2


@dataclass
class Call:
    """The arguments with which a layer called the attention interface: shapes, and that of a mask."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: torch.Size | None


@dataclass
class TrialPass:
    """Watches the attention of a run, and changes nothing.

    Attributes:
        inputs: layer -> shape of what the attention of a memory layer was given.
        calls: layer -> its calls of the attention interface.
    """

    inputs: dict[int, torch.Size] = field(default_factory=dict)
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        self.inputs[module.layer_idx] = hidden_states.shape  # type: ignore[index]

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        mask = None if attention_mask is None else attention_mask.shape
        call = Call(query.shape, key.shape, value.shape, mask)
        self.calls.setdefault(module.layer_idx, []).append(call)  # type: ignore[arg-type]
        return base(module, query, key, value, attention_mask, **kwargs)


def refuse_untouchable(model: PreTrainedModel) -> None:
    """Run a model with a memory on two tokens, and refuse it where its memory layers cannot see a memory.

    A model whose weights are not all at hand, or are quantized (layers of bitsandbytes change when they first run), is
    tried as a twin without weights; where the computation depends on numbers, so that the twin cannot run, the first
    use of the model tells.

    Raises:
        ValueError: naming the layer and what is amiss with it.
    """
    name, layers = type(model).base_class.__name__, attention_layers(model)
    absent = any(weight.is_meta or not weight.numel() for weight in model.parameters())
    if not absent and not has_come_and_go_weights(model) and getattr(model, "hf_quantizer", None) is None:
        try:
            watched = _run(model, input_device(model))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot hold a memory: a trial of {TOKENS} tokens with a cache failed. {error}"
            ) from error
    else:
        try:
            with torch.device("meta"):  # in 16 bits, for which there are kernels of experts
                watched = _run(type(model)(model.config).bfloat16(), torch.device("meta"))
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return
    for layer in model.config.memory_layers:
        if problem := _problem(layers[layer], model.config, watched.inputs.get(layer), watched.calls.get(layer, [])):
            raise ValueError(f"{name} cannot hold a memory: {type(layers[layer]).__name__} of layer {layer} {problem}.")


def refuse_unseen(memory_layers: Collection[int], seen: Collection[int]) -> None:
    """Raise RuntimeError where the attention of memory layers passed by what should see it."""
    if unseen := [layer for layer in memory_layers if layer not in seen]:
        raise RuntimeError(
            f"The attention of layers {unseen} did not call the memory's attention function, so they would not see any "
            "document. Where the model's attention implementation was changed by hand, set it with "
            "`model.set_attn_implementation('sdpa')` or 'eager'; else this model cannot hold a memory."
        )


def _run(model: PreTrainedModel, device: torch.device) -> TrialPass:
    """The model on two tokens, with a cache; a random state that it draws on is given back."""
    watching = TrialPass()
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    devices = [device] if device.type not in ("cpu", "meta") else []
    with evaluating(model), torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        model.run_base(
            backbone_only=True,
            input_ids=ids,
            position_ids=torch.arange(TOKENS, device=device)[None],
            use_cache=True,
            memory_pass=watching,
            **{CACHE: MSACache(config=model.config)},
        )
    return watching


def _problem(module: nn.Module, config: MSAConfig, given: torch.Size | None, calls: list[Call]) -> str | None:
    """Why a memory layer cannot see a memory, None where it can."""
    heads, groups, dim = head_shape(module, config)
    if not calls or given is None:
        return (
            "computes attention by itself and does not call transformers' attention interface, through which a memory "
            "comes in"
        )
    if len(calls) > 1:
        return f"calls the attention interface {len(calls)} times per token, where a memory knows one attention a layer"
    if given != (1, TOKENS, config.hidden_size):
        return f"is given states of {list(given)}, not of the hidden size {config.hidden_size}"
    call = calls[0]
    if call.query != (1, heads, TOKENS, dim) or call.key != (1, groups, TOKENS, dim) or call.value != call.key:
        return (
            f"attends with queries {list(call.query[1:])}, keys {list(call.key[1:])} and values {list(call.value[1:])} "
            f"[heads, tokens, dimension], where a memory needs {heads} query heads, {groups} key and value heads, and "
            f"{dim} dimensions in all of them"
        )
    if call.mask is not None and call.mask[1] != 1:
        return "masks every head in another way, where a memory hides the same from all"
    return None
