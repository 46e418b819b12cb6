"""Candidates read again: what `train_real.py` trains for it, and the scores that `eval_real.py` takes from it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from real_pools import Pools, shares_of
from torch import Tensor
from transformers import AutoTokenizer

from msa_hf.data.questions import IGNORED
from msa_hf.retrieval.reranking import LONGEST_TEXT, OPENING
from msa_hf.training.ranking import ranking_loss, ranking_row
from msa_hf.training.weights import add_gradients


class Ranker:
    """Labeled questions, each with a passage that answers it and wrong ones, of the teacher and the router."""

    def __init__(self, arguments: argparse.Namespace, pools: Pools) -> None:
        self.count, self.candidates = arguments.ranked, arguments.ranked_candidates
        self.weight, self.pools = arguments.rank_weight, pools
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        self.opening = tokenizer(OPENING, add_special_tokens=False)["input_ids"]

    def step(self, model: Any) -> float:
        """Add the gradients of one batch, in two halves; its mean loss."""
        losses = []
        for _ in range(2):
            ids, labels, right = self._batch(max(self.count // 2, 1))
            loss = ranking_loss(model, ids, labels, right)
            add_gradients(model.parameters(), [0.5 * self.weight * loss])
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def _batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        pools = self.pools
        names = list(pools.of_set)
        numbers = [
            pools.pick.choice(pools.of_set[name]) for name in pools.pick.choices(names, shares_of(names), k=count)
        ]
        gold = [pools.pick.choice(pools.wanted[number]) for number in numbers]
        wrong = self._wrong(numbers)
        rows = []
        for number, place, others in zip(numbers, gold, wrong, strict=True):
            asked = pools.questions.row(number)[:-1]  # without the line break
            kept = list(dict.fromkeys(item for item in others if item not in pools.wanted[number]))
            for item in [place, *kept][: self.candidates]:
                rows.append(ranking_row(pools.passages.row(item), self.opening, asked, LONGEST_TEXT))
            rows += [([0], [IGNORED])] * (self.candidates - len(kept) - 1)
        width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=pools.where)
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for _, row in rows], device=pools.where)
        shape = (count, self.candidates, width)
        return ids.view(shape), labels.view(shape), torch.zeros(count, dtype=torch.long, device=pools.where)

    def _wrong(self, numbers: list[int]) -> list[list[int]]:
        """More passages than needed that may be taken for the right one, in random order; right ones among them."""
        pools = self.pools
        labeled = torch.tensor(numbers, device=pools.where)
        scores = (pools.questions_near[labeled] @ pools.near.T).masked_fill(~pools.allowed, -1)
        found = [scores.topk(min(pools.arguments.near, scores.shape[1]), dim=1).indices]
        if pools.mined is not None:
            found.append(pools.mined.labeled[labeled])
        best = [item.gather(1, torch.rand(item.shape, device=pools.where).argsort(1)) for item in found]
        half = [item[:, : self.candidates + 8] for item in best]
        rows = torch.cat(half, dim=1)
        rows = rows.gather(1, torch.rand(rows.shape, device=pools.where).argsort(1)).tolist()
        return [[place for place in row if place >= 0] for row in rows]
