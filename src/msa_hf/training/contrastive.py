"""Routers trained on pools of thousands of documents, in the memory that a few hundred need.

The loss sees all documents of a pool, but what a backward keeps is that of one part of it: the pool is encoded without
a graph, the loss gives the gradients of its routing keys, and each part is encoded again to carry them on (gradient
caching: Gao et al., arXiv 2101.06983). Encoding and routing are the library's own passes, so that a bank encoded with
the trained weights routes as trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.attention_msa import AttendingPass, EncodingDone, EncodingPass, MemoryPass
from ..model.cache_msa import MemoryContext
from ..model.configuration_msa import MSAConfig
from ..model.dense_layer_msa import DenseLayer, layers_over
from ..model.known_masks_msa import ones_like
from ..model.memory_msa import LayerMemory
from ..model.modeling_msa import MSAForCausalLM
from ..model.routing_msa import Selection, routing_request, scoring_of
from .sharing import count_rows, gather_rows, own_rows, sum_over_processes
from .weights import add_gradients


@dataclass(frozen=True)
class TokenRows:
    """Right-padded token rows.

    Attributes:
        ids: [N, L] int64.
        lengths: [N] int64, at least 1.
        skipped: tokens of every question that stand before the first that routes.
    """

    ids: Tensor
    lengths: Tensor
    skipped: int = 0

    @cached_property
    def host_lengths(self) -> Tensor:
        """`lengths` on the CPU; the device is waited for once."""
        return self.lengths.cpu()

    @property
    def mask(self) -> Tensor:
        """[N, L] bool, tokens that are there."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def routes(self) -> Tensor:
        """[N, L] bool, tokens that choose documents."""
        return self.mask & (torch.arange(self.ids.shape[1], device=self.ids.device) >= self.skipped)


class RoutingPass(AttendingPass):
    """Routes questions and ends with the last memory layer's scores: nothing behind them is computed."""

    def _gather(
        self, module: nn.Module, memory: LayerMemory, selection: Selection, query: Tensor, dtype: torch.dtype
    ) -> MemoryContext:
        if module.layer_idx == self.config.memory_layers[-1]:
            raise EncodingDone
        return super()._gather(module, memory, selection, query, dtype)


class Temperatures(nn.Module):
    """Learned temperatures of the scores: one of the layers' sum, one of each layer; [1 + layers] float32.

    Args:
        layers: memory layers.
        first: at the beginning.
        lowest: below which they do not fall.
    """

    def __init__(self, layers: int, first: float = 0.05, lowest: float = 0.005) -> None:
        super().__init__()
        self.lowest = lowest
        self.logarithm = nn.Parameter(torch.full((1 + layers,), first).log())

    def forward(self) -> Tensor:
        return self.logarithm.exp().clamp(min=self.lowest)


def encode_rows(model: MSAForCausalLM, rows: TokenRows) -> dict[int, DenseLayer]:
    """`model.encode_batch` of rows, with gradients where they are enabled, as it routes in training."""
    encoding = EncodingPass(model.config, rows.host_lengths, training_similarity(model.config), stop=True)
    run_rows(model, rows, torch.arange(rows.ids.shape[1], device=rows.ids.device), encoding)
    return encoding.finish()


def route_rows(
    model: MSAForCausalLM, questions: TokenRows, pool: Mapping[int, DenseLayer], lengths: Tensor
) -> dict[int, Tensor]:
    """Layer -> scores [Q, N] float32 of a pool's documents, as the library's routing computes them.

    Args:
        questions: whose tokens all route, but for those skipped.
        pool: layer -> what the memory layers hold of the documents, in order.
        lengths: [N] int64, tokens of the documents.
    """
    config = model.config
    routing = RoutingPass(
        config=config,
        layers=layers_over(pool, lengths, config.chunk_size),
        prefix={},
        request=routing_request(
            config, scoring_of(config, training_similarity(config)), questions.routes, len(lengths), all_scores=True
        ),
    )
    positions = torch.arange(questions.ids.shape[1], device=questions.ids.device) + config.first_position
    run_rows(model, questions, positions, routing)
    found = routing.finish()
    return {layer: item.document_scores for layer, item in found.items() if item.document_scores is not None}


