"""The loss of routing keys in fewer bits: measured on the questions that a model asks of its own bank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import attention_msa
from ..model.memory_msa import MemoryBank
from ..ops import recall_of_candidates
from ..ops.formats import scaled_formats


def quantized_recall(
    model: Any,
    bank: MemoryBank,
    inputs: Mapping[str, Tensor],
    kinds: Sequence[str] | None = None,
    candidates: Sequence[int] | None = None,
    backend: str | None = None,
) -> dict[str, dict[int, float]]:
    """The share of the documents that exact keys choose that is among the candidates of quantized keys.

    Args:
        model: a model with a memory.
        bank: of the model, on its device.
        inputs: prompts as `model` takes them; every token that is no padding routes.
        kinds: see `quantize_keys`; default: every format with scales.
        candidates: how many, several. Default: 1, 2, 4 and 8 times the model's top-k, as far as the bank has so many.
        backend: of the operations; default: the first that takes the call.

    Returns:
        kind -> candidates -> recall from 0 to 1 in the memory layer where it is lowest.

    Raises:
        ValueError: where the model's configuration keeps it from routing by the operation that takes quantized keys.
    """
    kinds = scaled_formats() if kinds is None else kinds
    k = max(min(model.config.top_k, len(bank)), 1)
    if candidates is None:
        candidates = [count for count in (k, 2 * k, 4 * k, 8 * k) if count <= max(len(bank), k)]
    worst: dict[str, dict[int, float]] = {}
    route = attention_msa.OPERATIONS["route_documents"]

    def measured(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor, *rest: Any, **options: Any) -> Any:
        given = {"similarity": options["similarity"], "backend": backend}
        for kind in kinds:
            found = recall_of_candidates(queries, mask, keys, offsets, k, kind, candidates, **given)
            lowest = worst.setdefault(kind, found)
            worst[kind] = {count: min(share, lowest[count]) for count, share in found.items()}
        return route(queries, mask, keys, offsets, *rest, **options)

    attention_msa.OPERATIONS["route_documents"] = measured
    try:
        with torch.no_grad():
            model(**inputs, memory=bank, logits_to_keep=1)
    finally:
        attention_msa.OPERATIONS["route_documents"] = route
    if not worst:
        raise ValueError("The model did not route by `route_documents`: it scores documents in another way.")
    return worst
