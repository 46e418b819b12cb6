"""What `eval_real.py` measures alike for every way to retrieve: questions, nested banks, recall, fusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from real_pools import is_held_out
from torch import Tensor

AT = (1, 5, 10)


def asked_questions(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The development questions, then the labeled ones that training left out."""
    held = [item for number, item in enumerate(data["train"]["questions"]) if is_held_out(number)]
    return [
        *({**item, "split": "dev"} for item in data["dev"]["questions"]),
        *({**item, "split": "fit"} for item in held),
    ]


def bank_limits(lengths: np.ndarray, sets: int, sizes: str) -> dict[str, int]:
    """Size such as `5M` -> passages of a bank of so many tokens at most; the first bank holds all sets."""
    ends = np.cumsum(lengths)
    found = {}
    for place, size in enumerate(sizes.split(",")):
        count = int(np.searchsorted(ends, float(size) * 1_000_000))
        found[f"{size}M"] = sets if place == 0 else min(count, len(lengths))
    return found


def recalls(best: np.ndarray, questions: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Set -> recall of any gold document, and of all of them, among the best passages [Q, n]."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({question["set"] for question in questions}):
        rows = [number for number, question in enumerate(questions) if question["set"] == kind]
        item: dict[str, float] = {"questions": len(rows)}
        for k in AT:
            hits = [hit_groups(best[number, :k], questions[number]) for number in rows]
            item[f"any@{k}"] = float(np.mean([any(row) for row in hits]))
            item[f"all@{k}"] = float(np.mean([all(row) for row in hits]))
        found[kind] = item
    return found


def hit_groups(best: np.ndarray, question: dict[str, Any]) -> list[bool]:
    """For every gold document whether one of its passages is among the best."""
    chosen = set(best.tolist())
    return [any(place in chosen for place in group) for group in question["wanted"]]


def interval(hits: list[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by bootstrap over questions."""
    values = np.asarray(hits, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def absent_last(scores: Tensor) -> Tensor:
    """[Q, C] scores of a system's candidates as distances below its best in units of its spread; absent ones (NaN)
    stand a fifth below its last."""
    filled = scores.masked_fill(scores.isnan(), float("-inf"))
    best = filled.amax(1, keepdim=True)
    kept = torch.where(scores.isnan(), best, scores)
    lowest = kept.amin(1, keepdim=True)
    spread = (best - lowest).clamp(min=1e-6)
    return torch.where(scores.isnan(), torch.full_like(scores, -1.2), (scores - best) / spread)


class Fusion(torch.nn.Module):
    """A learned ranking of candidates by what several systems say of them.

    A candidate's score is a weighted sum of, per system, its distance below the best and its reciprocal rank. The
    weights of a question depend on how sure each system is: the gap behind its best candidate.

    Args:
        systems: how many.
    """

    def __init__(self, systems: int) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.full((systems,), 5.0))
        self.reciprocal = torch.nn.Parameter(torch.full((systems,), 10.0))
        self.gate = torch.nn.Parameter(torch.zeros(systems, 2 * systems + 1))

    @staticmethod
    def features(scores: list[Tensor], words: Tensor) -> tuple[Tensor, Tensor]:
        """[Q, C, 2 S] features of candidates and [Q, 2 S + 1] of questions; `words` [Q], how many a question has."""
        levels, ranks, gaps = [], [], []
        for item in scores:
            level = absent_last(item)
            place = item.nan_to_num(float("-inf"), float("-inf"), float("-inf")).argsort(1, descending=True).argsort(1)
            levels.append(level)
            ranks.append(torch.where(item.isnan(), torch.zeros_like(level), 1.0 / (5 + place)))
            ordered = level.sort(1, descending=True).values
            gaps += [-ordered[:, 1], -ordered[:, min(10, ordered.shape[1] - 1)]]
        return torch.stack(levels + ranks, 2), torch.stack([*gaps, words.float().log()], 1)

    def forward(self, candidates: Tensor, question: Tensor) -> Tensor:
        systems = len(self.level)
        weight = torch.exp((question @ self.gate.T).clamp(-3, 3))
        levels, ranks = candidates[..., :systems], candidates[..., systems:]
        return ((levels * self.level + ranks * self.reciprocal) * weight[:, None]).sum(2)


def fit_fusion(candidates: Tensor, question: Tensor, positives: Tensor, weights: Tensor, steps: int = 400) -> Fusion:
    """Fit on questions that have a gold passage among their candidates.

    Args:
        candidates, question: of `Fusion.features`. positives: [Q, C] bool. weights: [Q], of the questions.
    """
    model = Fusion(candidates.shape[2] // 2).to(candidates.device)
    kept = positives.any(1)
    candidates, question, positives = candidates[kept], question[kept], positives[kept]
    weights = weights[kept] / weights[kept].sum()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    with torch.enable_grad():
        for _ in range(steps):
            scores = model(candidates, question)
            right = scores.masked_fill(~positives, float("-inf")).logsumexp(1)
            loss = ((scores.logsumexp(1) - right) * weights).sum() + 1e-3 * model.gate.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
