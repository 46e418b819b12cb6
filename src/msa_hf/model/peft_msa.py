"""The entries for models with a memory in PEFT's tables; the one place that writes into PEFT's tables.

PEFT finds the modules that a method adapts by `model_type`. That is `msa` on every base, so the entry is set anew to
that of the base each time PEFT asks a configuration for its fields, which it does before it looks the entry up
(`MSAConfig.to_dict`). Only two threads that wrap models of different bases at the same moment need a lock around it.

Virtual tokens (prompt tuning, P-tuning, prefix tuning) stand before the tokens of every call, so that what marks tokens
must be made longer: a causal LM with a memory gets its own `PeftModelForCausalLM`, any other model PEFT's. With other
methods it gets one that refuses adapters of other memory layers. Both compare the fields that an adapter was trained
for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput, is_peft_available

from .adapter_loading_msa import CheckedAdapters, ComparedAdapters
from .cache_msa import MSACache
from .compat_msa import CACHE, CACHE_NAMES, PEFT_CACHE, rename_cache
from .types_msa import Arguments

TABLES = "TRANSFORMERS_MODELS_TO_"  # so open the names of PEFT's tables of modules
MODEL_TYPE = "msa"
TASK = "CAUSAL_LM"


def teach_targets(base_model_type: str) -> None:
    """Tell PEFT, where it is loaded, that a model of type `msa` now stands on a base of `base_model_type`."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    for name, table in vars(constants).items():
        if name.startswith(TABLES):
            table.pop(MODEL_TYPE, None)
            if base_model_type in table:
                table[MODEL_TYPE] = table[base_model_type]


def teach_classes() -> None:
    """Tell PEFT, where it is installed, of the classes for virtual tokens and for adapters of models with a memory."""
    if is_peft_available():
        classes = importlib.import_module("peft").MODEL_TYPE_TO_PEFT_MODEL_MAPPING
        if isinstance(classes[TASK], type):
            classes[TASK] = _CausalLM(classes[TASK])


class VirtualTokenConfig(Protocol):
    """What is read of a `PeftConfig`; the package may not be there."""

    peft_type: str
    is_prompt_learning: bool
    num_virtual_tokens: int


class _CausalLM:
    """Makes a `PeftModelForCausalLM`: of the class `plain`, or for a model with a memory, of one that knows of it."""

    def __init__(self, plain: type[PreTrainedModel]) -> None:
        self.__name__ = plain.__name__  # by which PEFT compares classes
        self.plain = plain
        self.for_prompts = type(f"Memory{plain.__name__}", (VirtualTokens, plain), {"__module__": __name__})
        self.for_adapters = type(f"Checked{plain.__name__}", (CheckedAdapters, plain), {"__module__": __name__})
        for made in (self.for_prompts, self.for_adapters):
            globals()[made.__name__] = made  # so that instances can be pickled

    def __call__(
        self, model: PreTrainedModel, peft_config: VirtualTokenConfig, *args: object, **kwargs: object
    ) -> PreTrainedModel:
        kind = self.plain
        if hasattr(getattr(model, "config", None), "memory_layers"):
            kind = self.for_prompts if peft_config.is_prompt_learning else self.for_adapters
        return kind(model, peft_config, *args, **kwargs)


