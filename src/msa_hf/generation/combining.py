"""One ranking of the documents that several memory layers chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .routed_document import RoutedDocument

LAYER_SCORES = ("mean", "max")


def combine_layers(chosen: Mapping[int, Sequence[RoutedDocument]], layer_scores: str) -> list[RoutedDocument]:
    """The union of what the layers chose, best first; equal scores by position.

    Args:
        chosen: layer -> its documents with their scores.
        layer_scores: over the layers, the `"mean"` (a layer that did not choose a document counts with the lowest score
            it reported) or the `"max"`.
    """
    names: dict[int, RoutedDocument] = {}
    by_layer: list[dict[int, float]] = []
    for documents in chosen.values():
        names |= {choice.position: choice for choice in documents}
        by_layer.append({choice.position: choice.score for choice in documents if choice.score is not None})
    lowest = [min(scores.values(), default=0.0) for scores in by_layer]

    def score(position: int) -> float:
        if layer_scores == "max":
            return max(scores[position] for scores in by_layer if position in scores)
        return sum(scores.get(position, low) for scores, low in zip(by_layer, lowest, strict=True)) / len(by_layer)

    union = [RoutedDocument(item.position, item.id, item.key, score(position)) for position, item in names.items()]
    return sorted(union, key=lambda item: (-(item.score or 0.0), item.position))
