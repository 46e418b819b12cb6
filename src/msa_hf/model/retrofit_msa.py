"""Retrofit: finding the attention layers of a base model and giving the memory layers their routers."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention_config_msa import AttentionConfig
from .attention_msa import ScoreBias, _eager_of, enter_memory_layer
from .configuration_msa import MSAConfig
from .gradients_msa import ROUTER_MODULES
from .positions_msa import restore_rotary_embeddings, steady_rotary_embeddings
from .quantized_msa import effective_weight, is_plain

FUSED_PROJECTIONS = ("qkv_proj", "query_key_value")


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The attention modules of a decoder by layer index.

    Raises:
        ValueError: where the model has none that follows transformers' attention interface, naming what is missing.
    """
    name = type(model).__name__
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and any(hasattr(module, name) for name in ("q_proj", *FUSED_PROJECTIONS)):
            if layer in found:
                raise ValueError(
                    f"{name} cannot hold a memory: its layer {layer} has two attention modules, as encoder-decoders "
                    "have; a memory needs a decoder-only causal LM."
                )
            found[layer] = module
    if not found:
        raise ValueError(
            f"{name} cannot hold a memory: it has no attention layer with a `layer_idx` and query, key and value "
            "projections (state-space and linear-attention models have none)."
        )
    for module in found.values():
        try:
            _eager_of(module)
        except AttributeError:
            raise ValueError(
                f"{name} cannot hold a memory: {type(module).__name__} does not use transformers' attention interface "
                "(its file defines no `eager_attention_forward`)."
            ) from None
    return found


def refuse_unsupported(config: PreTrainedConfig, model_class: type | None) -> None:
    """Refuse what can be told from the configuration of a base model alone.

    Raises:
        ValueError: naming what is missing.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind!r} is an encoder-decoder; a memory needs a decoder-only causal LM.")
    if model_class is None:
        raise ValueError(f"{kind!r} has no causal LM class in transformers; a memory needs a decoder-only causal LM.")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(
            f"{kind!r} is a composite configuration; retrofit its text model (`config.get_text_config()`) instead."
        )
    if isinstance(getattr(type(config), "num_hidden_layers", None), property):
        raise ValueError(
            f"{kind!r} counts its layers in another way than by `num_hidden_layers`, and has no room for a memory."
        )
    if not hasattr(config, "num_attention_heads") or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"{kind!r} has no attention heads: without a full-attention layer there is no memory layer.")


def head_shape(module: nn.Module, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads H, key/value heads G and head dimension D of an attention module."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    return heads, groups, dim


def query_key_weights(module: nn.Module, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights [H * D, hidden] and [G * D, hidden] of a layer's query and key projections, also where fused.

    Args:
        dtype: in which the model computes.

    Raises:
        ValueError: where they are on the meta device, or have another shape.
    """
    heads, groups, dim = head_shape(module, config)
    name = next(name for name in ("q_proj", *FUSED_PROJECTIONS) if hasattr(module, name))
    weight = effective_weight(getattr(module, name), module.layer_idx, name, dtype)
    if name == "q_proj":
        query, key = weight, effective_weight(module.k_proj, module.layer_idx, "k_proj", dtype)
    elif name == "qkv_proj":  # rows: all queries, all keys, all values
        query, key = weight[: heads * dim], weight[heads * dim : (heads + groups) * dim]
    else:  # query_key_value: query, key and value of one head after the other
        per_head = weight.unflatten(0, (heads, 3, dim))
        query, key = per_head[:, 0].flatten(0, 1), per_head[:, 1].flatten(0, 1)
    if query.shape[0] != heads * dim or key.shape[0] != groups * dim:
        raise ValueError(
            f"Layer {module.layer_idx}: `{name}` has {tuple(weight.shape)}, which does not hold {heads} query and "
            f"{groups} key heads of {dim}. Pass router_init='random'."
        )
    return query, key


