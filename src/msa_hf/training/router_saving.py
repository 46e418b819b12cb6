"""Trained routers and low-rank updates as an adapter of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model.modeling_msa import MSAForCausalLM
from .adapter_memory import save_adapter_memory
from .weights import TrainedWeights


def save_adapter(model: MSAForCausalLM, weights: TrainedWeights, rank: int, output: Path) -> None:
    """Write what was trained as an adapter; the model gets its base's weights back, and adapters beside them.

    Args:
        model: with a memory.
        weights: what was trained of it.
        rank: of most updates.
        output: directory.

    Raises:
        ImportError: where peft is missing.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("An adapter needs peft: pip install msa-hf[train]") from error
    from .peft import peft_config

    ranks = {name: item.down.shape[0] for name, item in weights.low_rank.items()}
    others = {name: other for name, other in ranks.items() if other != rank}
    for item in weights.low_rank.values():
        item.weight.data.copy_(item.base)
    model.requires_grad_(False)
    configuration = peft_config(
        model,
        r=rank,
        lora_alpha=round(weights.alpha_per_rank * rank),
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern={name: round(weights.alpha_per_rank * other) for name, other in others.items()},
    )
    tuned: Any = get_peft_model(model, configuration)
    for name, item in weights.low_rank.items():
        layer = tuned.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(item.down)
        layer.lora_B["default"].weight.data.copy_(item.up)
    tuned.save_pretrained(output)
    save_adapter_memory(model.config, output)


def adapter_expression(model: MSAForCausalLM, base: str, output: Path, retrofit: bool) -> str:
    """The expression that loads an adapter on its base.

    Args:
        model: that it was trained on.
        base: its checkpoint.
        output: directory of the adapter.
        retrofit: the checkpoint has a memory.
    """
    names = ["top_k", "chunk_size", "query_reduction", "routers_trained"]
    make = "from_pretrained" if retrofit else "from_base"
    fields = ", ".join(
        f"{name}={getattr(model.config, name)!r}" for name in (names if retrofit else ["memory_layers", *names])
    )
    return f"PeftModel.from_pretrained(MSAForCausalLM.{make}({base!r}, {fields}), {str(output)!r})"
