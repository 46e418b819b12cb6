"""What a model with a memory gets right, and which part of it gets wrong what it does not: router or reader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..generation import Protocol
from ..memory_msa import MemoryBank
from ..routing_msa import select_documents
from .data import _pad, question_ids


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """`model` in evaluation mode and without gradients; every module gets its own mode back."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training:
            module.training = training


def prompt_of(tokenizer: Any, question: str, protocol: Protocol | None) -> tuple[list[int], list[bool]]:
    """A question as it is first put, and which of its tokens route: as the protocol says, or as `QuestionCollator`."""
    if protocol is not None:
        return Protocol.join(protocol.prompt_segments(tokenizer, question))
    ids = question_ids(tokenizer, question)
    return ids, [True] * len(ids)


def positions_of(bank: MemoryBank, keys: Sequence[str]) -> list[int]:
    """Where the documents with these keys stand, in order and once each.

    Raises:
        ValueError: naming a key that the bank does not hold.
    """
    try:
        return list(dict.fromkeys(bank.documents.position(key) for key in keys))
    except KeyError as error:
        raise ValueError(f"`positives` names {error.args[0]!r}, which the bank does not hold.") from None


def router_recall(
    model: Any,
    tokenizer: Any,
    bank: MemoryBank,
    questions: Sequence[Mapping[str, Any]],
    k: int | None = None,
    batch_size: int = 16,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """How many of the documents that answer them routers find for questions as they are first put.

    Args:
        model: a causal LM with a memory, with or without adapters.
        tokenizer: of the model.
        bank: documents encoded by this model as it is now; thousands of them, or the figures flatter.
        questions: with `question` and `positives`, keys of the bank; those without positives are left out.
        k: documents per layer (default: those that the model attends to).
        batch_size: questions at a time.
        protocol: whose prompt puts the question; None: the question and a line break, as `QuestionCollator` does.

    Returns:
        `k`; `questions`, their number; `wanted`, the number of different documents that are the first positive of one.
        `recall`, the mean share of a question's positives that any layer has among its k best, and `layers`, the same
        by layer; `first` and `first_layers`, the share of questions whose first positive is found, the only one that a
        first round can be asked for where questions take several hops. The same four for the best document alone:
        `recall_at_1`, `layers_at_1`, `first_at_1`, `first_layers_at_1`. `distinct`, by layer, how many different
        documents the k best of all questions are: few of them for many questions is a collapsed router; 0 says that
        the scores are not numbers.

    Raises:
        ValueError: for k < 1, no question with positives, and a positive that the bank does not hold.
    """
    k = model.config.top_k if k is None else k
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    asked = [question for question in questions if question["positives"]]
    if not asked:
        raise ValueError("`questions` holds none with positives, so nothing can be found.")
    gold = [positions_of(bank, question["positives"]) for question in asked]
    layers = list(model.config.memory_layers)
    found: dict[int, list[list[int]]] = {layer: [] for layer in layers}
    all_scores = k > model.config.top_k
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            rows = [prompt_of(tokenizer, item["question"], protocol) for item in asked[start : start + batch_size]]
            routing = model(
                input_ids=_pad([ids for ids, _ in rows], 0, left=True).to(model.device),
                attention_mask=_pad([[1] * len(ids) for ids, _ in rows], 0, left=True).to(model.device),
                routing_mask=_pad([[int(item) for item in routes] for _, routes in rows], 0, left=True)
                .bool()
                .to(model.device),
                memory=bank,
                output_document_scores=all_scores,
                use_cache=False,
                logits_to_keep=1,
            ).routing
            for layer in layers:
                chosen = routing[layer].documents[:, :k]
                if all_scores:
                    chosen, _ = select_documents(routing[layer].document_scores, k)
                found[layer] += [[place for place in row if place >= 0] for row in chosen.tolist()]

    def shares(best: int, wanted: Sequence[Sequence[int]]) -> tuple[float, dict[int, float]]:
        """The mean share of the wanted documents among the best: of any layer, and by layer."""

        def share(chosen: Sequence[set[int]]) -> float:
            return sum(len(a & set(b)) / len(b) for a, b in zip(chosen, wanted, strict=True)) / len(wanted)

        sets = {layer: [set(row[:best]) for row in rows] for layer, rows in found.items()}
        union = [set().union(*row) for row in zip(*sets.values(), strict=True)]
        return share(union), {layer: share(rows) for layer, rows in sets.items()}

    result: dict[str, Any] = {
        "k": k,
        "questions": len(asked),
        "wanted": len({row[0] for row in gold}),
        "distinct": {layer: len(set().union(*rows)) for layer, rows in found.items()},
    }
    for ending, best in (("", k), ("_at_1", 1)):
        result["recall" + ending], result["layers" + ending] = shares(best, gold)
        result["first" + ending], result["first_layers" + ending] = shares(best, [row[:1] for row in gold])
    return result