def training_similarity(config: MSAConfig) -> str:
    """The similarity by which routers are trained."""
    return config.training_similarity or config.similarity


def run_rows(model: MSAForCausalLM, rows: TokenRows, positions: Tensor, memory_pass: MemoryPass) -> None:
    """Run the base over rows, up to where the pass ends it.

    Args:
        positions: [L] int64.
    """
    with contextlib.suppress(EncodingDone):
        model.run_base(
            backbone_only=True,
            input_ids=rows.ids,
            attention_mask=ones_like(rows.ids),  # padding stands where causal attention does not look
            position_ids=positions[None],  # those of every row, so that their rotations are read once for all
            use_cache=False,
            memory_pass=memory_pass,
        )


def soft_targets(positives: Tensor, teacher: Tensor | None, share: Tensor | float = 0.0) -> Tensor:
    """The distribution over documents that a question should have: [Q, N] float32, rows that sum to 1.

    Args:
        positives: [Q, N] bool, at least one per row; they share evenly.
        teacher: [Q, N] logits of a teacher, None for none.
        share: of the teacher, per question ([Q]) or of all.
    """
    hard = positives / positives.sum(1, keepdim=True).clamp(min=1)
    if teacher is None:
        return hard
    share = torch.as_tensor(share, device=hard.device, dtype=hard.dtype).reshape(-1, 1)
    return (1 - share) * hard + share * teacher.softmax(1)


def pool_loss(
    scores: Mapping[int, Tensor],
    targets: Tensor,
    temperatures: Tensor,
    layer_weight: float = 0.5,
    document_weight: float = 0.0,
) -> Tensor:
    """Cross entropy of the targets with the scores, summed over layers and of each layer alone.

    Args:
        scores: layer -> [Q, N] float32.
        targets: [Q, N], of `soft_targets`.
        temperatures: [1 + layers], of `Temperatures`.
        layer_weight: weight of the mean over single layers beside the sum's loss; not counted where there is one layer.
        document_weight: weight of the other direction: among all questions those that a document answers. It keeps
            single documents from being near to every question.

    Returns:
        Scalar float32.
    """
    total = torch.stack(list(scores.values())).sum(0) / temperatures[0]
    loss = -(targets * total.log_softmax(1)).sum(1).mean()
    if document_weight:
        owned = targets * (targets > 0.2)
        share = owned.sum(0)
        asked = share > 0
        backward = -(owned / share.clamp(min=1e-6) * total.log_softmax(0)).sum(0)
        loss = loss + document_weight * backward[asked].mean()
    if layer_weight and len(scores) > 1:
        single = [
            -(targets * (item / temperature).log_softmax(1)).sum(1).mean()
            for item, temperature in zip(scores.values(), temperatures[1:], strict=True)
        ]
        loss = loss + layer_weight * torch.stack(single).mean()
    return loss


@dataclass(frozen=True)
class PoolResult:
    """The findings of a step.

    Attributes:
        loss: scalar float32, detached.
        hits: share of the questions whose best-scored document has the largest target.
        pool: layer -> what memory layers hold of the pool, detached, for losses that read from it.
        lengths: [N] int64 of the pool's documents, in its order.
    """

    loss: Tensor
    hits: Tensor
    pool: dict[int, DenseLayer]
    lengths: Tensor


