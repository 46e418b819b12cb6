"""Memory Sparse Attention computed naively: one sample at a time, in float64, on a base model that knows no memory.

Written from the definition and sharing no code with the package, which the tests compare with it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NEVER = float("-inf")


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logits_added: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of one sample, head by head and row by row.

    Args:
        query: [H, T, D].
        key, value: [G, S, D].
        logits_added: [T, S], added to the logits; -inf hides.
        scaling: of the logits.
        softcap: `c * tanh(logit / c)`.
        sinks: [H] logits without a value.

    Returns:
        [H, T, D] float64.
    """
    heads, length, _ = query.shape
    output = torch.zeros_like(query, dtype=torch.float64)
    for head in range(heads):
        group = head * key.shape[0] // heads
        for row in range(length):
            logits = key[group].double() @ query[head, row].double() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits + logits_added[row].double()
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().view(1)])
            weights = torch.exp(logits - logits.max())
            weights = (weights / weights.sum())[: value.shape[1]]
            output[head, row] = weights @ value[group].double()
    return output


def naive_scores(
    queries: Tensor,
    keys: Sequence[Tensor],
    similarity: str = "cosine",
    head_reduction: str = "mean",
    query_reduction: str = "max",
    chunk_reduction: str = "max",
) -> list[float]:
    """Scores of documents for one sample.

    Args:
        queries: [T, H, D] router queries of the routing tokens, in order.
        keys: of every document, router keys [c, G, D], pooled and not normalized.

    Returns:
        One score per document; -inf without a routing token.
    """

    def reduce(values: list[float], how: str) -> float:
        return {"max": max(values), "mean": sum(values) / len(values), "last": values[-1]}[how]

    def similar(query: Tensor, key: Tensor) -> float:
        product = float(query @ key)
        if similarity == "dot":
            return product / query.numel() ** 0.5
        lengths = float(query.norm() * key.norm())
        return product / lengths if lengths else 0.0

    if not len(queries):
        return [NEVER] * len(keys)
    queries = queries.double()
    heads, scores = queries.shape[1], []
    for document in keys:
        chunks = []
        for chunk in document.double():
            tokens = [
                reduce(
                    [similar(token[head], chunk[head * chunk.shape[0] // heads]) for head in range(heads)],
                    head_reduction,
                )
                for token in queries
            ]
            chunks.append(reduce(tokens, query_reduction))
        scores.append(reduce(chunks, chunk_reduction))
    return scores


def naive_choice(scores: Sequence[float], k: int) -> list[int]:
    """The `k` best documents, best first, equal scores by index; -1 where there are not as many."""
    there = [document for document, score in enumerate(scores) if score > NEVER]
    chosen = sorted(there, key=lambda document: (-scores[document], document))[:k]
    return chosen + [-1] * (k - len(chosen))


def naive_chunks(states: Tensor, chunk_size: int) -> Tensor:
    """Means of [L, ...] over chunks of `chunk_size` tokens, the last one over what is left."""
    return torch.stack([part.mean(0) for part in states.split(chunk_size)])


@dataclass
class States:
    """A sequence in one layer: the attention's input [L, hidden], queries [H, L, D], keys and values [G, L, D]."""

    inputs: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass
class Turn:
    """What the reference says about one turn of one sample.

    Attributes:
        logits: [T, vocabulary] float64.
        documents: memory layer -> chosen documents, as `naive_choice` gives them; empty where nothing routed.
        scores: memory layer -> scores of all documents.
    """

    logits: Tensor
    documents: dict[int, list[int]] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)


class Reference:
    """A conversation of one sample with a memory.

    Args:
        base: the plain model; a copy is used.
        model: the model with a memory that was made of it; only its configuration and the routers' weights are read.
        documents: token ids of the documents.
    """

    def __init__(self, base: nn.Module, model: Any, documents: Sequence[Sequence[int]]) -> None:
        self.config = model.config
        self.base: Any = copy.deepcopy(base).double().eval()
        self.base.set_attn_implementation("naive_reference")
        self.base.set_experts_implementation("eager")
        self.routers: dict[int, Any] = {
            module.layer_idx: module for module in model.modules() if getattr(module, "memory_hook", None) is not None
        }
        for module in self.base.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config"):
                module.reference = self
                module.register_forward_pre_hook(self._see_inputs, with_kwargs=True)
        self.inputs: dict[int, Tensor] = {}
        self.record: dict[int, States] | None = None
        self.prefix = self._alone(self.config.prefix_token_ids) if self.config.prefix_token_ids else {}
        self.documents = [self._alone(document) for document in documents]
        self.start()

    def start(self) -> None:
        """Forget the conversation."""
        self.own: dict[int, tuple[Tensor, Tensor]] = {}
        self.contexts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.length = 0

    def _see_inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs[module.layer_idx] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]

    def _run(self, ids: Sequence[int], first_position: int) -> Tensor:
        positions = torch.arange(len(ids))[None] + first_position
        with torch.no_grad():
            output = self.base(input_ids=torch.tensor([list(ids)]), position_ids=positions, use_cache=False)
        return output.logits[0]

    def _alone(self, ids: Sequence[int]) -> dict[int, States]:
        """The base's states of a sequence that stands alone, by layer."""
        self.start()
        self.record = states = {}
        self._run(ids, 0)
        self.record = None
        return states

    def turn(
        self, ids: Sequence[int], routes: Sequence[bool] | None = None, force: Sequence[int] | None = None
    ) -> Turn:
        """TranscriptFeeder the next tokens.

        Args:
            ids: token ids.
            routes: which of them route; None or none of them keeps the documents of the turn before.
            force: documents to attend to instead of the best.
        """
        self.routes = torch.zeros(len(ids), dtype=torch.bool) if routes is None else torch.tensor(routes)
        self.force = force
        self.result = Turn(torch.empty(0))
        self.result.logits = self._run(ids, self.config.prefix_length + self.config.top_k + self.length)
        self.length += len(ids)
        return self.result

    # One layer --------------------------------------------------------------------------------------------------------

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, **options: Any) -> Tensor:
        """Attention of the sample's new tokens [., T, D] in one layer."""
        if self.record is not None:
            self.record[layer] = States(self.inputs[layer], query, key, value)
            context = None
        else:
            if self.routes.any() and layer in self.config.memory_layers:
                self.contexts[layer] = self._choose(layer, query)
            context = self.contexts.get(layer) or self._prefix_rows(layer)
        own_key, own_value = key, value
        if self.record is None:
            if layer in self.own:
                own_key, own_value = torch.cat([self.own[layer][0], key], 1), torch.cat([self.own[layer][1], value], 1)
            self.own[layer] = (own_key, own_value)
        added = self._window(layer, key.shape[1], own_key.shape[1])
        if context is not None:
            rows_key, rows_value, bias = context
            own_key, own_value = torch.cat([rows_key, own_key], 1), torch.cat([rows_value, own_value], 1)
            added = torch.cat([bias.expand(len(added), -1), added], 1)
        return naive_attention(query, own_key, own_value, added, scaling, **options)

    def _window(self, layer: int, length: int, seen: int) -> Tensor:
        """[T, S] zeros where a token sees another, else -inf."""
        row = torch.arange(seen - length, seen)[:, None]
        column = torch.arange(seen)
        visible = column <= row
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[layer] == "sliding_attention":
            visible &= row - column < self.config.sliding_window
        return torch.where(visible, 0.0, NEVER)

    def _prefix_rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self.prefix:
            return None
        states = self.prefix[layer]
        return states.key, states.value, torch.zeros(states.key.shape[1])

    def _choose(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route over the documents; keys, values and bias of the rows that the layer then attends to."""
        config, size, module = self.config, self.config.chunk_size, self.routers[layer]

        def heads_of(states: Tensor, weight: Tensor) -> Tensor:
            return (states @ weight.double().T).unflatten(-1, (-1, query.shape[-1]))

        if config.shared_router:
            router_query = query.transpose(0, 1)
            router_keys = [document[layer].key.transpose(0, 1) for document in self.documents]
        else:
            router_query = heads_of(self.inputs[layer], module.router_q_proj.weight)
            router_keys = [heads_of(document[layer].inputs, module.router_k_proj.weight) for document in self.documents]
        reductions = (config.head_reduction, config.query_reduction, config.chunk_reduction)
        scores = naive_scores(
            router_query[self.routes],
            [naive_chunks(keys, size) for keys in router_keys],
            config.similarity,
            *reductions,
        )
        chosen = naive_choice(scores, config.top_k) if self.force is None else list(self.force)
        self.result.documents[layer], self.result.scores[layer] = chosen, scores
        chosen = [document for document in chosen if document >= 0]
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        if (prefix := self._prefix_rows(layer)) is not None:
            rows.append(prefix)
        for document in chosen:
            states = self.documents[document][layer]
            keys, values = (
                naive_chunks(item.transpose(0, 1), size).transpose(0, 1) for item in (states.key, states.value)
            )
            bias = torch.zeros(keys.shape[1], dtype=torch.float64)
            if config.score_bias:
                best = max(scores[other] for other in chosen)
                beta = module.router_score_bias.weight.double()
                bias = bias + beta * (scores[document] - best) / config.aux_temperature
            rows.append((keys, values, bias))
        if not rows:
            return query.new_zeros(1, 0, query.shape[-1]), query.new_zeros(1, 0, query.shape[-1]), torch.zeros(0)
        keys, values, bias = zip(*rows, strict=True)
        return torch.cat(keys, 1), torch.cat(values, 1), torch.cat(bias)


def _reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    output = module.reference.attend(
        module.layer_idx,
        query[0],
        key[0],
        value[0],
        kwargs.get("scaling") or query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return output.transpose(0, 1)[None], None


AttentionInterface.register("naive_reference", _reference_attention)
AttentionMaskInterface.register("naive_reference", eager_mask)
