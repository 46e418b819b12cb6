"""Routers set in closed form from a sample of documents, for a start above chance without training.

Hidden states of a language model share a large mean and have few directions of large variance, so the cosines of any
two lie close together and a few documents are near to everything. Routers have no bias, but can leave a direction out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..model.chunks_msa import pool_chunks
from ..model.modeling_msa import MSAForCausalLM
from ..model.retrofit_msa import attention_layers, head_shape
from ..model.tokenizing_msa import tokenize
from .contrastive import TokenRows
from .router_inputs import router_inputs

HOW = ("center", "whiten")


def sample_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_tokens: int = 512, batch_tokens: int = 16_384
) -> list[TokenRows]:
    """Texts as rows for `center_routers` and `fit_routers`, shortest first; texts without a token are left out.

    Args:
        max_tokens: of a text, cut behind them.
        batch_tokens: per batch, padding included.
    """
    rows = [ids for text in texts if (ids := tokenize(tokenizer, text)[:max_tokens])]
    return [batch for _, batch in batches_by_length(rows, batch_tokens)]


def batches_by_length(rows: Sequence[Sequence[int]], batch_tokens: int) -> list[tuple[Tensor, TokenRows]]:
    """Token ids in batches, shortest first, each with the numbers of its rows ([n] int64).

    Args:
        rows: none of them empty.
        batch_tokens: per batch, padding included; a row that is longer is a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    found: list[tuple[Tensor, TokenRows]] = []
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or len(rows[order[stop]]) * (stop + 1 - start) > batch_tokens:
            some = order[start:stop]
            batch = [torch.tensor(rows[number]) for number in some]
            lengths = torch.tensor([len(ids) for ids in batch])
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            found.append((torch.tensor(some), TokenRows(padded, lengths)))
            start = stop
    return found


@torch.no_grad()
def center_routers(
    model: MSAForCausalLM, documents: Iterable[TokenRows], how: str = "center", smallest: float = 1e-3
) -> None:
    """Change the routers of every memory layer by the statistics of what they see of documents.

    Args:
        model: with a memory and router projections.
        documents: a sample, some thousands.
        how: `"center"` leaves the mean's direction out of the routers as they are; `"whiten"` replaces them by the
            principal directions around the mean, scaled to equal variance, dealt out to the heads in turn.
        smallest: share of the largest variance that is added to all before they are made equal.

    Raises:
        ValueError: for another `how`, a model without router projections, and where whitening has fewer chunks than
            directions to tell apart.
    """
    if how not in HOW:
        raise ValueError(f"`how` must be one of {HOW}, got {how!r}.")
    if model.config.shared_router:
        raise ValueError("A model with `shared_router` has no router projections to change.")
    seen: dict[int, list[Tensor]] = {}
    for rows in documents:
        pooled = functools.partial(pool_chunks, lengths=rows.lengths, chunk_size=model.config.chunk_size)
        for layer, states in router_inputs(model, rows, pooled).items():
            seen.setdefault(layer, []).append(states)
    layers = attention_layers(model)
    for layer, parts in seen.items():
        module = layers[layer]
        states = torch.cat(parts).double()
        mean = states.mean(0)
        direction = mean / mean.norm()
        heads, groups, dim = head_shape(module, model.config)
        if how == "center":
            for router in (module.router_q_proj, module.router_k_proj):
                weight = router.weight.double()
                router.weight.copy_(weight - torch.outer(weight @ direction, direction))
            continue
        if len(states) < groups * dim:
            raise ValueError(
                f"The documents have {len(states)} chunks together, but the routers of layer {layer} have "
                f"{groups * dim} directions to tell apart; take more or longer documents."
            )
        states = states - mean
        states = states - torch.outer(states @ direction, direction)
        values, vectors = torch.linalg.eigh(states.T @ states / len(states))
        order = values.argsort(descending=True)[: groups * dim]
        scaled = vectors[:, order].T * (values[order] + smallest * values.max()).rsqrt()[:, None]
        dealt = scaled.unflatten(0, (dim, groups)).transpose(0, 1)  # [G, D, hidden]
        module.router_k_proj.weight.copy_(dealt.flatten(0, 1))
        module.router_q_proj.weight.copy_(dealt.repeat_interleave(heads // groups, dim=0).flatten(0, 1))
