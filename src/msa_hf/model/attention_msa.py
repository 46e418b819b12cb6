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
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_msa import MemoryContext
from .configuration_msa import MSAConfig
from .context_attention_msa import (
    context_attention,
    context_attention_and_weights,
    fused_context_attention,
    logit_options,
)
from .dense_layer_msa import DenseLayer, select_scored
from .document_rows_msa import scores_at
from .gradients_msa import join_routers, tie
from .memory_msa import LayerMemory
from .ops_msa import OPERATIONS
from .routing_msa import NO_SCORE, SIMILARITIES, LayerRouting, RoutingRequest, Selection
from .types_msa import Arguments

# Name of a base implementation -> the name under which ours, standing on it, is registered. Transformers gives special
# meaning to names that contain "sdpa" or "flash", so ours do not.
IMPLEMENTATIONS = {"eager": "memory_eager", "sdpa": "memory_fused"}
SCORES_ARE_NAN = (
    "The router scores of layer {layer} are NaN: weights of its router or of the layers below hold NaN, or their dtype "
    "overflows. No documents can be chosen."
)

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
Record = TypeVar("Record")


class NotFiniteError(ValueError):
    """Hidden states or router scores that are no numbers, by which nothing can be chosen."""


def refuse_nan(not_finite: Mapping[int, bool]) -> None:
    """Raise `NotFiniteError` where the router queries of a layer were not finite, naming the first."""
    for layer, found in not_finite.items():
        if found:
            raise NotFiniteError(SCORES_ARE_NAN.format(layer=layer))


class MemoryPass(Protocol):
    """One run of the backbone. Methods are called by every attention layer, in this order."""

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        """See the input [B, T, hidden] of a memory layer's attention."""

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        """Compute the attention of a layer."""


class RecordingPass(MemoryPass, Protocol[Record]):
    """A pass that keeps something of every layer."""

    def finish(self) -> dict[int, Record]:
        """Layer -> what was recorded; the pass lets go of it."""

    @staticmethod
    def tied(recorded: dict[int, Record], output: Tensor, /) -> dict[int, Record]:
        """What was recorded, tied to the output of its run (see `tie`)."""


def enter_memory_layer(module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments) -> None:
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    memory_pass: MemoryPass | None = None,
    **kwargs: object,
) -> AttentionOutput:
    """Attention with a memory over the base's eager attention."""
    base, query = _eager_of(module), join_routers(module, query)
    if memory_pass is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    return memory_pass.attend(base, module, query, key, value, attention_mask, **kwargs)


