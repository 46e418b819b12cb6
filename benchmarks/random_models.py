"""Models of random weights, for benchmarks: what they compute means nothing, what it costs is that of a real one."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 8192,  # of msa-hf-tiny's tokenizer
    },
}


def random_base(shape: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> Any:
    """A plain model of the Qwen3 family, the same for every call with these arguments.

    Args:
        shape: fields of its configuration, as in `SHAPES`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", max_position_embeddings=8192, tie_word_embeddings=True, **shape)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """The options of a model's shape, which are those of "4b" unless given; `shape_of` reads them."""
    parser.add_argument("--layers", type=int, default=18, help="memory layers; the model has twice as many layers")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--hidden-size", type=int, default=2560)
    parser.add_argument("--intermediate-size", type=int, default=9728)
    parser.add_argument("--vocabulary", type=int, default=151936)


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """The shape that options ask for, for `random_base`."""
    return {
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": 2 * options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.groups,
        "head_dim": options.head_dim,
        "vocab_size": options.vocabulary,
    }
