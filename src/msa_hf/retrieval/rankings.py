"""Lists of documents with scores as each way of searching gives them, and where documents stand on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Ranking: TypeAlias = Sequence[tuple[int, float]]  # documents and scores, best first
Candidates: TypeAlias = Mapping[str, Ranking]  # way -> its list


def ranks_of(ranking: Ranking, documents: Sequence[int]) -> Tensor:
    """[documents] float64, places from 0 in the list; infinite for those that are not on it."""
    places = {document: float(place) for place, (document, _) in enumerate(ranking)}
    return torch.tensor([places.get(document, float("inf")) for document in documents], dtype=torch.float64)


def scores_of(ranking: Ranking) -> tuple[Tensor, float]:
    """The scores of a list, float64, and their spread, 1 where they have none."""
    scores = torch.tensor([score for _, score in ranking] or [0.0], dtype=torch.float64)
    return scores, float(scores.std(correction=0)) or 1.0


def standing(ranking: Ranking, documents: Sequence[int]) -> Tensor:
    """[documents] float64, the scores as standard deviations above the mean of the list; a document that is not on it
    has the lowest of the list, less one."""
    scores, spread = scores_of(ranking)
    ranks = ranks_of(ranking, documents)
    own = scores[torch.where(ranks.isfinite(), ranks, len(scores) - 1).long()]
    return (own - scores.mean()) / spread - (~ranks.isfinite()).double()
