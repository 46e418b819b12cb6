"""Learning to read candidates again: the question is to be likelier behind the text that answers it than behind others.

`msa_hf.retrieval.QueryLikelihood` scores with what is learned here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.questions import IGNORED
from ..model.known_masks_msa import ones_like
from ..model.modeling_msa import MSAForCausalLM


def ranking_row(
    text: Sequence[int], opening: Sequence[int], question: Sequence[int], longest: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels: the text, cut to `longest` tokens, the opening, and the question, which has labels."""
    given = [*text[:longest], *opening]
    return [*given, *question], [IGNORED] * len(given) + list(question)


def ranking_loss(
    model: MSAForCausalLM, ids: Tensor, labels: Tensor, right: Tensor, likelihood_weight: float = 0.1
) -> Tensor:
    """Cross entropy of the right text among the candidates of each question, with the likelihood of the right ones.

    Args:
        model: reads without a memory.
        ids, labels: [Q, C, T] int64, right-padded; a candidate without labels does not take part.
        right: [Q] int64, which candidate answers the question.
        likelihood_weight: of the mean negative log-likelihood of a question's token behind its right text.

    Returns:
        Scalar float32.
    """
    count, candidates, width = ids.shape
    flat_ids, flat_labels = ids.view(-1, width), labels.view(-1, width)
    output = model.run_base(backbone_only=True, input_ids=flat_ids, attention_mask=ones_like(flat_ids), use_cache=False)
    wanted = flat_labels[:, 1:] != IGNORED
    logits = model.get_output_embeddings()(output.last_hidden_state[:, :-1][wanted])
    losses = torch.nn.functional.cross_entropy(logits.float(), flat_labels[:, 1:][wanted], reduction="none")
    rows = wanted.nonzero()[:, 0]
    sums = torch.zeros(len(flat_ids), device=ids.device).index_add(0, rows, losses).view(count, candidates)
    tokens = wanted.sum(1).view(count, candidates)
    scores = (-sums).masked_fill(tokens == 0, float("-inf"))
    of_right = torch.arange(count, device=ids.device), right
    return (
        torch.nn.functional.cross_entropy(scores, right)
        + likelihood_weight * (sums[of_right] / tokens[of_right].clamp(min=1)).mean()
    )
