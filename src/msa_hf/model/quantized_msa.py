"""Bases whose weights are not plain numbers: quantized ones, and those that were read from a GGUF file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .gradients_msa import ROUTER_MODULES

# Under which of these a quantization configuration lists modules that stay as they are.
SKIPPED_MODULES = ("modules_to_not_convert", "llm_int8_skip_modules")
QUANTIZATION_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def is_quantized_checkpoint(config: PreTrainedConfig, arguments: Mapping[str, object]) -> bool:
    """Tell whether a load with the keyword `arguments` reads or makes quantized weights, or reads a GGUF file."""
    asked = any(arguments.get(name) is not None for name in ("gguf_file", "quantization_config"))
    return asked or getattr(config, "quantization_config", None) is not None


def refuse_bare_gguf(name_or_path: str | PathLike[str]) -> None:
    """Raise ValueError for the path of a GGUF file in the place of a directory."""
    if str(name_or_path).endswith(".gguf"):
        raise ValueError(
            f"{str(name_or_path)!r} is a GGUF file; pass its directory, and its name: from_base(directory, "
            "gguf_file='name.gguf')."
        )


def is_plain(weight: Tensor) -> bool:
    """Tell whether a parameter holds numbers of at least 16 bits that mean what they are."""
    whole = type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "full_tensor")  # or spread over devices
    return whole and weight.is_floating_point() and weight.element_size() > 1


@torch.no_grad()
def effective_weight(linear: nn.Module, layer: int, name: str, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that a linear layer multiplies by, plain, whatever it is kept as.

    Layers that are quantized, or whose weights accelerate has put elsewhere, are asked for it: the images of the unit
    vectors, in the `dtype` in which the model computes, are its columns.

    Raises:
        ValueError: where there are no numbers.
    """
    weight = linear.weight
    if is_plain(weight) and not weight.is_meta:
        return weight
    problem = (
        f"Layer {layer}: `{name}` is {'offloaded' if weight.is_meta else 'quantized'}, so routers cannot be copied "
        "from it. Retrofit the plain model first, or pass router_init='random'."
    )
    if weight.is_meta and not hasattr(linear, "_hf_hook"):
        raise ValueError(problem)
    units = torch.eye(linear.in_features, dtype=dtype, device="cpu" if weight.is_meta else weight.device)
    units.requires_grad_()  # else bitsandbytes repacks a layer for inference, and it cannot be saved any more
    try:
        images = linear(units)
        if linear.bias is not None:
            images = images - linear(torch.zeros_like(units[:1]))
    except (RuntimeError, TypeError) as error:
        raise ValueError(problem) from error
    return images.T


def note_plain_routers(model: PreTrainedModel) -> None:
    """Have a model that was given routers be saved and loaded as what it is.

    Its routers are not quantized, whatever the rest is. A model whose weights were read from a GGUF file as plain
    numbers is not quantized at all.
    """
    quantizer, config = getattr(model, "hf_quantizer", None), model.config
    marked = getattr(config, "quantization_config", None)
    if quantizer is None or marked is None:
        return
    method = getattr(quantizer.quantization_config, "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        if all(is_plain(weight) for weight in model.parameters()):
            del config.quantization_config
            for name in QUANTIZATION_MARKS:
                if name in vars(model):
                    delattr(model, name)
        return
    settings = copy.deepcopy(marked if isinstance(marked, dict) else marked.to_dict())
    for field in SKIPPED_MODULES:
        if field in settings:
            skipped = settings[field] or getattr(quantizer, "modules_to_not_convert", None) or []
            settings[field] = [*skipped, *(name for name in ROUTER_MODULES if name not in skipped)]
    config.quantization_config = settings
