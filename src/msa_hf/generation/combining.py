"""Choices of several memory layers: brought to the host, and put into one ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..model.routing_msa import LayerRouting
from .routed_document import RoutedDocument

LAYER_SCORES = ("mean", "max")


def choices_on_host(
    routing: Mapping[int, LayerRouting], device: torch.device
) -> dict[int, list[tuple[list[int], list[float]]]]:
    """Layer -> the positions and scores of the documents of every sample; one copy, for which the device is waited.

    Args:
        routing: of a forward, all layers of the same shape.
        device: where what they have is put together.
    """
    if not routing:
        return {}
    documents = torch.stack([found.documents.to(device) for found in routing.values()])
    scores = torch.stack([found.scores.to(device) for found in routing.values()])
    both = torch.stack([documents, scores.view(torch.int32).long()]).cpu()  # the scores as their bits
    positions, values = both[0].tolist(), both[1].int().view(torch.float32).tolist()
    return {
        layer: list(zip(theirs, their_scores, strict=True))
        for layer, theirs, their_scores in zip(routing, positions, values, strict=True)
    }


def combine_layers(chosen: Mapping[int, Sequence[RoutedDocument]], layer_scores: str) -> list[RoutedDocument]:
    """The union of what the layers chose, best first; equal scores by position.

    Args:
        chosen: layer -> its documents with their scores.
        layer_scores: over the layers, the `"mean"` (a layer that did not choose a document counts with the lowest score
            it reported) or the `"max"`.
    """
    names = {choice.position: choice for documents in chosen.values() for choice in documents}
    by_layer = [
        {choice.position: choice.score for choice in documents if choice.score is not None}
        for documents in chosen.values()
    ]
    if layer_scores == "max":
        best: dict[int, float] = {}
        for scores in by_layer:
            for position, score in scores.items():
                best[position] = max(score, best.get(position, score))
    else:
        totals = dict.fromkeys(names, 0.0)
        for scores in by_layer:
            low = min(scores.values(), default=0.0)
            for position in totals:
                totals[position] += scores.get(position, low)
        best = {position: total / len(by_layer) for position, total in totals.items()}
    order = sorted(names, key=lambda position: (-best[position], position))
    return [RoutedDocument(position, names[position].id, names[position].key, best[position]) for position in order]
