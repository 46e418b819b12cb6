"""Pools of documents: gradient caching, routing as the library's, compiled layers."""

from functools import partial
from pathlib import Path

import pytest
import torch
import two_pools
from families import base_model
from forking import ended, forked
from sums import Sums
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from msa_hf import MSAForCausalLM
from msa_hf.data.questions import IGNORED
from msa_hf.training import contrastive
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import (
    Temperatures,
    TokenRows,
    contrastive_step,
    encode_rows,
    pool_loss,
    route_rows,
    soft_targets,
)
from msa_hf.training.ranking import ranking_loss
from msa_hf.training.reading import answer_losses, plain_reading_loss, reading_loss

QUESTIONS, DOCUMENTS = 5, 9


def rows_of(lengths: list[int], seed: int) -> TokenRows:
    torch.manual_seed(seed)
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    counts = torch.tensor(lengths)
    return TokenRows(ids.masked_fill(torch.arange(ids.shape[1]) >= counts[:, None], 0), counts)


def part(rows: TokenRows, start: int, stop: int) -> TokenRows:
    return TokenRows(rows.ids[start:stop], rows.lengths[start:stop])


@pytest.fixture(params=["last", "max"])
def model(request: pytest.FixtureRequest) -> MSAForCausalLM:
    """Two memory layers, so that routing in the second sees what the first attended to."""
    made = MSAForCausalLM.from_base(
        base_model("llama"), chunk_size=4, top_k=3, query_reduction=request.param, score_bias=True
    )
    assert len(made.config.memory_layers) > 1
    return made.eval()


@pytest.fixture
def documents() -> TokenRows:
    return rows_of([3, 4, 9, 12, 5, 8, 1, 11, 7], 0)


@pytest.fixture
def questions() -> TokenRows:
    return rows_of([4, 2, 6, 5, 3], 1)


def targets() -> Tensor:
    torch.manual_seed(2)
    positives = torch.zeros(QUESTIONS, DOCUMENTS, dtype=torch.bool)
    positives[torch.arange(QUESTIONS), torch.tensor([0, 3, 4, 8, 2])] = True
    positives[1, 6] = True
    return soft_targets(positives, torch.randn(QUESTIONS, DOCUMENTS), torch.tensor([0.0, 0.2, 0.5, 1.0, 0.3]))


def test_soft_targets_share_between_positives_and_teacher() -> None:
    found = targets()
    torch.testing.assert_close(found.sum(1), torch.ones(QUESTIONS))
    assert found[0].tolist() == [1.0] + [0.0] * 8
    assert found[1, 3] > 0.4 and found[1, 6] > 0.4