def memory_fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    memory_pass: MemoryPass | None = None,
    **kwargs: object,
) -> AttentionOutput:
    """Attention with a memory over PyTorch's scaled_dot_product_attention."""
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

    def __init__(
        self, temperature: float, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
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
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        if self.recording:
            # Under autocast RoPE leaves keys in float32, though they are used in the dtype of the values.
            self.states[module.layer_idx] = (key.to(value.dtype), value)
        return base(module, query, key, value, attention_mask, **kwargs)


class EncodingDone(Exception):
    """Ends a run of the backbone after the last memory layer's keys, values and router keys are known."""


class EncodingPass:
    """Pools the keys, values and router keys of right-padded documents in every memory layer (paper, 3.1).

    Args:
        config: MSAConfig.
        lengths: [N] int64, tokens of each document; on the CPU, the device is not waited for.
        similarity: the one the router keys are for.
        stop: end the run with `EncodingDone` once the last memory layer's states are pooled.

    Attributes:
        layers: layer -> `DenseLayer`, the result.
    """

    def __init__(self, config: MSAConfig, lengths: Tensor, similarity: str, stop: bool) -> None:
        self.config = config
        self.lengths = lengths
        self.similarity = similarity
        self.stop = stop
        self.layers: dict[int, DenseLayer] = {}
        self.router_keys: dict[int, Tensor] = {}
        self.recording = True

    def finish(self) -> dict[int, DenseLayer]:
        """Layer -> `DenseLayer`; the pass lets go of them."""
        layers, self.layers, self.recording = self.layers, {}, False
        return layers

    @staticmethod
    def tied(layers: dict[int, DenseLayer], output: Tensor) -> dict[int, DenseLayer]:
        """The recorded states, tied to the output of its run (see `tie`)."""
        tensors = iter(tie(output, [part for item in layers.values() for part in (item.routing_keys, item.pooled_kv)]))
        return {layer: DenseLayer(next(tensors), next(tensors)) for layer in layers}

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
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        layer = module.layer_idx
        if layer in self.config.memory_layers:
            pooled = self._pool(layer, key, value)
            if self.recording:
                self.layers[layer] = pooled
            if self.stop and len(self.layers) == len(self.config.memory_layers):
                raise EncodingDone
        return base(module, query, key, value, attention_mask, **kwargs)

    def _pool(self, layer: int, key: Tensor, value: Tensor) -> DenseLayer:
        if self.config.shared_router:
            router_keys = key.transpose(1, 2)
        else:
            router_keys = self.router_keys.pop(layer).unflatten(-1, (-1, key.shape[-1]))
        pooled_kv, routing_keys = OPERATIONS["pool_documents"](
            key,
            value,
            router_keys,
            self.lengths,
            self.config.chunk_size,
            SIMILARITIES[self.similarity].normalized_keys,
        )
        return DenseLayer(routing_keys, pooled_kv)


class AttendingPass:
    """Routes the active tokens, gathers the documents chosen and attends to them (paper, 3.2).

    Args:
        config: MSAConfig.
        layers: layer -> `LayerMemory`; empty when contexts are only kept up.
        prefix: layer -> keys and values of the prefix, [G, p, D] or [B, G, p, D].
        request: what is asked of the layers; None to keep every sample's context.
        contexts: layer -> `MemoryContext` of the steps before; those of this one are written there if `keep_contexts`.

    Attributes:
        routing: layer -> `LayerRouting`, the result.
    """

    def __init__(
        self,
        *,
        config: MSAConfig,
        layers: Mapping[int, LayerMemory],
        prefix: Mapping[int, tuple[Tensor, Tensor]],
        request: RoutingRequest | None,
        contexts: dict[int, MemoryContext] | None = None,
        keep_contexts: bool = False,
    ) -> None:
        self.config = config
        self.layers = layers
        self.prefix = prefix
        self.request = request
        self.contexts = {} if contexts is None else contexts
        self.keep_contexts = keep_contexts
        self.previous = dict(self.contexts)
        self.routing: dict[int, LayerRouting] = {}
        self.router_queries: dict[int, Tensor] = {}
        self.not_finite: dict[int, Tensor] = {}
        self.recording = True

    def finish(self) -> dict[int, LayerRouting]:
        """Layer -> `LayerRouting`; the pass lets go of them and of the contexts.

        Raises:
            ValueError: where router queries were not finite.
        """
        not_finite, self.not_finite = self.not_finite, {}
        if not_finite:
            device = next(iter(not_finite.values())).device
            found = torch.stack([flag.to(device, non_blocking=True) for flag in not_finite.values()])
            refuse_nan(dict(zip(not_finite, found.tolist(), strict=True)))  # the device is waited for here, once
        routing, self.routing, self.contexts, self.recording = self.routing, {}, {}, False
        return routing

    def take(self, routing: dict[int, LayerRouting]) -> None:
        """Take what another pass recorded in the place of this one, whose router queries were finite."""
        self.routing = routing

    @staticmethod
    def tied(routing: dict[int, LayerRouting], output: Tensor) -> dict[int, LayerRouting]:
        """The recorded routing, with the scores of all documents tied to the output of its run (see `tie`)."""
        scored = {layer: item.document_scores for layer, item in routing.items() if item.document_scores is not None}
        # Copies, because FSDP warns of views in what a model returns.
        tensors = {layer: item.clone() for layer, item in zip(scored, tie(output, list(scored.values())), strict=True)}
        return {layer: LayerRouting(item.documents, item.scores, tensors.get(layer)) for layer, item in routing.items()}

    def place(self, module: nn.Module) -> int:
        """The number under which the things of a layer are kept: its own."""
        return module.layer_idx

    def routes(self, module: nn.Module) -> bool:
        """Tell whether a layer chooses documents in this run."""
        return self.request is not None and module.layer_idx in self.config.memory_layers

    def enter(self, module: nn.Module, hidden_states: Tensor) -> None:
        if self.request is not None and not self.config.shared_router:
            self.router_queries[self.place(module)] = module.router_q_proj(hidden_states)

    def attend(
        self,
        base: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: object,
    ) -> AttentionOutput:
        layer = self.place(module)
        context = self.previous.get(layer)
        if self.request is not None and self.routes(module):
            context = self._route(module, self.request, query, value.dtype, context)
        elif context is None:
            context = self._prefix_context(layer, query, value.dtype)
        fused, length, options = base is ALL_ATTENTION_FUNCTIONS["sdpa"], query.shape[2], logit_options(kwargs)
        if context is not None and self.keep_contexts and self.recording:
            self.contexts[layer] = context
        if fused and length == 1:
            attended = OPERATIONS["attend_token"](query, key, value, attention_mask, context, **options)
            if attended is not None:
                return attended, None
        if context is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None and 1 < length < key.shape[2]:
            # Transformers leaves the mask of a prompt out where the tokens are the first of a static cache.
            key, value = key[:, :, :length], value[:, :, :length]
        if fused:
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
        row_mask = torch.ones(query.shape[0], keys.shape[2], dtype=torch.bool, device=query.device)
        return MemoryContext(keys, values, row_mask, prefix_length=keys.shape[2])

    def _route(
        self,
        module: nn.Module,
        request: RoutingRequest,
        query: Tensor,
        dtype: torch.dtype,
        previous: MemoryContext | None,
    ) -> MemoryContext:
        layer = self.place(module)
        memory = self.layers[layer]
        if self.config.shared_router:
            router_query = query.transpose(1, 2)
        else:
            router_query = self.router_queries.pop(layer).unflatten(-1, (-1, query.shape[-1]))
        selection, scores = self._select(memory, request, router_query)
        report = _report(selection, scores, query.device)  # also when it is not kept: it has a part in the graph
        if self.recording:
            # Looked at in the end, so that no layer waits for the device. Detached: autograd would keep tensors for it,
            # which checkpointing misses when it runs the layer again.
            queries = router_query.detach().isfinite().flatten(2).all(2)
            found = (request.routing_mask.to(queries.device) & ~queries).any()
            nan = selection.has_nan
            self.not_finite[layer] = found if nan is None else found | nan.to(found.device)
            self.routing[layer] = report
        context = self._gather(module, memory, selection, query, dtype)
        if previous is not None:
            # A sample without a routing token in this step keeps what it had.
            context = context.where(request.routing_mask.any(1).to(query.device), previous)
        return context

    def _select(self, memory: LayerMemory, request: RoutingRequest, queries: Tensor) -> tuple[Selection, Tensor | None]:
        """The documents of every sample; and the scores of all, where these are asked for."""
        mask, scoring, given = request.routing_mask, request.scoring, request.documents
        if request.all_scores:
            scores = memory.score(queries, mask, scoring)
            if given is None:
                return select_scored(scores, request.k), scores
            chosen = scores_at(scores, given.to(scores.device))
            return Selection(given, chosen, has_nan=scores.detach().isnan().any()), scores
        if given is not None:
            chosen = memory.score(queries, mask, scoring, given)
            return Selection(given, chosen, has_nan=chosen.detach().isnan().any()), None
        # Without a score bias nobody reads a gradient of the scores.
        queries = queries if self.config.score_bias else queries.detach()
        return memory.route(queries, mask, request.k, scoring), None

    def _gather(
        self, module: nn.Module, memory: LayerMemory, selection: Selection, query: Tensor, dtype: torch.dtype
    ) -> MemoryContext:
        rows, bias = memory.gather(selection, dtype).to(query.device, dtype), None
        documents = selection.documents.to(query.device)
        keys, values, row_mask = rows.keys, rows.values, rows.row_mask
        if self.config.score_bias:
            per_document = module.router_score_bias(selection.scores.to(query.device), documents >= 0)
            # Of no documents at all there may still be rows, none of them there.
            bias = per_document.gather(1, rows.document_index) if per_document.shape[1] else row_mask.float()
        prefix = self._prefix_context(self.place(module), query, dtype)
        prefix_length = 0
        if prefix is not None:
            prefix_length = prefix.prefix_length
            keys = torch.cat([prefix.keys, keys], dim=2)
            values = torch.cat([prefix.values, values], dim=2)
            row_mask = torch.cat([prefix.row_mask, row_mask], dim=1)
            if bias is not None:
                bias = torch.nn.functional.pad(bias, (prefix_length, 0))
        return MemoryContext(keys, values, row_mask, prefix_length, bias, documents)


def _report(selection: Selection, scores: Tensor | None, device: torch.device) -> LayerRouting:
    """What a forward says of a selection; `scores` are those of all documents where they were asked for."""
    documents, best = selection.documents.to(device), selection.scores.detach().to(device)
    # Documents that a caller named may be hidden, and samples have no routing token.
    best = best.masked_fill((documents < 0) | (best <= NO_SCORE), float("-inf"))
    all_scores = None if scores is None else scores.masked_fill(scores <= NO_SCORE, float("-inf")).to(device)
    return LayerRouting(documents, best, all_scores)
