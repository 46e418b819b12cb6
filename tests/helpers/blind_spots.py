"""Facts of an invented world that routing misses by construction: their documents' keys or neighbors are at fault."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_hf import MemoryBank
from msa_hf.evaluation import Corpus, Question
from msa_hf.generation import PromptProtocol
from msa_hf.model.memory_msa import DenseLayer
from msa_hf.retrieval.router_scores import router_scores

# What is done to the document that answers.
KINDS = {
    "second_hop": "of a two-hop question: the second document's routing keys are zero",
    "zeroed": "routing keys are zero",
    "negated": "routing keys point the other way",
    "rotated": "routing keys are turned at random, with their length",
    "swapped": "routing keys are those of another document",
    "beyond_k": "routing keys are blended with others, until the document ranks from k + 1 to 4 k",
    "crowded": "24 near-duplicates surround it, in which the value is missing",
    "truncated": "encoded as far as its first half, which says nothing of the fact",
}
COPIES = 24
NOTHING = ("of no record", "left blank", "lost in a fire", "never written down", "as yet to be found", "kept secret")


@dataclass
class Planted:
    """A bank with blind spots.

    Attributes:
        bank: all of them in it.
        questions: kind -> questions whose document routing misses.
        healthy: questions of the same world about other documents.
    """

    bank: MemoryBank
    questions: dict[str, list[Question]]
    healthy: list[Question] = field(default_factory=list)


def plant(
    model: Any,
    tokenizer: Any,
    protocol: PromptProtocol,
    corpus: Corpus,
    count: int,
    healthy: int,
    prose: Sequence[str],
    kinds: Sequence[str] = tuple(KINDS),
    seed: int = 0,
) -> Planted:
    """Encode a corpus and plant `count` blind spots of each kind in different documents.

    Args:
        healthy: questions of each of one_hop, two_hop and unanswerable about documents that are left alone.
        prose: real texts, with which truncated documents begin.
        kinds: among `KINDS`.
    """
    texts, pick = list(corpus.texts()), random.Random(seed)
    one_hop = iter(corpus.questions(len(texts) // 2, "one_hop", seed))
    questions: dict[str, list[Question]] = {kind: [] for kind in kinds}
    gold: dict[str, list[int]] = {kind: [] for kind in kinds}
    taken: set[int] = set()
    if "second_hop" in kinds:
        for question in corpus.questions(4 * count, "two_hop", seed):
            if len(questions["second_hop"]) < count and not taken & set(question.positives):
                questions["second_hop"].append(question)
                gold["second_hop"].append(question.positives[-1])
                taken |= set(question.positives)
    for kind in kinds:
        while len(questions[kind]) < count:
            question = next(one_hop)
            if question.positives[0] in taken:
                continue
            if kind == "crowded" and texts[question.positives[0]].count(question.answer) != 1:
                continue
            taken.add(question.positives[0])
            questions[kind].append(question)
            gold[kind].append(question.positives[0])
    cut: dict[int, str] = {}
    for position in gold.get("truncated", ()):
        cut[position] = " ".join(pick.choice(list(prose)) for _ in range(2))
        texts[position] = f"{cut[position]} {texts[position]}"
    for question in questions.get("crowded", ()):
        text = texts[question.positives[0]]
        texts += [text.replace(question.answer, pick.choice(NOTHING)) for _ in range(COPIES)]
    rows = [dict(row) for row in protocol.encode_corpus(texts, tokenizer)]
    for position, text in cut.items():
        rows[position]["input_ids"] = protocol.document_row(position, text, tokenizer)["input_ids"]
    bank = model.encode_documents(rows, tokenizer, show_progress=False)
    bank = damaged(bank, gold, seed)
    if "beyond_k" in kinds:
        bank = pushed_down(model, tokenizer, protocol, bank, questions["beyond_k"], seed)
    alone = [
        question
        for kind in ("one_hop", "two_hop", "unanswerable")
        for question in [
            item for item in corpus.questions(3 * healthy, kind, seed + 1) if not taken & set(item.positives)
        ][:healthy]
    ]
    return Planted(bank, questions, alone)


def rows_of(bank: MemoryBank, position: int) -> slice:
    return slice(int(bank.offsets[position]), int(bank.offsets[position + 1]))


def with_keys(bank: MemoryBank, keys: dict[int, Tensor]) -> MemoryBank:
    """The bank with other routing keys, by layer."""
    layers = {layer: DenseLayer(keys[layer], memory.pooled_kv) for layer, memory in bank.layers.items()}
    return MemoryBank(layers, bank.offsets, bank.prefix, bank.documents, bank.origin)


def damaged(bank: MemoryBank, gold: dict[str, list[int]], seed: int) -> MemoryBank:
    """The bank with the keys of some documents damaged, by kind."""
    keys = {layer: memory.routing_keys.clone() for layer, memory in bank.layers.items()}
    made = torch.Generator().manual_seed(seed)
    for layer, own in keys.items():
        whole = bank.layers[layer].routing_keys
        for position in (*gold.get("zeroed", ()), *gold.get("second_hop", ())):
            own[rows_of(bank, position)] = 0
        for position in gold.get("negated", ()):
            own[rows_of(bank, position)] *= -1
        width = bank.layers[layer].pooled_kv.shape[-1]
        turn = torch.linalg.qr(torch.randn(width, width, generator=made)).Q.to(own.dtype)
        for position in gold.get("rotated", ()):
            here = rows_of(bank, position)
            own[here] = (whole[here].unflatten(-1, (-1, width)) @ turn).flatten(-2)
        swapped = gold.get("swapped", ())
        for place, position in enumerate(swapped):
            own[rows_of(bank, position)] = whole[rows_of(bank, swapped[place - 1])][0]
    return with_keys(bank, keys)


def pushed_down(
    model: Any, tokenizer: Any, protocol: PromptProtocol, bank: MemoryBank, questions: Sequence[Question], seed: int
) -> MemoryBank:
    """The bank in which the document of each question ranks from k + 1 to 4 k by the mean of the layers."""
    k, pick = model.config.top_k, random.Random(seed)
    others = [pick.randrange(len(bank)) for _ in questions]
    own = [question.positives[0] for question in questions]
    width = next(iter(bank.layers.values())).pooled_kv.shape[-1]
    low, high = [0.0] * len(own), [1.0] * len(own)
    for _ in range(8):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        keys = {layer: memory.routing_keys.clone() for layer, memory in bank.layers.items()}
        for layer, mixed in keys.items():
            whole = bank.layers[layer].routing_keys
            for position, other, share in zip(own, others, middle, strict=True):
                here = rows_of(bank, position)
                blend = (1 - share) * whole[here] + share * whole[rows_of(bank, other)][:1]
                heads = blend.unflatten(-1, (-1, width))
                mixed[here] = (heads / heads.norm(dim=-1, keepdim=True).clamp_min(1e-9)).flatten(-2)
        made = with_keys(bank, keys)
        scores = router_scores(model, tokenizer, made, [question.text for question in questions], protocol).mean
        for number, position in enumerate(own):
            rank = int((scores[number] > scores[number, position]).sum()) + 1
            if rank <= k:
                low[number] = middle[number]
            elif rank > 4 * k:
                high[number] = middle[number]
            else:
                low[number] = high[number] = middle[number]
    return made