def test_scores_are_those_of_the_library(model, documents, questions) -> None:
    bank = model.encode_documents(
        [row[:length].tolist() for row, length in zip(documents.ids, documents.lengths, strict=True)],
        show_progress=False,
    )
    with torch.no_grad():
        found = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
        for number in range(QUESTIONS):
            ids = questions.ids[number : number + 1, : questions.lengths[number]]
            routing = model(input_ids=ids, memory=bank, output_document_scores=True).routing
            for layer, scores in found.items():
                torch.testing.assert_close(scores[number], routing[layer].document_scores[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("document_weight", "held"), [(0.0, 0), (0.3, 0), (0.3, 1), (0.0, 2), (0.3, 3)])
def test_cached_gradients_are_those_of_the_whole_pool(
    model, documents, questions, document_weight: float, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    temperatures = Temperatures(len(model.config.memory_layers))
    wanted = targets()
    scores = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
    loss = pool_loss(scores, wanted, temperatures(), 0.5, document_weight)
    loss.backward()
    expected = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    scale = temperatures.logarithm.grad.clone()
    model.zero_grad(set_to_none=True)
    temperatures.zero_grad()

    encoded = []

    def encode(model, rows):
        encoded.append((rows.ids.shape[0], torch.is_grad_enabled()))
        return encode_rows(model, rows)

    monkeypatch.setattr(contrastive, "encode_rows", encode)
    parts = [part(documents, 0, 2), part(documents, 2, 3), part(documents, 3, 9)]
    asked = [part(questions, 0, 3), part(questions, 3, 5)]
    tokens = [sum(rows.ids.numel() for rows in rows_of) for rows_of in (asked, parts[3 - held :])]
    result = contrastive_step(model, parts, asked, wanted, temperatures, 0.5, document_weight, held_tokens=sum(tokens))
    assert encoded[:3] == [(2, held > 2), (1, held > 1), (6, held > 0)]
    assert encoded[3:] == [(6, True), (1, True), (2, True)][held:]
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(temperatures.logarithm.grad, scale)
    got = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    assert got.keys() == expected.keys()
    assert any("router_k_proj" in name for name in got) and any("router_score_bias" in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_compiled_layers_compute_the_same_and_leave_no_trace(model, documents, questions) -> None:
    with torch.no_grad():
        before = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
        with compiled_layers(model, backend="eager"):
            inside = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
        for layer, scores in before.items():
            torch.testing.assert_close(inside[layer], scores)
    assert not any("forward" in module.__dict__ for module in model.modules())


def gradients_of_a_step(model: MSAForCausalLM, documents: TokenRows, questions: TokenRows) -> dict[str, Tensor]:
    """Of a pool, of a row that reads it and of one that does not."""
    result = contrastive_step(
        model,
        [part(documents, 0, 4), part(documents, 4, len(documents.lengths))],
        [questions],
        targets()[: len(questions.lengths), : len(documents.lengths)],
        Temperatures(len(model.config.memory_layers)),
    )
    ids, labels = questions.ids[:2], questions.ids[:2].masked_fill(~questions.mask[:2], -100)
    loss = reading_loss(model, ids, labels, questions.routes[:2], result.pool, result.lengths)
    (loss + plain_reading_loss(model, ids, labels)).backward()
    found = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_compiled_layers_give_the_same_gradients(model, documents, questions) -> None:
    expected = gradients_of_a_step(model, documents, questions)
    with compiled_layers(model, backend="eager"):
        found = gradients_of_a_step(model, documents, questions)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_rows_of_other_numbers_and_lengths_compile_nothing_more() -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), chunk_size=4, top_k=3, score_bias=True).eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    counts = []
    with compiled_layers(model, backend=counter):
        for number, (longest, asked) in enumerate(((9, 5), (12, 4), (11, 3), (7, 5), (14, 4))):
            documents = rows_of([3, 4, 9, 5, 5, 8, 2, longest, 7][number % 3 :], number)
            gradients_of_a_step(model, documents, rows_of([4, 2, 6, 5, number + 3][-asked:], number))
            counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1:] == counts[1:2] * 4


def test_layers_with_a_memory_are_compiled_around_it(documents, questions) -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), chunk_size=4, top_k=3, memory_layers=[0, 1, 2, 3])
    model.eval()
    assert model.config.num_hidden_layers == 4
    torch._dynamo.reset()
    counter = CompileCounter()
    with compiled_layers(model, backend=counter), torch.no_grad():
        route_rows(model, questions, encode_rows(model, documents), documents.lengths)
    assert counter.op_count > 0


def test_rows_are_launched_without_a_look_at_their_masks(model, documents, questions) -> None:
    """For which a GPU would have to come to the end of the rows before."""
    labels, routes = questions.ids.masked_fill(~questions.mask, IGNORED), questions.routes
    with Sums() as sums:
        pool = encode_rows(model, documents)
        route_rows(model, questions, pool, documents.lengths)
        reading_loss(model, questions.ids, labels, routes, pool, documents.lengths)
        plain_reading_loss(model, questions.ids, labels)
        answer_losses(model, questions.ids, labels)
        ids, right = questions.ids[:4].view(2, 2, -1), torch.zeros(2, dtype=torch.long)
        ranking_loss(model, ids, labels[:4].view(2, 2, -1), right)
    assert not {documents.ids.shape, questions.ids.shape, questions.ids[:4].shape} & set(sums.shapes)


def test_compiled_layers_refuse_a_prefix() -> None:
    model = MSAForCausalLM.from_base(base_model("llama"), prefix_token_ids=[5, 6])
    with pytest.raises(ValueError, match="prefix"), compiled_layers(model):
        pass


def test_two_processes_share_a_pool(tmp_path: Path) -> None:
    both = [forked(partial(two_pools.main, str(tmp_path / "store"), rank)) for rank in range(2)]
    assert ended(*both) == [0, 0]
