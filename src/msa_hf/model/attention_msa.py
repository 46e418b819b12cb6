"""What a layer computes when a memory is attached: the attention functions registered with transformers.

`model.forward` hands every attention layer a *pass* object by the keyword `memory_pass`; it says what this run of the
backbone is for. `PrefixPass` records keys and values of the prefix, `EncodingPass` pools those of documents,
`AttendingPass` routes and attends. Without a pass the base's own attention function runs, untouched.

`finish()` hands out what a pass recorded, and ends the recording. Under gradient checkpointing the graph holds the
pass, to run a layer again before its backward: that run must compute the same once more, and keep nothing, because a
pass that held on to tensors of the graph would keep both alive for ever.

A pass is no dataclass: what wraps layers, FSDP for one, takes dataclasses, lists and dictionaries among their arguments
apart and hands on copies, of which the model would never see what was recorded.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_msa import MemoryContext
from .chosen_msa import DocumentRows, score_chosen, scores_at
from .chunks_msa import chunk_counts, gather_documents
from .gradients_msa import join_routers, tie
from .memory_msa import LayerMemory
from .ops_msa import OPERATIONS
from .routing_msa import (
    NO_SCORE,
    SIMILARITIES,
    LayerRouting,
    columns,
    last_routing_tokens,
    score_documents,
    scoring_of,
    select_documents,
)

# Name of a base implementation -> the name under which ours, standing on it, is registered. Transformers gives special
# meaning to names that contain "sdpa" or "flash", so ours do not.
IMPLEMENTATIONS = {"eager": "memory_eager", "sdpa": "memory_fused"}
# Attention logits held at once while attending to a memory: 64 M float32 numbers, 256 MB.
LOGIT_ELEMENTS = 1 << 26
# Dimensions that carry the bias of a context's rows: kernels want a multiple of 8.
BIAS_DIMENSIONS = 8
# Before scaling, what hides a row: finite in every format, and far below any logit.
HIDDEN = -3e4
SCORES_ARE_NAN = (
    "The router scores of layer {layer} are NaN: weights of its router or of the layers below hold NaN, or their dtype "
    "overflows. No documents can be chosen."
)

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]


class MemoryPass(Protocol):
    """One run of the backbone. Methods are called by every attention layer, in this order."""

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        """See the input [B, T, hidden] of a memory layer's attention."""

    def attend(self, base: AttentionFunction, module: nn.Module, *states: Any, **kwargs: Any) -> AttentionOutput:
        """Compute the attention of a layer; `states` are query, key, value, attention_mask."""


def enter_memory_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of memory layers: the attention function itself does not see the hidden states."""
    memory_pass = kwargs.get("memory_pass")
    if memory_pass is not None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        memory_pass.enter(module, join_routers(module, hidden_states))


def _eager_of(module: nn.Module) -> AttentionFunction:
    """The eager attention function of the file that defines the module: softcap, sinks and the like differ."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise AttributeError(f"{type(module).__name__} does not follow transformers' attention interface.")


def memory_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> AttentionOutput:
    """Attention with a memory over the base's eager attention."""
    memory_pass: MemoryPass | None = kwargs.pop("memory_pass", None)
    base, query = _eager_of(module), join_routers(module, query)
    if memory_pass is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    return memory_pass.attend(base, module, query, key, value, attention_mask, **kwargs)


def memory_fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> AttentionOutput:
    """Attention with a memory over PyTorch's scaled_dot_product_attention."""
    memory_pass: MemoryPass | None = kwargs.pop("memory_pass", None)
    base, query = ALL_ATTENTION_FUNCTIONS["sdpa"], join_routers(module, query)
    if memory_pass is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    return memory_pass.attend(base, module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATIONS["eager"], memory_eager)
AttentionInterface.register(IMPLEMENTATIONS["sdpa"], memory_fused)
# Without a mask function of the same name transformers would pass no mask at all.
AttentionMaskInterface.register(IMPLEMENTATIONS["eager"], eager_mask)
AttentionMaskInterface.register(IMPLEMENTATIONS["sdpa"], sdpa_mask)


