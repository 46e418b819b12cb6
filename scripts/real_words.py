"""Words as a second teacher: BM25 scores of the passages of a pool for its questions, computed where the pool is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WordRows:
    """The words of texts, one behind the other; numbers of a vocabulary.

    Attributes:
        words: [all words] int32. `starts`: [N + 1] int64.
        weights: [all words] float16, what each adds to the BM25 score of its text; None of questions.
    """

    def __init__(self, words: Tensor, starts: Tensor, weights: Tensor | None = None) -> None:
        self.words, self.starts, self.weights = words, starts, weights

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> WordRows:
        counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
        words = torch.tensor([word for row in rows for word in row], dtype=torch.int32)
        return cls(words, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))

    @classmethod
    def joined(cls, parts: Sequence[WordRows]) -> WordRows:
        counts = torch.cat([part.starts.diff() for part in parts])
        return cls(torch.cat([part.words for part in parts]), torch.nn.functional.pad(counts.cumsum(0), (1, 0)))

    def state(self) -> dict[str, Tensor]:
        found = {"words": self.words, "starts": self.starts}
        return found if self.weights is None else {**found, "weights": self.weights}

    def to(self, where: torch.device) -> WordRows:
        weights = None if self.weights is None else self.weights.to(where)
        return WordRows(self.words.to(where), self.starts.to(where), weights)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the words of `rows` [n], and of each the row's number in `rows`."""
        first, counts = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        owner = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        within = torch.arange(len(owner), device=rows.device) - (counts.cumsum(0) - counts)[owner]
        return first[owner] + within, owner


def word_scores(questions: WordRows, numbers: Tensor, passages: WordRows, places: Tensor) -> Tensor:
    """BM25 scores [Q, N] float32 of passages [N] for questions [Q]: a matrix product over the questions' own words."""
    assert passages.weights is not None
    where, asked = questions.at(numbers)
    known, column = torch.unique(questions.words[where], return_inverse=True)
    if not len(known):
        return torch.zeros(len(numbers), len(places), device=numbers.device)
    wanted = torch.zeros(len(numbers), len(known), device=numbers.device)
    wanted.index_put_((asked, column), torch.ones(len(column), device=numbers.device), accumulate=True)
    where, owner = passages.at(places)
    words = passages.words[where]
    found = torch.searchsorted(known, words).clamp(max=len(known) - 1)
    there = known[found] == words
    held = torch.zeros(len(places), len(known), device=numbers.device)
    held[owner[there], found[there]] = passages.weights[where[there]].float()
    return wanted @ held.T


def fitted_weights(scores: Tensor, gold: Tensor, kinds: Tensor, steps: int = 300) -> Tensor:
    """Weights of systems with which the softmax of their sum is likeliest to hold the gold passages.

    Args:
        scores: [Q, C, S] float32 of each system, of candidates; those that are not there -inf in all.
        gold: [Q, C] bool. `kinds`: [Q] int64, of the question; each kind has weights of its own.

    Returns:
        [kinds, S] float32, none negative. A kind without questions has those of all questions.
    """
    there = scores.isfinite().all(2)
    gold, scores = gold & there, scores.masked_fill(~there[..., None], 0.0)
    usable = gold.any(1)
    scores, gold, kinds, there = scores[usable], gold[usable], kinds[usable], there[usable]
    scale = scores[there].std(0).clamp(min=1e-6)
    scores = scores / scale

    def fit(some: Tensor) -> Tensor:
        raw = torch.ones(scores.shape[2], device=scores.device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=0.05)
        for _ in range(steps):
            total = (scores[some] * torch.nn.functional.softplus(raw)).sum(2)
            held = total.masked_fill(~gold[some], float("-inf")).logsumexp(1)
            loss = (total.masked_fill(~there[some], float("-inf")).logsumexp(1) - held).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.nn.functional.softplus(raw.detach()) / scale

    every = torch.ones_like(kinds, dtype=torch.bool)
    return torch.stack([fit(kinds == kind if (kinds == kind).any() else every) for kind in range(2)])
