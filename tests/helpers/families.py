"""Tiny random models of every family that the battery covers."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen3_moe": {**HEADS, **MIXTURE},
    "mistral": {**HEADS, "sliding_window": None},
    "gemma2": {**HEADS, **HYBRID, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEADS, **HYBRID, "query_pre_attn_scalar": 8},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": {**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "gpt_oss": {**HEADS, **HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "starcoder2": {**GROUPED, "sliding_window": None},
}


def base_config(family: str, **overrides: Any) -> Any:
    """The configuration of a tiny model of `family`."""
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})


def base_model(family: str, seed: int = 0, scale: float = 0.15, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `family` in float32 with random weights large enough that attention is not uniform.

    Args:
        scale: standard deviation of the weight matrices.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(base_config(family, **overrides)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0.0, scale, generator=generator)
            elif "sinks" in name or "bias" in name:
                parameter.normal_(0.0, 0.5, generator=generator)
    return model