def attach_routers(model: nn.Module, config: MSAConfig) -> None:
    """Give the memory layers of `model` their routers (uninitialized) and hooks, all attention layers our functions.

    `router_q_proj` [H * D, hidden] and `router_k_proj` [G * D, hidden] are plain linear layers without bias on the
    attention module, in its dtype and on its device; `router_score_bias` one scalar where `config.score_bias`.

    Raises:
        ValueError: where a memory layer has no attention module, or positions depend on the length of a batch.
    """
    layers = attention_layers(model)
    steady_rotary_embeddings(model, config)
    if missing := [layer for layer in config.memory_layers if layer not in layers]:
        raise ValueError(f"`memory_layers` names {missing}, but attention layers are {sorted(layers)}.")
    for module in layers.values():
        if not hasattr(module, "config"):
            raise ValueError(
                f"{type(model).__name__} cannot hold a memory: {type(module).__name__} keeps no `config`, in which "
                "transformers' attention interface looks up the attention implementation."
            )
        module.config = AttentionConfig(config)
    for layer in config.memory_layers:
        module = layers[layer]
        heads, groups, dim = head_shape(module, config)
        like = next(parameter for parameter in module.parameters())
        dtype = like.dtype if is_plain(like) else model.dtype
        if not config.shared_router:
            module.router_q_proj = nn.Linear(
                config.hidden_size, heads * dim, bias=False, device=like.device, dtype=dtype
            )
            module.router_k_proj = nn.Linear(
                config.hidden_size, groups * dim, bias=False, device=like.device, dtype=dtype
            )
        if config.score_bias:
            module.router_score_bias = ScoreBias(config.aux_temperature, device=like.device, dtype=dtype)
        module.memory_hook = module.register_forward_pre_hook(enter_memory_layer, with_kwargs=True)
        module.memory_layer = layer
    model.memory_depth = config.num_hidden_layers


def renumber_memory_layers(model: PreTrainedModel) -> None:
    """Bring the configuration up to date where layers were repeated or left out since the routers were attached, as
    `layer_replication` of PEFT does; copies of a memory layer are memory layers.

    Raises:
        ValueError: where none was kept.
    """
    config = model.config
    if config.num_hidden_layers == model.memory_depth:
        return
    layers = attention_layers(model)
    for module in layers.values():
        module.config = AttentionConfig(config)
    routed = {layer: module for layer, module in sorted(layers.items()) if "memory_layer" in module.__dict__}
    if not routed:
        raise ValueError("None of the layers that were kept is a memory layer; keep one of `memory_layers`.")
    auxiliary = [layer for layer, module in routed.items() if module.memory_layer in config.aux_layers]
    config.memory_layers, config.aux_layers = list(routed), auxiliary or list(routed)
    for layer, module in routed.items():
        module.memory_layer = layer
    model.memory_depth = config.num_hidden_layers


def detach_routers(model: nn.Module) -> None:
    """Undo `attach_routers`."""
    model.__dict__.pop("memory_depth", None)
    restore_rotary_embeddings(model)
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), AttentionConfig):
            module.config = config.config
        hook = module.__dict__.pop("memory_hook", None)
        if hook is not None:
            hook.remove()
            module.__dict__.pop("memory_layer", None)
            for name in ROUTER_MODULES:
                if hasattr(module, name):
                    delattr(module, name)


@torch.no_grad()
def initialize_routers(model: PreTrainedModel, how: str, routers: Collection[nn.Module] | None = None) -> None:
    """Set the routers' first weights.

    Args:
        model: an MSA model.
        how: `"copy"` starts from the layer's own query and key projections, `"random"` from a normal distribution with
            the configuration's `initializer_range`.
        routers: which of `ROUTER_MODULES`, of any layers; default all.

    Raises:
        ValueError: for another `how`.
    """
    if how not in ("copy", "random"):
        raise ValueError(f"`router_init` must be 'copy' or 'random', got {how!r}.")
    for module in attention_layers(model).values():
        here = {name: getattr(module, name) for name in ROUTER_MODULES if hasattr(module, name)}
        if routers is not None:
            here = {name: router for name, router in here.items() if router in routers}
        if (bias := here.pop("router_score_bias", None)) is not None:
            bias.weight.fill_(1.0)
        if how == "random":
            for router in here.values():
                router.weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
        elif here:
            query, key = query_key_weights(module, model.config, model.dtype)
            for name, router in here.items():
                router.weight.copy_(query if name == "router_q_proj" else key)
