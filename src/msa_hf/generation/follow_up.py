"""Follow-up questions: whether one chooses documents by itself, or with what was said before it."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.padding import pad
from ..model.memory_msa import Memory
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from .combining import choices_on_host, combine_layers
from .prompting import Prompt, Prompting, Said, messages_of, recent_text
from .routed_document import RoutedDocument


def standing_alone(
    model: MSAForCausalLM,
    bank: Memory,
    prompting: Prompting,
    said: Said,
    layer_scores: str = "mean",
) -> str:
    """The text by which the last question of a conversation is asked.

    It is the question alone where that finds a document which fits at least as well, by the routers' score, as what is
    found with the recent messages before it; else these are part of it.
    """
    messages = messages_of(said)
    alone, together = messages[-1]["content"], recent_text(said)
    if len(messages) == 1 or alone == together:
        return alone
    scores = best_scores(model, bank, [prompting.prompt(text) for text in (alone, together)], layer_scores)
    return alone if scores[0] >= scores[1] else together


def best_scores(model: MSAForCausalLM, bank: Memory, prompts: Sequence[Prompt], layer_scores: str) -> list[float]:
    """The score over all layers of the best document of each prompt; -inf where nothing is chosen."""
    device = model.device
    with evaluating(model):
        routing = model(
            input_ids=pad([ids for ids, _ in prompts], 0, left=True).to(device),
            attention_mask=pad([[1] * len(ids) for ids, _ in prompts], 0, left=True).to(device),
            routing_mask=pad([list(map(int, routes)) for _, routes in prompts], 0, left=True).bool().to(device),
            memory=bank,
            use_cache=False,
            logits_to_keep=1,
        ).routing
    best, found = [], choices_on_host(routing, device)
    for row in range(len(prompts)):
        chosen = {
            layer: [
                RoutedDocument(position, position, "", score)
                for position, score in zip(*rows[row], strict=True)
                if position >= 0
            ]
            for layer, rows in found.items()
        }
        ranked = combine_layers(chosen, layer_scores)
        best.append(float("-inf") if not ranked or ranked[0].score is None else ranked[0].score)
    return best
