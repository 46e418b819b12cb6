"""Wrong passages are wrong: neither the gold one nor its likes; and the corpus routes as a bank does."""

import itertools
import random

import numpy as np
import pytest
import torch
from families import base_model
from numpy.typing import NDArray

from msa_hf import MSAForCausalLM
from msa_hf.training import mining
from msa_hf.training.mining import (
    LexicalIndex,
    TokenStore,
    WrongPassages,
    best_passages,
    encode_corpus,
    in_parts,
    part_sizes,
    recall_of,
)

TEXTS = [
    "the office moved to elm street in may and the old house stands empty",
    "In May, the office moved to Elm Street and the old house stands empty!",  # the same, nearly
    "the office in lisbon sells maps of the old town and of elm forest",
    "six bicycles stand behind the house",
    "moved in may: elm street is the new office, says mira",  # has all words of the query
]


def test_what_may_be_right_is_not_taken_for_wrong() -> None:
    wrong = WrongPassages(TEXTS)
    assert wrong.choose("office moved to elm street", {0}, [0, 1, 2, 3, 4], 5) == [2, 3, 4]
    assert wrong.choose("office moved elm street", {0}, [4, 3, 2, 2, 1, 0], 5) == [3, 2]
    assert wrong.choose("office moved elm street", {0}, [3, 2], 1) == [3]
    assert wrong.choose("bicycles", {3}, [3], 2) == []


def test_words_find_passages() -> None:
    index = LexicalIndex([*TEXTS, "..."])
    assert index.best(["mira says", "bicycles", "?"], 2)[:2, 0].tolist() == [4, 3]
    assert index.best(["mira"], 100).shape == (1, 6)


@pytest.mark.parametrize("layers", [[2], [1, 3]])
def test_a_corpus_routes_as_a_bank(layers: list[int]) -> None:
    """Whatever the parts it was encoded in, with several layers too."""
    pick = random.Random(len(layers))
    rows = [[pick.randrange(3, 128) for _ in range(pick.randint(1, 13))] for _ in range(17)]
    questions = [[pick.randrange(3, 128) for _ in range(pick.randint(1, 6))] for _ in range(5)]
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=layers, chunk_size=4, top_k=3).eval()
    bank = model.encode_documents(rows, show_progress=False)
    encoded_so_far: list[int] = []
    encoded = encode_corpus(
        model, TokenStore(iter(rows)), range(len(rows)), pick.choice([16, 40, 1000]), encoded_so_far.append
    )
    assert sum(encoded_so_far) == len(rows)
    by_layer, total = best_passages(model, encoded, questions, 4)
    done: list[int] = []
    in_small_parts, _ = best_passages(model, encoded, questions, 4, part_tokens=8, done=done.append)
    assert all((in_small_parts[layer] == by_layer[layer]).all() for layer in layers)
    assert sum(done) == len(questions) and len(done) > 2
    for number, question in enumerate(questions):
        with torch.no_grad():
            routing = model(input_ids=torch.tensor([question]), memory=bank, output_document_scores=True).routing
        scores = [routing[layer].document_scores[0] for layer in layers]
        for layer, item in zip(layers, scores, strict=True):
            assert by_layer[layer][number].tolist() == item.topk(4).indices.tolist()
        assert total[number].tolist() == sum(scores).topk(4).indices.tolist()


def test_parts_hold_all_places_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    parts = list(in_parts(lengths, 200))
    assert sorted(itertools.chain(*parts)) == list(range(100))
    assert all(len(part) == 1 or lengths[part].max() * len(part) <= 200 for part in parts)


def test_parts_have_the_least_padding_for_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "LEAST_PART", 20)
    monkeypatch.setattr(mining, "PART_COST", 5)
    monkeypatch.setattr(mining, "ROWS", 2)
    pick = np.random.default_rng(1)

    def cost(sizes: list[int], lengths: NDArray[np.int64], budget: int) -> float:
        """Padded tokens and parts; infinite where a part has too many."""
        ends = np.cumsum(sizes)
        tokens = [int(size * -(-lengths[end - 1] // 4) * 4) for size, end in zip(sizes, ends, strict=True)]
        fits = all(size == 1 or count <= budget for size, count in zip(sizes, tokens, strict=True))
        return sum(max(count, 20) + 5 for count in tokens) if fits else float("inf")

    for budget in (16, 40, 60, 90):
        lengths = np.sort(pick.integers(1, 17, 9))
        found = part_sizes(lengths, budget, multiple=4)
        assert sum(found) == len(lengths)
        least = cost(found, lengths, budget)
        assert least < float("inf")
        ends = np.arange(2, len(lengths), 2)
        for chosen in itertools.product([False, True], repeat=len(ends)):
            sizes = np.diff([0, *ends[list(chosen)], len(lengths)]).tolist()
            assert least <= cost(sizes, lengths, budget), (lengths, budget, found, sizes)
    assert part_sizes(np.array([], dtype=np.int64), 8) == []


@pytest.mark.parametrize("count", [1, 63, 127, 128, 129, 640, 700])
def test_parts_have_few_sizes(count: int) -> None:
    """Multiples of so many rows, but for the last part, where the budget lets them."""
    sizes = part_sizes(np.sort(np.random.default_rng(count).integers(9, 90, count)), 20_000)
    assert sum(sizes) == count and all(size % mining.ROWS == 0 for size in sizes[:-1])
    assert max(part_sizes(np.full(64, 90), 960)) == 10


def test_recall_counts_any_gold_passage() -> None:
    found = np.array([[3, 1], [2, 0], [5, 6]])
    assert recall_of(found, [{1}, {2, 9}, {7}], 2) == pytest.approx(2 / 3)
    assert recall_of(found, [{1}, {2, 9}, {7}], 1) == pytest.approx(1 / 3)
