"""The two interfaces of a memory: every kind has them, and whatever has them is a memory."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from setups import Setup, batch_of, build, setup, tokens
from torch import Tensor

from msa_hf.bank import place_bank, shard_bank
from msa_hf.bank.sharded.layer import ShardedLayer
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.layer import TieredLayer
from msa_hf.model.chunks_msa import ContextRows
from msa_hf.model.dense_layer_msa import DenseLayer, select_scored
from msa_hf.model.document_rows_msa import scores_at
from msa_hf.model.memory_msa import LayerMemory, Memory, MemoryBank
from msa_hf.model.routing_msa import (
    SIMILARITIES,
    RoutingRequest,
    Scoring,
    Selection,
    Similarity,
    normalize_heads,
    routing_request,
    score_documents,
    scoring_of,
)
from msa_hf.ops import adapters

QUESTIONS = batch_of(tokens(6, 3, 9, seed=5))
TIERS = Tiers(*[10**12] * 3)


@pytest.fixture(autouse=True)
def plain_pytorch() -> Iterator[None]:
    """Everything in plain PyTorch, so that bits can be compared."""
    adapters.unregister()
    yield
    adapters.register()


def opened(made: Setup) -> Any:
    bank = made.model.open_memory()
    bank.add([{"key": str(place), "input_ids": document} for place, document in enumerate(made.documents)])
    return bank


MEMORIES = {
    "bank": (lambda made: made.bank, DenseLayer),
    "store": (opened, DenseLayer),
    "tiered": (lambda made: place_bank(made.bank, tiers=TIERS), TieredLayer),
    "sharded": (lambda made: shard_bank(made.bank), ShardedLayer),
}


def members(protocol: Any) -> list[str]:
    return [name for name in vars(protocol) if not name.startswith("_")]


@pytest.mark.parametrize("kind", MEMORIES)
@torch.no_grad()
def test_every_kind_of_memory_has_both_interfaces(kind: str) -> None:
    """All members with the arguments that the protocols name; and the same answers."""
    made = setup()
    make, layer_class = MEMORIES[kind]
    memory: Memory = make(made)
    for name in members(Memory):
        wanted = vars(Memory)[name]
        assert isinstance(wanted, property) or parameters(getattr(type(memory), name)) == parameters(wanted)
        assert getattr(memory, name) is not None
    config, mask = made.model.config, QUESTIONS["attention_mask"].bool()
    scoring = scoring_of(config, config.similarity)
    request = routing_request(config, scoring, mask, len(memory.documents), inputs=QUESTIONS["input_ids"])
    with memory.snapshot().session(request) as layers:
        assert list(layers) == config.memory_layers
        for layer in layers.values():
            assert type(layer) is layer_class
            for name in members(LayerMemory):
                assert parameters(getattr(layer_class, name)) == parameters(vars(LayerMemory)[name])
    theirs, ours = (made.model(**QUESTIONS, memory=item) for item in (made.bank, memory))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-6)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_is_no_memory_is_refused() -> None:
    made = setup()
    for nothing in ({}, "bank", made.model):
        with pytest.raises(TypeError, match="`memory` must be a MemoryBank"):
            made.model(**QUESTIONS, memory=nothing)


# A kind of memory that the library does not know: documents in a list, each with tensors of its own -------------------


class ListedLayer:
    def __init__(self, memory: DenseLayer, offsets: Tensor) -> None:
        self.keys = [memory.routing_keys[start:end].clone() for start, end in pairwise(offsets.tolist())]
        self.pooled_kv = [memory.pooled_kv[start:end].clone() for start, end in pairwise(offsets.tolist())]

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        offsets = torch.tensor([0, *map(len, self.keys)]).cumsum(0)
        scores = score_documents(queries, mask, torch.cat(self.keys), offsets, scoring)
        return scores if documents is None else scores_at(scores, documents)

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        return select_scored(self.score(queries, mask, scoring), k)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        samples, columns = [], []
        for row in selection.documents.tolist():
            chosen = sorted(document for document in row if document >= 0)
            samples.append(torch.cat([self.pooled_kv[0][:0], *(self.pooled_kv[document] for document in chosen)]))
            columns.append(torch.tensor([row.index(d) for d in chosen for _ in self.pooled_kv[d]], dtype=torch.long))
        states = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True).to(dtype)
        index = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True)
        row_mask = torch.arange(index.shape[1]) < torch.tensor(list(map(len, columns)))[:, None]
        keys, values = (part.transpose(1, 2) for part in states.unbind(2))
        return ContextRows(keys, values, row_mask, index)


class ListedMemory:
    def __init__(self, bank: MemoryBank) -> None:
        self.documents, self.origin, self.prefix = bank.documents, bank.origin, bank.prefix
        self.layers = {layer: ListedLayer(memory, bank.offsets) for layer, memory in bank.layers.items()}

    def snapshot(self) -> "ListedMemory":
        return self

    def session(self, request: RoutingRequest) -> AbstractContextManager[dict[int, ListedLayer]]:
        return nullcontext(self.layers)


@pytest.mark.parametrize("fields", [{}, {"score_bias": True}, {"head_reduction": "max"}, {"top_k": 9}], ids=str)
@torch.no_grad()
def test_a_new_kind_of_memory_takes_three_methods(fields: dict[str, Any]) -> None:
    """It answers the same bits as the dense one, in a forward and in generate()."""
    made = setup(**fields)
    memory: Memory = ListedMemory(made.bank)
    ours, theirs = (made.model(**QUESTIONS, memory=item) for item in (memory, made.bank))
    assert torch.equal(ours.logits, theirs.logits)
    for layer, routing in theirs.routing.items():
        assert torch.equal(ours.routing[layer].documents, routing.documents)
        assert torch.equal(ours.routing[layer].scores, routing.scores)
    options = {**QUESTIONS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(*(made.model.generate(memory=item, **options) for item in (memory, made.bank)))


@torch.no_grad()
def test_a_new_similarity_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, encoding and routing know it: here the cosine halved, whose scores are halved to the bit."""
    halved = Similarity(lambda queries: normalize_heads(queries) / 2, normalized_keys=True)
    monkeypatch.setitem(SIMILARITIES, "half", halved)
    cosine, half = setup(similarity="cosine"), build(similarity="half")
    theirs, ours = (made.model(**QUESTIONS, memory=made.bank) for made in (cosine, half))
    for layer, routing in theirs.routing.items():
        assert torch.equal(half.bank.layers[layer].routing_keys, cosine.bank.layers[layer].routing_keys)
        assert torch.equal(ours.routing[layer].documents, routing.documents)
        assert torch.equal(ours.routing[layer].scores, routing.scores / 2)
    assert torch.equal(ours.logits, theirs.logits)
    with pytest.raises(ValueError, match=r"must be one of \('cosine', 'dot', 'half'\)"):
        build(similarity="hafl")


def test_names_of_before_warn() -> None:
    made = setup()
    layer = made.bank.layer(made.model.config.memory_layers[0])
    with pytest.warns(DeprecationWarning, match="`DenseLayer.content` is `pooled_kv` now"):
        assert layer.content is layer.pooled_kv


def test_chunks_of_no_documents_are_not_asked() -> None:
    layer = DenseLayer(torch.ones(2, 4), torch.ones(2, 2, 1, 4))
    with pytest.raises(ValueError, match=r"say whose they are with `layer.over\(layout\)`"):
        layer.route(torch.ones(1, 1, 1, 4), torch.ones(1, 1, dtype=torch.bool), 1, Scoring())
