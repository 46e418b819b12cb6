"""Routers of further memory layers, begun as the nearest linear map to what trained ones make.

A residual stream changes little from one layer to the next, so that most of what a trained router sees can be seen a
few layers above or below. Begun like this, a new layer finds documents at once, and training makes it differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..model.modeling_msa import MSAForCausalLM
from ..model.retrofit_msa import attention_layers
from .contrastive import TokenRows
from .router_inputs import router_inputs


@torch.no_grad()
def fit_routers(
    model: MSAForCausalLM,
    like: Mapping[int, int],
    documents: Sequence[TokenRows],
    questions: Sequence[TokenRows],
    ridge: float = 1e-3,
) -> None:
    """Set the routers of some memory layers so that they make, of what they read, what those of others make.

    Least squares with a ridge, over all tokens of the documents for keys and over the tokens that route of the
    questions for queries: the last of each where `query_reduction` is `"last"`. Nothing is read from a memory
    meanwhile. Score biases are copied.

    Args:
        model: with a memory and router projections.
        like: memory layer to be set -> the one it is to be like.
        documents, questions: samples, some thousands each.
        ridge: share of the mean variance that is added to all.

    Raises:
        ValueError: for a layer without a memory, one that is also to be set, a sample without rows, and a model
            without router projections.
    """
    memory_layers = set(model.config.memory_layers)
    if wrong := {layer for pair in like.items() for layer in pair} - memory_layers:
        raise ValueError(f"`like` names {sorted(wrong)}, but memory layers are {sorted(memory_layers)}.")
    if both := like.keys() & set(like.values()):
        raise ValueError(f"The layers {sorted(both)} cannot be set and be an example at once.")
    if model.config.shared_router:
        raise ValueError("A model with `shared_router` has no router projections to set.")
    if not documents or not questions:
        raise ValueError("Routers are fitted to samples of both documents and questions; one of them has no rows.")
    _fit(model, like, "router_k_proj", documents, operator.attrgetter("mask"), ridge)
    routing = _last if model.config.query_reduction == "last" else operator.attrgetter("routes")
    _fit(model, like, "router_q_proj", questions, routing, ridge)
    if model.config.score_bias:
        layers = attention_layers(model)
        for layer, example in like.items():
            layers[layer].router_score_bias.load_state_dict(layers[example].router_score_bias.state_dict())


def _last(rows: TokenRows) -> Tensor:
    return torch.arange(rows.ids.shape[1], device=rows.ids.device) == rows.lengths[:, None] - 1


def _fit(
    model: MSAForCausalLM,
    like: Mapping[int, int],
    name: str,
    sample: Sequence[TokenRows],
    chosen: Callable[[TokenRows], Tensor],
    ridge: float,
) -> None:
    """Set the routers called `name`, over the tokens [N, L] bool that `chosen` picks of the sample's rows."""
    layers = attention_layers(model)
    squares: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    for rows in sample:
        inputs = router_inputs(model, rows, operator.itemgetter(chosen(rows)))
        for layer, example in like.items():
            states = inputs[layer].double()
            made = layers[example].get_submodule(name)(inputs[example]).double()
            squares[layer] = states.T @ states + squares.get(layer, 0)
            products[layer] = states.T @ made + products.get(layer, 0)
    for layer, square in squares.items():
        square.diagonal().add_(ridge * square.diagonal().mean())
        layers[layer].get_submodule(name).weight.copy_(torch.linalg.solve(square, products[layer]).T)
