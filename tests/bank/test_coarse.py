"""Routing by clusters of keys: all clusters read are exact routing, fewer find a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from setups import batch_of, setup, tokens
from torch import Tensor

from msa_hf.bank import coarse_bank, place_bank
from msa_hf.bank.coarse import cluster_keys
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.model.routing_msa import DEFAULT_SCORING, Scoring, routing_request, scoring_of

QUESTIONS = batch_of(tokens(6, 3, 9, seed=5))
LENGTHS = [1 + place % 11 for place in range(60)]


@pytest.fixture(scope="module")
def made() -> Any:
    return setup()


@pytest.fixture(scope="module")
def bank(made: Any) -> Any:
    return made.model.encode_documents(tokens(*LENGTHS, seed=2), show_progress=False)


def asked(made: Any, memory: Any, queries: Tensor, mask: Tensor, k: int) -> list[Any]:
    config = made.model.config
    request = routing_request(config, scoring_of(config, config.similarity), mask, memory.documents.num_rows)
    with memory.snapshot().session(request) as layers:
        return [layer.route(queries, mask, k, DEFAULT_SCORING) for layer in layers.values()]


def queries_for(made: Any) -> tuple[Tensor, Tensor]:
    config, batch, length = made.model.config, 4, 5
    size = batch, length, config.num_attention_heads, config.head_dim
    queries = torch.randn(size, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2] = False
    return queries, mask


@pytest.mark.parametrize("clusters", [1, 7, 60, 10_000])
@pytest.mark.parametrize("k", [1, 5, 80])
def test_reading_all_clusters_is_routing_by_all_keys(made: Any, bank: Any, clusters: int, k: int) -> None:
    queries, mask = queries_for(made)
    coarse = coarse_bank(bank, clusters=clusters, probes=clusters)
    for ours, theirs in zip(asked(made, coarse, queries, mask, k), asked(made, bank, queries, mask, k), strict=True):
        assert torch.equal(ours.documents, theirs.documents)
        torch.testing.assert_close(ours.scores, theirs.scores)
        assert (ours.documents[2] == -1).all()  # no token of it routes
        assert not ours.has_nan


def test_documents_that_were_deleted_are_not_found(made: Any) -> None:
    opened = made.model.open_memory()
    opened.add([{"key": str(place), "input_ids": ids} for place, ids in enumerate(tokens(*LENGTHS, seed=2))])
    for place in range(0, 60, 3):
        opened.delete(str(place))
    bank, (queries, mask) = opened.snapshot(), queries_for(made)
    coarse = coarse_bank(bank, clusters=9, probes=9)
    for ours, theirs in zip(asked(made, coarse, queries, mask, 60), asked(made, bank, queries, mask, 60), strict=True):
        assert torch.equal(ours.documents, theirs.documents)
        assert not set(ours.documents.flatten().tolist()) & set(range(0, 60, 3))


def test_fewer_clusters_find_a_part_with_scores_that_are_no_better(made: Any, bank: Any) -> None:
    queries, mask = queries_for(made)
    exact = asked(made, bank, queries, mask, 60)
    few, more = (asked(made, coarse_bank(bank, clusters=12, probes=probes), queries, mask, 60) for probes in (2, 6))
    for ours, wider, theirs in zip(few, more, exact, strict=True):
        for row in (0, 1, 3):
            scores = dict(zip(theirs.documents[row].tolist(), theirs.scores[row].tolist(), strict=True))
            found = [item for item in ours.documents[row].tolist() if item >= 0]
            assert 0 < len(found) < len(set(wider.documents[row].tolist()) - {-1}) and len(set(found)) == len(found)
            for document, score in zip(found, ours.scores[row].tolist(), strict=False):
                assert score <= scores[document] + 1e-5
            assert set(found) <= set(wider.documents[row].tolist())
            assert ours.scores[row].tolist() == sorted(ours.scores[row].tolist(), reverse=True)


def test_equal_scores_go_to_the_first_document(made: Any) -> None:
    bank = made.model.encode_documents([[5, 6]] * 9 + [[7]] * 3, show_progress=False)
    queries, mask = queries_for(made)
    for ours in asked(made, coarse_bank(bank, clusters=3, probes=3), queries, mask, 12):
        assert sorted(ours.documents[0].tolist()) == list(range(12))
        runs = [[item for item in ours.documents[0].tolist() if (item < 9) == first] for first in (True, False)]
        assert runs == [list(range(9)), [9, 10, 11]]


def test_a_model_answers_alike_with_all_clusters(made: Any, bank: Any) -> None:
    theirs, ours = (made.model(**QUESTIONS, memory=item) for item in (bank, coarse_bank(bank, probes=10_000)))
    torch.testing.assert_close(ours.logits, theirs.logits)
    forced = torch.tensor([[3, -1], [0, 7], [9, 2]])
    theirs, ours = (
        made.model(**QUESTIONS, memory=item, force_documents=forced) for item in (bank, coarse_bank(bank, probes=1))
    )
    torch.testing.assert_close(ours.logits, theirs.logits)  # what is forced needs no clusters
    theirs, ours = (
        made.model(**QUESTIONS, memory=item, output_document_scores=True)
        for item in (bank, coarse_bank(bank, probes=1))
    )
    for layer, found in ours.routing.items():
        torch.testing.assert_close(found.document_scores, theirs.routing[layer].document_scores)


def test_clusters_of_what_lies_in_groups_are_these_groups() -> None:
    directions = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    centers = torch.cat([directions, 3 * directions])  # apart by their length alone, as keys of "dot" may be
    group = torch.arange(400) % 8
    keys = centers[group] + 0.01 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    found = min(
        (cluster_keys(keys, 8, seed=seed) for seed in range(60)),
        key=lambda item: float((keys - item[0][item[1]]).square().sum()),
    )
    torch.testing.assert_close(found[0][found[1]], centers[group], atol=0.02, rtol=0)
    assert torch.equal(cluster_keys(keys, 8, seed=3)[1], cluster_keys(keys, 8, seed=3)[1])


def test_queries_that_are_no_numbers_are_told(made: Any, bank: Any) -> None:
    queries, mask = queries_for(made)
    queries[3, 0, 0, 0] = float("nan")
    assert all(bool(item.has_nan) for item in asked(made, coarse_bank(bank, probes=4), queries, mask, 3))


def test_what_clusters_cannot_do_is_refused(made: Any, bank: Any) -> None:
    with pytest.raises(ValueError, match="not of one in tiers"):
        coarse_bank(place_bank(bank, tiers=Tiers(*[10**12] * 3)))
    with pytest.raises(ValueError, match="without documents"):
        coarse_bank(made.model.open_memory().snapshot())
    with pytest.raises(ValueError, match="`probes` must be at least 1, got 0"):
        coarse_bank(bank, probes=0)
    coarse = coarse_bank(bank)
    with pytest.raises(ValueError, match="call `coarse_bank`"):
        coarse.to("cpu")
    request = routing_request(made.model.config, Scoring(chunks="mean"), torch.ones(1, 2, dtype=torch.bool), 60)
    with pytest.raises(ValueError, match="Give it the bank itself"):
        coarse.session(request)