class ScoreBias(nn.Module):
    """`beta * (s_i - max_j s_j) / tau`: the attention logit that a chosen document's router score adds to its rows.

    Args:
        temperature: tau.
    """

    def __init__(self, temperature: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """scores [B, n] float32 and chosen [B, n] bool -> bias [B, n] float32, 0 for the best document."""
        if not scores.shape[1]:
            return scores
        best = scores.masked_fill(~chosen, NO_SCORE).amax(1, keepdim=True)
        difference = torch.where(chosen, scores - best, 0.0)
        return self.weight.float() * difference / self.temperature


class PrefixPass:
    """Records keys and values [B, G, p, D] (after norm and RoPE) of the prefix in every layer."""

    def __init__(self) -> None:
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.recording = True

    def finish(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer -> keys and values; the pass lets go of them."""
        states, self.states, self.recording = self.states, {}, False
        return states

    @staticmethod
    def tied(states: dict[int, tuple[Tensor, Tensor]], output: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """The recorded states, tied to the output of its run (see `tie`)."""
        tensors = iter(tie(output, [tensor for pair in states.values() for tensor in pair]))
        return {layer: (next(tensors), next(tensors)) for layer in states}

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        pass

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> AttentionOutput:
        if self.recording:
            # Under autocast RoPE leaves keys in float32, though they are used in the dtype of the values.
            self.states[module.layer_idx] = (key.to(value.dtype), value)
        return base(module, query, key, value, *args, **kwargs)


class EncodingDone(Exception):
    """Ends a run of the backbone after the last memory layer's keys, values and router keys are known."""


class EncodingPass:
    """Pools the keys, values and router keys of right-padded documents in every memory layer (paper, 3.1).

    Args:
        config: MSAConfig.
        lengths: [N] int64, tokens of each document.
        similarity: the one the router keys are for.
        stop: end the run with `EncodingDone` once the last memory layer's states are pooled.

    Attributes:
        layers: layer -> `LayerMemory`, the result.
    """

    def __init__(self, config: Any, lengths: Tensor, similarity: str, stop: bool) -> None:
        self.config = config
        self.lengths = lengths
        self.similarity = similarity
        self.stop = stop
        self.layers: dict[int, LayerMemory] = {}
        self.router_keys: dict[int, Tensor] = {}
        self.recording = True

    def finish(self) -> dict[int, LayerMemory]:
        """Layer -> `LayerMemory`; the pass lets go of them."""
        layers, self.layers, self.recording = self.layers, {}, False
        return layers

    @staticmethod
    def tied(layers: dict[int, LayerMemory], output: Tensor) -> dict[int, LayerMemory]:
        """The recorded states, tied to the output of its run (see `tie`)."""
        tensors = iter(tie(output, [part for item in layers.values() for part in (item.routing_keys, item.content)]))
        return {layer: LayerMemory(next(tensors), next(tensors)) for layer in layers}

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        if not self.config.shared_router:
            self.router_keys[module.layer_idx] = module.router_k_proj(hidden_states)

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> AttentionOutput:
        layer = module.layer_idx
        if layer in self.config.memory_layers:
            pooled = self._pool(layer, key, value)
            if self.recording:
                self.layers[layer] = pooled
            if self.stop and len(self.layers) == len(self.config.memory_layers):
                raise EncodingDone
        return base(module, query, key, value, *args, **kwargs)

    def _pool(self, layer: int, key: Tensor, value: Tensor) -> LayerMemory:
        if self.config.shared_router:
            router_keys = key.transpose(1, 2)
        else:
            router_keys = self.router_keys.pop(layer).unflatten(-1, (-1, key.shape[-1]))
        content, routing_keys = OPERATIONS["pool_documents"](
            key,
            value,
            router_keys,
            self.lengths.to(key.device),
            self.config.chunk_size,
            SIMILARITIES[self.similarity].normalized_keys,
        )
        return LayerMemory(routing_keys, content)


class AttendingPass:
    """Routes the active tokens, gathers the documents chosen and attends to them (paper, 3.2).

    Args:
        config: MSAConfig.
        similarity: of router queries and keys.
        layers: layer -> `LayerMemory`; empty when contexts are only kept up.
        offsets: [N + 1] int64 chunk offsets of the documents.
        prefix: layer -> keys and values of the prefix, [G, p, D] or [B, G, p, D].
        routing_mask: [B, T] bool tokens that route, or None to keep every sample's context.
        visible: [B, N] bool, documents that a sample may choose, or [1, N] for every sample; None for all.
        force_documents: [B, n] int64 documents to attend to instead of the routed ones, -1 for none.
        keep_document_scores: report the scores of all documents.
        operations: instead of `OPERATIONS`, for a memory whose `layers` are not all of it; with `score_documents` and
            `score_chosen`.
        contexts: layer -> `MemoryContext` of the turns before; those of this turn are written there if `keep_contexts`.

    Attributes:
        routing: layer -> `LayerRouting`, the result.
    """

    def __init__(
        self,
        *,
        config: Any,
        similarity: str,
        layers: dict[int, LayerMemory],
        offsets: Tensor | None,
        prefix: dict[int, tuple[Tensor, Tensor]],
        routing_mask: Tensor | None,
        visible: Tensor | None = None,
        force_documents: Tensor | None = None,
        keep_document_scores: bool = False,
        operations: dict[str, Callable[..., Any]] | None = None,
        contexts: dict[int, MemoryContext] | None = None,
        keep_contexts: bool = False,
    ) -> None:
        self.config = config
        self.similarity = similarity
        self.scoring = scoring_of(config, similarity)
        self.layers = layers
        self.offsets = offsets
        self.prefix = prefix
        self.routing_mask = routing_mask
        self.visible = visible
        self.force_documents = force_documents
        self.keep_document_scores = keep_document_scores
        self.operations = operations
        self.contexts = {} if contexts is None else contexts
        self.keep_contexts = keep_contexts
        self.previous = dict(self.contexts)
        self.routing: dict[int, LayerRouting] = {}
        self.router_queries: dict[int, Tensor] = {}
        self.not_finite: dict[int, Tensor] = {}
        self.moved_offsets: dict[torch.device, Tensor] = {}
        self.moved_forced: dict[torch.device, DocumentRows] = {}
        self.recording = True

    def finish(self) -> dict[int, LayerRouting]:
        """Layer -> `LayerRouting`; the pass lets go of them and of the contexts.

        Raises:
            ValueError: where router queries were not finite.
        """
        not_finite, self.not_finite = self.not_finite, {}
        for layer, found in not_finite.items():
            if bool(found):
                raise ValueError(SCORES_ARE_NAN.format(layer=layer))
        routing, self.routing, self.contexts, self.recording = self.routing, {}, {}, False
        return routing

    @staticmethod
    def tied(routing: dict[int, LayerRouting], output: Tensor) -> dict[int, LayerRouting]:
        """The recorded routing, with the scores of all documents tied to the output of its run (see `tie`)."""
        scored = {layer: item.document_scores for layer, item in routing.items() if item.document_scores is not None}
        # Copies, because FSDP warns of views in what a model returns.
        tensors = {layer: item.clone() for layer, item in zip(scored, tie(output, list(scored.values())), strict=True)}
        return {layer: LayerRouting(item.documents, item.scores, tensors.get(layer)) for layer, item in routing.items()}

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        if self.routing_mask is not None and not self.config.shared_router:
            self.router_queries[module.layer_idx] = module.router_q_proj(hidden_states)

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> AttentionOutput:
        layer = module.layer_idx
        context = self.previous.get(layer)
        if layer in self.config.memory_layers and self.routing_mask is not None:
            context = self._route(module, query, value.dtype, context)
        elif context is None:
            context = self._prefix_context(layer, query, value.dtype)
        if context is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        if self.keep_contexts and self.recording:
            self.contexts[layer] = context
        options: dict[str, Any] = {
            "scaling": kwargs.get("scaling"),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
            "dropout": kwargs.get("dropout") or 0.0,
        }
        if base is ALL_ATTENTION_FUNCTIONS["sdpa"]:
            return fused_context_attention(query, key, value, attention_mask, context, **options), None
        if kwargs.get("output_attentions", self.config.output_attentions):
            return context_attention_and_weights(query, key, value, attention_mask, context, **options)
        return context_attention(query, key, value, attention_mask, context, **options), None

    def _prefix_context(self, layer: int, query: Tensor, dtype: torch.dtype) -> MemoryContext | None:
        """The prefix alone: the context of layers without memory."""
        if layer not in self.prefix:
            return None
        keys, values = (
            states.to(query.device, dtype).expand(query.shape[0], *states.shape[-3:]) for states in self.prefix[layer]
        )
        valid = torch.ones(query.shape[0], keys.shape[2], dtype=torch.bool, device=query.device)
        return MemoryContext(keys, values, valid, prefix_length=keys.shape[2])

    def _route(
        self, module: nn.Module, query: Tensor, dtype: torch.dtype, previous: MemoryContext | None
    ) -> MemoryContext:
        layer, mask = module.layer_idx, self.routing_mask
        assert mask is not None and self.offsets is not None
        memory = self.layers[layer]
        device = memory.routing_keys.device  # routing happens where the keys lie
        if self.config.shared_router:
            router_query = query.transpose(1, 2)
        else:
            router_query = self.router_queries.pop(layer).unflatten(-1, (-1, query.shape[-1]))
        router_query, mask = router_query.to(device), mask.to(device)
        if self.config.query_reduction == "last":
            mask = last_routing_tokens(mask)
        offsets, instead = self._offsets_on(device), self.operations or {}
        scores: Tensor | None = None
        if self._needs_all_scores(router_query):
            scores = instead.get("score_documents", score_documents)(
                router_query, mask, memory.routing_keys, offsets, self.scoring
            )
            assert scores is not None
            if bool(scores.isnan().any()):
                raise ValueError(SCORES_ARE_NAN.format(layer=layer))
            if self.visible is not None:
                scores = scores.masked_fill(~self.visible.to(device), NO_SCORE)
        # What the score bias sees carries the gradient that `best`, which is reported, does not.
        if self.force_documents is not None:
            documents = self.force_documents.to(device)
            if scores is None:
                chosen_scores = instead.get("score_chosen", score_chosen)(
                    router_query, mask, memory.routing_keys, self._forced_on(device), self.scoring
                )
                self._look_for_nan(layer, router_query, mask, chosen_scores)
            else:
                chosen_scores = scores_at(scores, documents)
            best = chosen_scores.detach()
            best = best.masked_fill((documents < 0) | (best <= NO_SCORE), float("-inf"))
        elif scores is None:
            documents, best = instead.get("route_documents", OPERATIONS["route_documents"])(
                router_query.detach(),  # has no derivative
                mask,
                memory.routing_keys,
                offsets,
                self._document_count(),
                alive=None if self.visible is None else self.visible[0].to(device),
                similarity=self.similarity,
            )
            chosen_scores = best
            self._look_for_nan(layer, router_query, mask)
        else:
            documents, best = select_documents(scores, self._document_count())
            chosen_scores = scores_at(scores, documents)
        report = self._report(documents, best, scores, query.device)
        if self.recording:
            self.routing[layer] = report
        context = self._gather(module, memory, documents, offsets, chosen_scores, query, dtype)
        if previous is not None:
            # A sample without a routing token in this turn keeps what it had.
            context = context.where(mask.any(1).to(query.device), previous)
        return context

    def _document_count(self) -> int:
        assert self.offsets is not None
        return columns(self.config.top_k, self.offsets.shape[0] - 1)

    def _needs_all_scores(self, router_query: Tensor) -> bool:
        """Tell whether the scores of all documents are asked for, or not the `top_k` best by default."""
        if self.keep_document_scores:
            return True
        if self.force_documents is not None:
            return False  # nothing is to be chosen
        if self.visible is not None and self.visible.shape[0] > 1:
            return True
        if self.config.score_bias and torch.is_grad_enabled() and router_query.requires_grad:
            return True  # the chosen ones' scores carry a gradient
        return not self.scoring.has_operation

    def _look_for_nan(self, layer: int, router_query: Tensor, mask: Tensor, scores: Tensor | None = None) -> None:
        """Note whether router queries or scores are none; looked at in the end, so that no layer waits for the
        device."""
        if self.recording:
            # Detached: autograd would keep tensors for it, which checkpointing misses when it runs the layer again.
            found = (mask & ~router_query.detach().isfinite().flatten(2).all(2)).any()
            self.not_finite[layer] = found if scores is None else found | scores.detach().isnan().any()

    def _forced_on(self, device: torch.device) -> DocumentRows:
        """`force_documents`, of which none is hidden, looked up once for all layers that lie on one device."""
        if device not in self.moved_forced:
            assert self.force_documents is not None and self.offsets is not None
            documents = self.force_documents
            if self.visible is not None and self.visible.shape[1]:
                places = documents.clamp(min=0).to(self.visible.device)
                visible = self.visible.expand(len(documents), -1).gather(1, places)
                documents = documents.masked_fill(~visible.to(documents.device), -1)
            found = next(iter(self.moved_forced.values()), None) or DocumentRows(documents, self.offsets.cpu())
            self.moved_forced[device] = found.to(device)
        return self.moved_forced[device]

    def _offsets_on(self, device: torch.device) -> Tensor:
        """`offsets`, moved once for all layers that lie on one device."""
        assert self.offsets is not None
        if device not in self.moved_offsets:
            self.moved_offsets[device] = self.offsets.to(device)
        return self.moved_offsets[device]

    def _report(self, documents: Tensor, best: Tensor, scores: Tensor | None, device: torch.device) -> LayerRouting:
        document_scores = None
        if self.keep_document_scores:
            assert scores is not None
            document_scores = scores.masked_fill(scores <= NO_SCORE, float("-inf")).to(device)
        return LayerRouting(documents.to(device), best.to(device), document_scores)

    def _gather(
        self,
        module: nn.Module,
        memory: LayerMemory,
        documents: Tensor,
        offsets: Tensor,
        scores: Tensor,
        query: Tensor,
        dtype: torch.dtype,
    ) -> MemoryContext:
        operations = self.operations or OPERATIONS
        gather = gather_documents if memory.content.requires_grad else operations["gather_documents"]
        keys, values, valid, slots = gather(documents, offsets, memory.content)
        keys, values = keys.to(query.device, dtype), values.to(query.device, dtype)
        valid, slots, bias = valid.to(query.device), slots.to(query.device), None
        if self.config.score_bias:
            per_document = module.router_score_bias(scores.to(query.device), (documents >= 0).to(query.device))
            # Of no documents at all there may still be rows, none of them valid.
            bias = per_document.gather(1, slots) if per_document.shape[1] else valid.float()
        prefix = self._prefix_context(module.layer_idx, query, dtype)
        prefix_length = 0
        if prefix is not None:
            prefix_length = prefix.prefix_length
            keys = torch.cat([prefix.keys, keys], dim=2)
            values = torch.cat([prefix.values, values], dim=2)
            valid = torch.cat([prefix.valid, valid], dim=1)
            if bias is not None:
                bias = torch.nn.functional.pad(bias, (prefix_length, 0))
        return MemoryContext(keys, values, valid, prefix_length, bias, documents.to(query.device))


def chunks_of(lengths: Tensor, chunk_size: int) -> Tensor:
    """Chunk offsets [N + 1] int64 of documents with `lengths` [N] tokens."""
    return torch.nn.functional.pad(chunk_counts(lengths, chunk_size).cumsum(0), (1, 0))


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
        mask: Any = _joined_mask(attention_mask[..., :seen], context, query)
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
    bias = torch.zeros(context.valid.shape, device=query.device) if context.bias is None else context.bias
    bias = (bias.float() / scaling).masked_fill(~context.valid, HIDDEN).clamp(min=HIDDEN)
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
    rows = context.valid[:, None, None, :].expand(-1, 1, length, -1)
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
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, context: MemoryContext, **options: Any
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
    row_bias = row_bias.masked_fill(~context.valid, torch.finfo(torch.float32).min)[:, None, None, None, :]

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
