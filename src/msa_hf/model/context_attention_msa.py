"""Attention over `[context rows; own tokens]` with one softmax: in plain PyTorch, and through its fused kernels."""

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .cache_msa import MemoryContext

# Attention logits held at once while attending to a memory: 64 M float32 numbers, 256 MB.
LOGIT_ELEMENTS = 1 << 26
# Dimensions that carry the bias of a context's rows: kernels want a multiple of 8.
BIAS_DIMENSIONS = 8
# Before scaling, what hides a row: finite in every format, and far below any logit.
HIDDEN = -3e4


class LogitOptions(TypedDict):
    """What a base does with attention logits; as the arguments of `context_attention`."""

    scaling: float | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float


def logit_options(arguments: Mapping[str, Any]) -> LogitOptions:
    """Those among the keyword arguments with which a layer calls its attention function."""
    return LogitOptions(
        scaling=arguments.get("scaling"),
        softcap=arguments.get("softcap"),
        sinks=arguments.get("s_aux"),
        dropout=arguments.get("dropout") or 0.0,
    )


def _causal_mask(length: int, seen: int, device: torch.device) -> Tensor:
    """[1, 1, T, S] bool for the last T of S tokens."""
    return torch.ones(length, seen, dtype=torch.bool, device=device).tril(seen - length)[None, None]


def fused_context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`context_attention` through PyTorch's fused kernels, which never hold the attention weights of a prompt.

    They want rows and own tokens joined. That copies the rows once for a prompt; single tokens, for which it would be
    once per token, and logits that the kernels do not know (softcap, sinks) go through `context_attention`.

    Without a mask attention is causal, aligned to the end: kernels know that without reading a mask, and what rows add
    to the logits travels in further dimensions of queries and keys.
    """
    length, seen, dim = query.shape[2], key.shape[2], query.shape[3]
    if length == 1 or softcap is not None or sinks is not None:
        return context_attention(
            query, key, value, attention_mask, context, scaling=scaling, softcap=softcap, sinks=sinks, dropout=dropout
        )
    query = query.to(value.dtype)
    shared_by = query.shape[1] // key.shape[1]
    keys, values = (
        torch.cat([memory.to(value.dtype), states.to(value.dtype)], dim=2).repeat_interleave(shared_by, dim=1)
        for memory, states in ((context.keys, key), (context.values, value))
    )
    if attention_mask is not None:
        mask = _joined_mask(attention_mask[..., :seen], context, query)
    else:
        scaling = dim**-0.5 if scaling is None else scaling
        query, keys, values = _with_row_bias(query, keys, values, context, scaling)
        width = keys.shape[2]
        mask = causal_lower_right(length, width) if query.is_cuda else _causal_mask(length, width, query.device)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output[..., :dim].transpose(1, 2).contiguous()


def _with_row_bias(
    query: Tensor, keys: Tensor, values: Tensor, context: MemoryContext, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, T, D], keys and values [B, H, R + S, D] with further dimensions, in which every query's products
    with the R rows of the context get their bias, or one that hides rows without content."""
    bias = torch.zeros(context.row_mask.shape, device=query.device) if context.bias is None else context.bias
    bias = (bias.float() / scaling).masked_fill(~context.row_mask, HIDDEN).clamp(min=HIDDEN)
    high = bias.to(keys.dtype)  # two numbers, so that 16-bit formats keep twice their digits
    parts = torch.stack([high, (bias - high.float()).to(keys.dtype)], dim=-1)
    own = keys.shape[2] - parts.shape[1]
    parts = torch.nn.functional.pad(parts, (0, BIAS_DIMENSIONS - 2, 0, own))
    ones = query.new_ones(2)
    return (
        torch.cat(
            [query, torch.nn.functional.pad(ones, (0, BIAS_DIMENSIONS - 2)).expand(*query.shape[:3], -1)], dim=-1
        ),
        torch.cat([keys, parts[:, None].expand(-1, keys.shape[1], -1, -1)], dim=-1),
        torch.nn.functional.pad(values, (0, BIAS_DIMENSIONS)),
    )


