"""Tiny configurations of the families that the peers' suites run on, plain and with a memory."""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

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
DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17], [18, 19, 20, 21, 22]]


def plain_config(family: str) -> PreTrainedConfig:
    """The configuration of the plain model."""
    kind, fields, *_ = FAMILIES[family]
    return AutoConfig.for_model(kind, **COMMON, **fields)


def plain_classes(family: str) -> tuple[type, type]:
    """Headless model and causal LM of transformers."""
    *_, model, causal_lm = FAMILIES[family]
    return getattr(transformers, model), getattr(transformers, causal_lm)


def memory_config(family: str) -> MSAConfig:
    """The configuration of the same model with a memory, of which every layer takes two documents."""
    kind, fields, *_ = FAMILIES[family]
    return MSAConfig(base_model_type=kind, chunk_size=2, top_k=2, **COMMON, **fields)
