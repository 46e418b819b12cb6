"""The auxiliary loss that trains the routers (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration_msa import MSAConfig


def positive_mask(positive_docs: Tensor, present: Tensor) -> Tensor:
    """The positives of every sample.

    Args:
        positive_docs: [B, P] int64 document numbers, padded with -1.
        present: [B, N] bool, documents that a sample has.

    Returns:
        [B, N] bool.

    Raises:
        ValueError: for a document that a sample does not have, naming both.
    """
    batch, count = present.shape
    if positive_docs.numel() == 0:
        positive_docs = positive_docs.long()  # of no numbers, which torch takes for floats
    if positive_docs.dim() != 2 or positive_docs.shape[0] != batch or positive_docs.is_floating_point():
        raise ValueError(
            f"`positive_docs` must be [{batch}, n] document numbers from 0, padded with -1, got "
            f"{list(positive_docs.shape)} of {positive_docs.dtype}."
        )
    inside = (positive_docs >= 0) & (positive_docs < count)
    inside &= present.gather(1, positive_docs.clamp(0, count - 1))
    if not bool((inside | (positive_docs == -1)).all()):
        sample, place = (~inside & (positive_docs != -1)).nonzero()[0].tolist()
        raise ValueError(
            f"`positive_docs` of sample {sample} names document {int(positive_docs[sample, place])}, but its documents "
            f"are {_ranges(present[sample])}; numbers count from 0, -1 stands for none."
        )
    mask = torch.zeros(batch, count + 1, dtype=torch.bool, device=positive_docs.device)
    return mask.scatter(1, torch.where(positive_docs < 0, count, positive_docs), True)[:, :count]


def _ranges(present: Tensor) -> str:
    numbers = present.nonzero().flatten().tolist()
    if not numbers:
        return "none"
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) == numbers[-1] - numbers[0] + 1 else str(numbers)


def router_loss(
    scores: Tensor, positives: Tensor, temperature: float = 0.1, form: str = "infonce_decoupled", gamma: float = 2.0
) -> Tensor:
    """Contrastive loss of one layer's document scores (paper, Eq. 5), per sample.

    With z = s / temperature, over the positives i of a sample:
    `infonce_decoupled`: mean of -log(e^z_i / (e^z_i + sum over negatives e^z_n)), positives do not compete;
    `infonce`: mean of -log(e^z_i / sum over all e^z). The focal forms weigh each term by (1 - p)^gamma.

    Args:
        scores: [B, N] float, -inf for documents that a sample does not see.
        positives: [B, N] bool.

    Returns:
        [B] float32, 0 for samples without positives.
    """
    seen = ~torch.isneginf(scores)
    logits = torch.where(seen, scores.float(), 0.0) / temperature
    rivals = seen & ~positives if form.startswith("infonce_decoupled") else seen
    # A finite stand-in for -inf keeps gradients finite where a sample has no rival at all.
    rest = logits.masked_fill(~rivals, -1e9).logsumexp(1, keepdim=True)
    if form.startswith("infonce_decoupled"):
        terms = torch.nn.functional.softplus(rest - logits)
    else:
        terms = rest - logits
    if form.endswith("focal"):
        terms = terms * (-torch.expm1(-terms)).clamp(min=0) ** gamma
    chosen = positives & seen
    return torch.where(chosen, terms, 0.0).sum(1) / chosen.sum(1).clamp(min=1)


def auxiliary_loss(
    document_scores: Mapping[int, Tensor],
    positives: Tensor,
    config: MSAConfig,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean of `router_loss` over (layer of `config.aux_layers`, sample with positives).

    Under gradient accumulation (`num_items_in_batch`, the labeled tokens of all micro-batches together) each sample
    counts by its share of those tokens instead, so that the micro-batches' losses add up to the same whatever their
    size. Tokens are counted as the language-model loss counts them: the first of a row has no prediction.

    Args:
        document_scores: layer -> [B, N] float32.
        positives: [B, N] bool.
        config: MSAConfig.
        labels: [B, T], needed with `num_items_in_batch`.
    """
    losses = torch.stack(
        [
            router_loss(
                document_scores[layer],
                positives.to(document_scores[layer].device),
                config.aux_temperature,
                config.aux_loss,
                config.focal_gamma,
            ).to(positives.device)
            for layer in config.aux_layers
        ]
    ).mean(0)
    if num_items_in_batch is not None and labels is not None:
        share = (labels[:, 1:] != -100).sum(1) / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
        return (losses * share.to(losses.device)).sum()
    seen = ~torch.isneginf(document_scores[config.aux_layers[0]])
    samples = (positives.to(seen.device) & seen).any(1).to(losses.device)
    return losses.masked_fill(~samples, 0.0).sum() / samples.sum().clamp(min=1)
