"""The weight of the routers' scores in the attention to chosen documents, chosen on a large bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.attention_msa import ScoreBias
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from .diagnosis import diagnose
from .recall import JudgedFields

FACTORS = (1.0, 2.0, 4.0, 8.0)


def sharpen_score_bias(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    bank: MemoryBank,
    questions: Sequence[JudgedFields],
    protocol: PromptProtocol,
    factors: Sequence[float] = FACTORS,
    slack: float = 0.005,
    **options: Any,
) -> list[dict[str, float]]:
    """Multiply the learned score biases (`MSAConfig.score_bias`) by the factor that serves this bank best.

    The larger the bank, the nearer the documents that a question chooses lie to each other, and the softer the
    attention to the best of them. Biases learned over pools of a thousand documents are then too small: the model still
    routes, but blends what it read. Each factor is measured by `diagnose`: ids of the first round, named freely and
    constrained, and answers. The smallest factor whose mean over the three is within `slack` of the best is kept.
    Nothing else changes, so banks stay valid: they do not depend on the biases.

    Args:
        model: with a memory and score biases; changed in place.
        tokenizer: of the model.
        bank: as large as those that the model is meant for, of documents that were not set aside for testing.
        questions: as `diagnose` takes them, with positives; 100 or more.
        protocol: that wrapped the documents.
        factors: to try, of the biases as they are.
        slack: of the mean share, from 0 to 1.
        options: of `diagnose`.

    Returns:
        For each factor, in ascending order: `factor`, the shares of right first rounds `generate` and `constrained`,
        that of exact answers `routed`, their `mean`, and whether it was `kept` (1.0 or 0.0).

    Raises:
        ValueError: for a model without score biases, for no factors or one that is not positive; and as `diagnose`.
    """
    biases = [module for module in model.modules() if isinstance(module, ScoreBias)]
    if not biases:
        raise ValueError("The model has no score biases: retrofit it with `score_bias=True`.")
    if not factors or min(factors) <= 0:
        raise ValueError(f"`factors` must be positive numbers, got {list(factors)}.")
    learned = [module.weight.detach().clone() for module in biases]

    def scale(factor: float) -> None:
        for module, weight in zip(biases, learned, strict=True):
            module.weight.data.copy_(weight * factor)

    rows: list[dict[str, float]] = []
    kept = 1.0
    try:
        for factor in sorted(factors):
            scale(factor)
            found = diagnose(model, tokenizer, bank, questions, protocol, conditions=["routed", "ids"], **options)
            shares = {naming: found.ids[naming]["all"] for naming in ("generate", "constrained")}
            shares["routed"] = found.answers["routed"]["all"].exact
            rows.append({"factor": factor, **shares, "mean": sum(shares.values()) / len(shares)})
        best = max(row["mean"] for row in rows)
        kept = next(row["factor"] for row in rows if row["mean"] >= best - slack)
    finally:
        scale(kept)  # the biases as they were where a measurement failed
    return [{**row, "kept": float(row["factor"] == kept)} for row in rows]
