"""Tiny configurations of the families that the peers' suites run on, plain and with a memory."""

from typing import Any

import memory_bound
import transformers
from transformers import AutoConfig, PreTrainedConfig

import msa_hf
from msa_hf import MSAConfig

COMMON: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRID: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}

# Family -> its `model_type`, what its configuration needs besides, and the classes of its headless model and causal LM.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "Llama": ("llama", {}, "LlamaModel", "LlamaForCausalLM"),
    "Qwen3": ("qwen3", {}, "Qwen3Model", "Qwen3ForCausalLM"),
    "Gemma2": ("gemma2", HYBRID, "Gemma2Model", "Gemma2ForCausalLM"),
    "Gemma3": ("gemma3_text", HYBRID, "Gemma3TextModel", "Gemma3ForCausalLM"),
}


# Transformers' own classes; ours as users name them, and as they are made for a family; and those with a memory bound.
FORMS = ("plain", "generic", "made", "memory")


def classes(family: str, form: str) -> tuple[type, type]:
    """Headless model and causal LM."""
    kind, _, model, causal_lm = FAMILIES[family]
    if form == "plain":
        return getattr(transformers, model), getattr(transformers, causal_lm)
    if form == "generic":
        return msa_hf.MSAModel, msa_hf.MSAForCausalLM
    home = msa_hf if form == "made" else memory_bound
    return home.MSAModel.class_for(kind), home.MSAForCausalLM.class_for(kind)


def arguments(family: str, form: str) -> dict[str, Any]:
    """The fields of a configuration; with a memory, every layer takes two documents."""
    kind, fields, *_ = FAMILIES[family]
    memory = {} if form == "plain" else {"base_model_type": kind, "chunk_size": 2, "top_k": 2}
    return {**COMMON, **fields, **memory}


def config(family: str, form: str) -> PreTrainedConfig:
    """The configuration of a model."""
    if form == "plain":
        return AutoConfig.for_model(FAMILIES[family][0], **arguments(family, form))
    return MSAConfig(**arguments(family, form))
