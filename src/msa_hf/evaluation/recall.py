"""Recall of the routers: how many of the documents that answer questions they find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.padding import pad
from ..data.questions import Question
from ..generation import DocumentIds, PromptProtocol
from ..generation.prompting import prompting_of
from ..model.memory_msa import MemoryBank
from ..model.modes_msa import evaluating
from ..model.routing_msa import select_documents
from .prompting import text_of


class JudgedFields(TypedDict):
    """A question whose answer and documents are known, as `diagnose` takes it.

    Attributes:
        question: its text.
        answer: missing or None: only routing is measured.
        positives: keys of the documents that answer it, in the order of the hops.
        rounds: the same keys, by the round that should find them; default one document a round.
        kind: by which figures are given.
    """

    question: str
    answer: NotRequired[str | None]
    positives: NotRequired[Sequence[str]]
    rounds: NotRequired[Sequence[Sequence[str]] | None]
    kind: NotRequired[str | None]


class RouterRecall(TypedDict):
    """The figures that `router_recall` measured, as it describes it; by layer where a name says so."""

    k: int
    questions: int
    wanted: int
    distinct: dict[int, int]
    recall: float
    layers: dict[int, float]
    first: float
    first_layers: dict[int, float]
    recall_at_1: float
    layers_at_1: dict[int, float]
    first_at_1: float
    first_layers_at_1: dict[int, float]


def positions_of(bank: MemoryBank, keys: Sequence[str]) -> list[int]:
    """The positions of the documents with these keys, in order and once each.

    Raises:
        ValueError: naming a key that the bank does not hold.
    """
    try:
        return list(dict.fromkeys(bank.documents.position(key) for key in keys))
    except KeyError as error:
        raise ValueError(f"`positives` names {error.args[0]!r}, which the bank does not hold.") from None


def router_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: MemoryBank,
    questions: Sequence[Question | JudgedFields],
    k: int | None = None,
    batch_size: int = 16,
    protocol: PromptProtocol | None = None,
    rounds_read: int = 0,
) -> RouterRecall:
    """The share of the right documents that routers find for questions as they are first put, or later.

    Args:
        model: a causal LM with a memory, with or without adapters.
        tokenizer: of the model.
        bank: documents encoded by this model as it is now; thousands of them, or the figures flatter.
        questions: with `question` and `positives`, keys of the bank; those without positives are left out.
        k: documents per layer (default: those that the model attends to).
        batch_size: questions at a time.
        protocol: whose prompt puts the question; None: the chat template, else the training prompt (`prompting_of`).
        rounds_read: with a protocol, how many rounds' documents have been read already (`rounds`, or one positive
            each): the positives are then those of the rounds to come, and questions without any are left out. The bank
            must hold the texts.

    Returns:
        `k`; `questions`, their number; `wanted`, the number of different documents that are the first positive of one.
        `recall`, the mean share of a question's positives that any layer has among its k best, and `layers`, the same
        by layer; `first` and `first_layers`, the share of questions whose first positive is found, the only one that a
        first round can be asked for where questions take several hops. The same four for the best document alone:
        `recall_at_1`, `layers_at_1`, `first_at_1`, `first_layers_at_1`. `distinct`, by layer, how many different
        documents the k best of all questions are: few of them for many questions is a collapsed router.

    Raises:
        ValueError: for k < 1, no question with positives, a positive that the bank does not hold, and rounds read
            without a protocol or without texts.
    """
    k = model.config.top_k if k is None else k
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if rounds_read and protocol is None:
        raise ValueError("`rounds_read` needs a protocol: without one there are no rounds.")
    asked = [question for question in questions if len(_rounds_of(question)) > rounds_read]
    if not asked:
        raise ValueError(
            "`questions` holds none with positives, so nothing can be found."
            if not rounds_read
            else f"`questions` holds none with documents to be found after {rounds_read} rounds."
        )
    rounds = [[positions_of(bank, group) for group in _rounds_of(question)] for question in asked]
    gold = [[position for group in groups[rounds_read:] for position in group] for groups in rounds]
    layers = list(model.config.memory_layers)
    found: dict[int, list[list[int]]] = {layer: [] for layer in layers}
    all_scores = k > model.config.top_k
    prompting = prompting_of(tokenizer, protocol)
    with evaluating(model):
        for start in range(0, len(asked), batch_size):
            rows = [
                prompting.prompt(item["question"], _texts(bank, groups[:rounds_read]))
                for item, groups in zip(
                    asked[start : start + batch_size], rounds[start : start + batch_size], strict=True
                )
            ]
            routing = model(
                input_ids=pad([ids for ids, _ in rows], 0, left=True).to(model.device),
                attention_mask=pad([[1] * len(ids) for ids, _ in rows], 0, left=True).to(model.device),
                routing_mask=pad([[int(item) for item in routes] for _, routes in rows], 0, left=True)
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

    first = [row[:1] for row in gold]
    at_k, first_at_k, at_1, first_at_1 = shares(k, gold), shares(k, first), shares(1, gold), shares(1, first)
    return {
        "k": k,
        "questions": len(asked),
        "wanted": len({row[0] for row in gold}),
        "distinct": {layer: len(set().union(*rows)) for layer, rows in found.items()},
        "recall": at_k[0],
        "layers": at_k[1],
        "first": first_at_k[0],
        "first_layers": first_at_k[1],
        "recall_at_1": at_1[0],
        "layers_at_1": at_1[1],
        "first_at_1": first_at_1[0],
        "first_layers_at_1": first_at_1[1],
    }


def _rounds_of(question: Question | JudgedFields) -> Sequence[Sequence[str]]:
    """Keys of the documents that each round should find."""
    return question.get("rounds") or [[key] for key in question["positives"]]


def _texts(bank: MemoryBank, rounds: Sequence[Sequence[int]]) -> list[list[tuple[int, str]]]:
    """Ids and texts of documents at these positions."""
    ids, found = DocumentIds(bank), []
    for group in rounds:
        found.append([(ids.id_of(position), text_of(bank, position)) for position in group])
    return found
