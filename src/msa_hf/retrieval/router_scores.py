"""Router scores of all documents for questions, without generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.padding import pad
from ..generation import PromptProtocol
from ..generation.prompting import prompting_of
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..model.positions_msa import position_limit


class QueryTooLong(ValueError):
    """A query of more tokens than the model has positions for."""


@dataclass(frozen=True)
class RouterScores:
    """Scores of all documents for a batch of B questions.

    Attributes:
        layers: layer -> [B, N] float32.
    """

    layers: dict[int, Tensor]

    @property
    def mean(self) -> Tensor:
        """[B, N] float32, the mean over the layers."""
        return torch.stack(list(self.layers.values())).mean(0)

    def rank(self, layer: int, question: int, position: int) -> tuple[int, float]:
        """Rank from 1, and score, of a document in a layer; equal scores go to the lower position."""
        scores = self.layers[layer][question]
        score = scores[position]
        before = (scores > score).sum() + (scores[:position] == score).sum()
        return int(before) + 1, float(score)


def router_scores(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    bank: MemoryBank,
    questions: Sequence[str],
    protocol: PromptProtocol | None,
) -> RouterScores:
    """Put questions to a model with a memory, as it would be asked to answer them, and take what its routers score.

    Args:
        model: `MSAForCausalLM`.
        questions: B of them, as one batch.
        protocol: whose prompt puts the question; None: the chat template, else the training prompt (`prompting_of`).

    Raises:
        QueryTooLong: for a question of more tokens than the model has positions for.
    """
    prompting = prompting_of(tokenizer, protocol)
    rows = [prompting.prompt(question) for question in questions]
    positions, longest = position_limit(model.config), max(len(ids) for ids, _ in rows)
    if positions is not None and longest > (room := positions - model.config.first_position):
        raise QueryTooLong(
            f"A query has {longest} tokens as it is put to the model, which has positions for {room}: shorten it, or "
            "search by words or vectors."
        )
    with torch.no_grad(), evaluating(model):
        routing = model(
            input_ids=pad([ids for ids, _ in rows], 0, left=True).to(model.device),
            attention_mask=pad([[1] * len(ids) for ids, _ in rows], 0, left=True).to(model.device),
            routing_mask=pad([[int(item) for item in routes] for _, routes in rows], 0, left=True)
            .bool()
            .to(model.device),
            memory=bank,
            output_document_scores=True,
            use_cache=False,
            logits_to_keep=1,
        ).routing
    return RouterScores({layer: found.document_scores for layer, found in routing.items()})