def contrastive_step(
    model: MSAForCausalLM,
    documents: Sequence[TokenRows],
    questions: Sequence[TokenRows],
    targets: Tensor,
    temperatures: Temperatures,
    layer_weight: float = 0.5,
    document_weight: float = 0.0,
    group: dist.ProcessGroup | None = None,
    held_tokens: int = 0,
) -> PoolResult:
    """Add the gradients of one pool's loss to those of the model.

    With a process group the pool is that of all processes: each brings documents of its own, and its questions are
    scored against the documents of all. The mean of the processes' gradients is then that of the mean of their losses.

    Args:
        model: with a memory, no dropout and no prefix.
        documents: parts of the pool; one part's graph is held at a time, but for those of `held_tokens`.
        questions: parts of the questions; the graphs of all are held.
        targets: [Q, N], questions and documents in the order of the parts; with a group, the documents of all processes
            in order of ranks.
        temperatures, layer_weight, document_weight: as `pool_loss` takes them.
        group: of the processes that share a pool. None: this one alone.
        held_tokens: tokens, with padding, whose graphs may be held at a time. The last parts that have no more of them,
            together with all questions, are encoded once.
    """
    held_from = first_held(documents, questions, held_tokens)
    for rows in documents:
        _ = rows.host_lengths  # before there is anything to wait for
    parts = []
    for number, rows in enumerate(documents):
        with torch.set_grad_enabled(number >= held_from):
            parts.append(encode_rows(model, rows))
    layers = list(parts[0])
    lengths = gather_rows(torch.cat([rows.lengths for rows in documents]), group)
    chunks = count_rows(torch.cat([part[layers[0]].routing_keys for part in parts]), group)
    leaves = {}
    for layer in layers:
        keys = gather_rows(torch.cat([part[layer].routing_keys.detach() for part in parts]), group, chunks)
        pooled = gather_rows(torch.cat([part[layer].pooled_kv.detach() for part in parts]), group, chunks)
        leaves[layer] = DenseLayer(keys.requires_grad_(), pooled.requires_grad_(layer != layers[-1]))
    asked = [route_rows(model, rows, leaves, lengths) for rows in questions]
    scores = {layer: torch.cat([item[layer] for item in asked]) for layer in layers}
    loss = pool_loss(scores, targets, temperatures(), layer_weight, document_weight)
    parameters = list(model.parameters())
    of_pool = [tensor for leaf in leaves.values() for tensor in (leaf.routing_keys, leaf.pooled_kv)]
    add_gradients([*parameters, *temperatures.parameters(), *of_pool], [loss])
    with torch.no_grad():
        total = torch.stack(list(scores.values())).sum(0)
        best = total.argmax(1, keepdim=True)
        hits = (targets.gather(1, best).squeeze(1) >= targets.amax(1)).float().mean()
    wanted = [leaf.routing_keys for leaf in leaves.values()] + [leaves[layer].pooled_kv for layer in layers[:-1]]
    for tensor in wanted:
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        # The questions of other processes have gradients for these documents too.
        sum_over_processes([tensor.grad], group)
    stop = own_rows(chunks, group).stop
    # The last first, so that what is held goes before more is.
    for number in reversed(range(len(parts))):
        part = parts.pop()
        start = stop - part[layers[0]].routing_keys.shape[0]
        again = part if number >= held_from else encode_rows(model, documents[number])
        tensors, gradients = [], []
        for layer, leaf in leaves.items():
            for made, kept in (
                (again[layer].routing_keys, leaf.routing_keys),
                (again[layer].pooled_kv, leaf.pooled_kv),
            ):
                if kept.grad is not None and made.requires_grad:
                    tensors.append(made)
                    gradients.append(kept.grad[start:stop])
        add_gradients(parameters, tensors, gradients)
        stop = start
    pool = {layer: DenseLayer(leaf.routing_keys.detach(), leaf.pooled_kv.detach()) for layer, leaf in leaves.items()}
    return PoolResult(loss.detach(), hits, pool, lengths)


def first_held(documents: Sequence[TokenRows], questions: Sequence[TokenRows], tokens: int) -> int:
    """The first of the documents' last parts that, with all questions, have at most so many tokens."""
    left = tokens - sum(rows.ids.numel() for rows in questions)
    first = len(documents)
    while first and documents[first - 1].ids.numel() <= left:
        first -= 1
        left -= documents[first].ids.numel()
    return first