def _joined_mask(mask: Tensor, context: MemoryContext, query: Tensor) -> Tensor:
    """[B, 1, T, R + S] for rows and own tokens, from that of the own tokens: boolean where nothing is added."""
    length = query.shape[2]
    rows = context.row_mask[:, None, None, :].expand(-1, 1, length, -1)
    if context.bias is None and mask.dtype == torch.bool:
        joined = torch.cat([rows, mask.expand(rows.shape[0], 1, -1, -1)], dim=-1)
        # A padding token without a context sees nothing; its output is of no interest but must not be NaN.
        return joined | ~joined.any(-1, keepdim=True)
    low = torch.finfo(query.dtype).min
    bias = torch.zeros_like(rows, dtype=query.dtype)
    if context.bias is not None:
        bias = context.bias.to(query.dtype)[:, None, None, :].expand_as(rows)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, low)
    own = mask.to(query.dtype).expand(rows.shape[0], 1, -1, -1)
    return torch.cat([bias.masked_fill(~rows, low), own], dim=-1)


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over `[context rows; own tokens]` with one softmax, without copying either of them.

    Every query sees all rows of its sample's context, and own tokens as `attention_mask` says. Long prompts are
    computed in pieces.

    Args:
        query: [B, H, T, D].
        key, value: [B, G, S, D], S >= T tokens seen, the last T of them the queries'.
        attention_mask: [B or 1, 1, T, S] bool (True: visible) or additive; None for causal, aligned to the end.
        context: rows [B, G, R, D].
        scaling: of the logits, default `D ** -0.5`.
        softcap: `c * tanh(logit / c)` where given.
        sinks: [H] extra logits that take part in the softmax and have no value.
        dropout: probability, on the attention weights.

    Returns:
        [B, T, H, D] in the dtype of `value`.
    """
    pieces = _attend_in_pieces(
        query, key, value, attention_mask, context, scaling=scaling, softcap=softcap, sinks=sinks, dropout=dropout
    )
    return torch.cat([output for output, _ in pieces], dim=2).transpose(1, 2).contiguous()


def context_attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext,
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, Tensor]:
    """`context_attention`, and the weights [B, H, T, S] of the own tokens.

    The weights of a query lack to 1 what went to the context, and to sinks. They have the shape that they have without
    a context, in the dtype of `value`.
    """
    pieces = list(_attend_in_pieces(query, key, value, attention_mask, context, **options))
    output = torch.cat([output for output, _ in pieces], dim=2).transpose(1, 2).contiguous()
    return output, torch.cat([weights for _, weights in pieces], dim=2)


def _attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    context: MemoryContext,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs [B, H, t, D] and weights of the own tokens [B, H, t, S] of some queries after the other."""
    batch, heads, length, dim = query.shape
    groups, seen, rows = key.shape[1], key.shape[2], context.keys.shape[2]
    scaling = dim**-0.5 if scaling is None else scaling
    if attention_mask is None and length > 1:
        attention_mask = _causal_mask(length, seen, query.device)
    row_bias = torch.zeros(batch, rows, device=query.device) if context.bias is None else context.bias
    row_bias = row_bias.masked_fill(~context.row_mask, torch.finfo(torch.float32).min)[:, None, None, None, :]

    step = max(LOGIT_ELEMENTS // max(batch * heads * (rows + seen), 1), 1)
    for start in range(0, length, step):
        part = query[:, :, start : start + step]
        width = part.shape[2]
        grouped = part.reshape(batch, groups, -1, dim)  # the queries of a group share its keys

        def logits_of(keys: Tensor, grouped: Tensor = grouped, width: int = width) -> Tensor:
            logits = (grouped @ keys.transpose(-1, -2)).float() * scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            return logits.unflatten(2, (-1, width))  # [B, G, H / G, t, .]

        own = logits_of(key)
        if attention_mask is not None:
            mask = attention_mask[:, :, None, start : start + step, :seen]
            if mask.dtype == torch.bool:
                own = own.masked_fill(~mask, torch.finfo(torch.float32).min)
            else:
                own = own + mask
        logits = [logits_of(context.keys) + row_bias, own]
        if sinks is not None:
            extra = sinks.float().view(1, groups, -1, 1, 1).expand(batch, groups, heads // groups, width, 1)
            logits.append(extra)
        weights = torch.cat(logits, dim=-1).softmax(-1).to(value.dtype)
        weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0).flatten(2, 3)
        own = weights[..., rows : rows + seen]
        output = weights[..., :rows] @ context.values.to(value.dtype) + own @ value
        yield output.unflatten(2, (-1, width)).flatten(1, 2), own.unflatten(2, (-1, width)).flatten(1, 2)