class VirtualTokens(ComparedAdapters):
    """In front of `PeftModelForCausalLM`: calls with a memory, whose virtual tokens do not route."""

    active_peft_config: VirtualTokenConfig
    base_model: PreTrainedModel

    @property
    def base_model_prepare_inputs_for_generation(self) -> Callable[..., Arguments]:
        """The function that PEFT calls for the base's part of a step's inputs."""
        return self._prepare_base

    @base_model_prepare_inputs_for_generation.setter
    def base_model_prepare_inputs_for_generation(self, prepare: Callable[..., Arguments]) -> None:
        """Nothing: PEFT sets the base's own method, which is looked up when it is called."""

    def _prepare_base(self, *args: object, **kwargs: object) -> Arguments:
        inputs = type(self.base_model).prepare_inputs_for_generation(self.base_model, *args, **kwargs)
        cache = rename_cache(inputs)
        inputs.pop(CACHE, None)
        inputs[PEFT_CACHE] = cache
        if not self._lie_in_the_cache:
            inputs.pop("position_ids", None)  # PEFT would leave them out, with a warning
        return inputs

    @property
    def _lie_in_the_cache(self) -> bool:
        """Tell whether the virtual tokens are keys and values; else they are embeddings."""
        types = importlib.import_module("peft").PeftType
        return self.active_peft_config.peft_type in (types.PREFIX_TUNING, types.CARTRIDGE)

    def _widen(self, mask: Tensor) -> Tensor:
        """[B, T] marks of tokens, of which no virtual one has any."""
        width = 0 if self._lie_in_the_cache else self.active_peft_config.num_virtual_tokens
        return torch.nn.functional.pad(mask.bool(), (width, 0))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *args: object,
        **kwargs: Any,
    ) -> ModelOutput:
        """PEFT's; `routing_mask`, `answer_mask` and their defaults count the tokens given, without virtual ones."""
        if kwargs.get("doc_ids") is not None:
            raise ValueError(
                "Packed rows (`doc_ids`) have no place for virtual tokens, which would stand before the documents; "
                "pass the documents as a pool (`documents`) or as a `memory`."
            )
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and (kwargs.get("memory") is not None or kwargs.get("documents") is not None):
            if attention_mask is None:
                attention_mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            if kwargs.get("routing_mask") is None:
                asking = attention_mask.bool()
                if kwargs.get("documents") is not None and labels is not None:
                    asking = asking & ((labels != -100).long().cumsum(1) == 0)
                kwargs["routing_mask"] = asking
            for name in ("routing_mask", "answer_mask"):
                if kwargs.get(name) is not None:
                    kwargs[name] = self._widen(kwargs[name])
        return super().forward(input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs)

    def get_prompt(self, *args: object, **kwargs: object) -> Cache | Tensor:
        """PEFT's; keys and values lie in a cache that also holds the documents chosen."""
        prompt = super().get_prompt(*args, **kwargs)
        return _into(MSACache(config=self.base_model.config), prompt) if isinstance(prompt, Cache) else prompt

    def generate(self, *args: object, **kwargs: Any) -> ModelOutput | Tensor:
        """PEFT's.

        Raises:
            ValueError: for a cache that holds an earlier turn, whose virtual tokens PEFT would not count.
        """
        for name in CACHE_NAMES:
            if (cache := kwargs.get(name)) is not None and cache.get_seq_length():
                raise ValueError(
                    "A learned prompt goes on from no cache, since the mask of its tokens leaves out virtual ones; "
                    f"pass the whole history without `{name}`."
                )
        try:
            return super().generate(*args, **kwargs)
        finally:
            # PEFT leaves a method on the model where the class has its own.
            vars(self.base_model).pop("prepare_inputs_for_generation", None)

    def prepare_inputs_for_generation(
        self, *args: object, inputs_embeds: Tensor | None = None, padding_id: int | None = None, **kwargs: object
    ) -> Arguments:
        """PEFT's; virtual tokens go into the cache that the model brought along."""
        own = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if padding_id is not None:
            kwargs["padding_id"] = padding_id
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("routing_mask") is not None and inputs.get("inputs_embeds") is not None:
            inputs["routing_mask"] = self._widen(inputs["routing_mask"])
        made = rename_cache(inputs)
        if own is not None and made is not None and made is not own:
            inputs[CACHE] = _into(own, made)
        return inputs


def _into(cache: Cache, prompt: Cache) -> Cache:
    """`cache` with the keys and values of `prompt` in each of its layers."""
    for number, layer in enumerate(prompt.layers):
        if layer.is_initialized:
            cache.update(layer.keys, layer.values, number)
    return cache
