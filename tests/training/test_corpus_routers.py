"""Routers trained against every document of a corpus: scores as the library's, the loss over all documents."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from small_corpus import notes, tokenizer_of_notes
from torch import Tensor

from msa_hf import MSAForCausalLM
from msa_hf.model.retrofit_msa import attention_layers
from msa_hf.training.contrastive import Temperatures, TokenRows, encode_rows, route_rows, soft_targets
from msa_hf.training.corpus import (
    CorpusRouters,
    CorpusStates,
    corpus_loss,
    corpus_states,
    numbered_rows,
    question_states,
    train_on_corpus,
)
from msa_hf.training.unlabeled import reading_protocol

LENGTHS = [3, 4, 9, 12, 5, 8, 1, 11, 7, 17, 4, 2]


def rows_of(lengths: list[int]) -> TokenRows:
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    counts = torch.tensor(lengths)
    return TokenRows(ids.masked_fill(torch.arange(ids.shape[1]) >= counts[:, None], 0), counts)


def made(**fields: object) -> MSAForCausalLM:
    torch.manual_seed(0)
    options = {"chunk_size": 4, "top_k": 3, "query_reduction": "last", "score_bias": True} | fields
    return MSAForCausalLM.from_base(base_model("llama"), **options).eval()


def asked(model: MSAForCausalLM) -> tuple[TokenRows, TokenRows, CorpusStates, dict[int, Tensor]]:
    """Documents, questions, and what their routers read; the documents in two parts, in another order."""
    documents, questions = rows_of(LENGTHS), rows_of([4, 2, 6, 5, 3])
    order = torch.randperm(len(LENGTHS))
    parts = [(some, TokenRows(documents.ids[some], documents.lengths[some])) for some in order.split(7)]
    corpus = corpus_states(model, parts)
    with torch.no_grad():
        pool = encode_rows(model, documents)
    return documents, questions, corpus, question_states(model, questions, pool, documents.lengths)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_scores_are_those_of_the_library(similarity: str) -> None:
    model = made(similarity=similarity)
    documents, questions, corpus, states = asked(model)
    with torch.no_grad():
        expected = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
    routers = CorpusRouters(model)
    assert len(routers.layers) == 2
    rows = torch.stack([torch.randperm(len(LENGTHS))[:5] for _ in range(5)])
    for layer, scores, some in zip(
        routers.layers, routers.scores(corpus, states), routers.scores_at(corpus, states, rows), strict=True
    ):
        torch.testing.assert_close(scores[:, corpus.rows], expected[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(some, scores.gather(1, rows), atol=1e-6, rtol=1e-5)


def test_documents_stand_by_their_chunks() -> None:
    corpus = asked(made())[2]
    chunks = -(-torch.tensor(LENGTHS) // 4)
    assert chunks[corpus.order].tolist() == sorted(chunks.tolist(), reverse=True)
    assert corpus.order[corpus.rows].tolist() == list(range(len(LENGTHS)))
    assert sum(corpus.counts) == int(chunks.sum()) and corpus.counts == (12, 7, 4, 1, 1)


def test_the_loss_is_the_cross_entropy_over_all_documents() -> None:
    model = made()
    _, _, corpus, states = asked(model)
    routers, temperatures = CorpusRouters(model), Temperatures(2)()
    gold = torch.tensor([[0, -1], [3, 7], [11, -1], [5, 5], [2, 9]])
    teacher, share = torch.randn(5, len(LENGTHS)), torch.tensor([0.0, 0.3, 0.5, 1.0, 0.2])
    excluded = torch.zeros(len(LENGTHS), dtype=torch.bool)
    excluded[4] = True
    positives = torch.zeros(5, len(LENGTHS), dtype=torch.bool)
    for row, places in enumerate(gold.tolist()):
        positives[row, [place for place in places if place >= 0]] = True
    targets = soft_targets(positives, teacher.masked_fill(excluded, float("-inf")), share)
    everything = torch.arange(len(LENGTHS)).expand(5, -1)
    scores = routers.scores_at(corpus, states, everything)
    expected = torch.zeros(())
    for found, temperature, weight in zip(
        [torch.stack(scores).sum(0), *scores], temperatures, (1.0, 0.2, 0.2), strict=True
    ):
        logs = (found / temperature).masked_fill(excluded, float("-inf")).log_softmax(1).masked_fill(excluded, 0.0)
        expected = expected - weight * (targets * logs).sum(1).mean()
    arguments = (routers, corpus, states, gold, temperatures, lambda rows: teacher.gather(1, rows), share)
    loss, _ = corpus_loss(*arguments, excluded=excluded, candidates=len(LENGTHS), layer_weight=0.4)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, [*routers.parameters()], retain_graph=True)
    for given, gradient in zip(torch.autograd.grad(loss, [*routers.parameters()]), wanted, strict=True):
        torch.testing.assert_close(given, gradient, atol=1e-5, rtol=1e-4)


def test_what_is_no_candidate_has_its_part_of_the_denominator() -> None:
    model = made()
    _, _, corpus, states = asked(model)
    routers, temperatures = CorpusRouters(model), Temperatures(2)
    trained = [*routers.parameters(), *temperatures.parameters()]
    gold = torch.tensor([[0], [3], [11], [5], [2]])
    few, hits = corpus_loss(routers, corpus, states, gold, temperatures(), candidates=2)
    every, same = corpus_loss(routers, corpus, states, gold, temperatures(), candidates=len(LENGTHS))
    torch.testing.assert_close(few, every)
    assert hits == same
    wanted = torch.autograd.grad(every, trained)
    for given, gradient in zip(torch.autograd.grad(few, trained), wanted, strict=True):
        torch.testing.assert_close(given, gradient, atol=1e-5, rtol=1e-4)
    temperatures = temperatures().detach()
    # Without a teacher further candidates only add gradients.
    near = torch.tensor([[1, 3], [3, 4], [5, 6], [7, 8], [9, 9]])
    torch.testing.assert_close(
        corpus_loss(routers, corpus, states, gold, temperatures, near=near, candidates=2)[0], few
    )


def test_a_sample_stands_for_the_others_in_expectation() -> None:
    model = made()
    _, _, corpus, states = asked(model)
    routers, temperatures = CorpusRouters(model), Temperatures(2, first=0.3)().detach()
    one = {layer: rows[:1] for layer, rows in states.items()}

    def share(**options: int) -> float:
        with torch.no_grad():
            loss, _ = corpus_loss(
                routers, corpus, one, torch.tensor([[3]]), temperatures, candidates=1, layer_weight=0, **options
            )
        return float(loss.exp())

    torch.manual_seed(1)
    drawn = torch.tensor([share(sampled=5) for _ in range(400)])
    exact, error = share(), drawn.std() / 20
    assert 0 < error < 0.02 * exact
    assert abs(drawn.mean() - exact) < 4 * error
    with pytest.raises(ValueError, match="more than the 2 candidates of a question, got 2"):
        share(sampled=2)


def test_training_finds_the_documents() -> None:
    model = made()
    documents, questions, corpus, states = asked(model)
    routers, gold = CorpusRouters(model), torch.tensor([[0], [3], [11], [5], [2]])
    optimizer = torch.optim.Adam(routers.parameters(), lr=1e-2)
    temperatures = Temperatures(2)().detach()
    for _ in range(60):
        loss, hits = corpus_loss(routers, corpus, states, gold, temperatures, candidates=3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert hits == 1.0
    routers.write(model)
    with torch.no_grad():
        first = corpus.order[torch.stack(routers.scores(corpus, states)).sum(0).argmax(1)]
        again = route_rows(model, questions, encode_rows(model, documents), documents.lengths)
    assert first.tolist() == corpus.order[gold.squeeze(1)].tolist()
    # The first memory layer reads what it read before; others read what it chose.
    layer = routers.layers[0]
    torch.testing.assert_close(routers.scores(corpus, states)[0][:, corpus.rows], again[layer], atol=1e-5, rtol=1e-5)


def test_rows_keep_their_numbers() -> None:
    tokenizer, texts = tokenizer_of_notes(), list(notes().values())
    parts = numbered_rows(tokenizer, texts, max_tokens=20, batch_tokens=90)
    assert sorted(torch.cat([numbers for numbers, _ in parts]).tolist()) == list(range(len(texts)))
    lengths = torch.cat([rows.lengths for _, rows in parts])
    assert len(parts) > 2 and lengths.equal(lengths.sort().values)
    for numbers, rows in parts:
        assert rows.ids.numel() <= 90 or len(numbers) == 1
        for number, ids, length in zip(numbers.tolist(), rows.ids, rows.lengths.tolist(), strict=True):
            assert ids[:length].tolist() == tokenizer(texts[number], add_special_tokens=False)["input_ids"][:20]
    with pytest.raises(ValueError, match="Text 1 has no tokens"):
        numbered_rows(tokenizer, ["one", ""])


def test_a_model_is_trained_on_its_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the page: the router then finds what it was asked for, and nothing else of the model changed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = base_model("llama", vocab_size=300)
    model = MSAForCausalLM.from_base(base, chunk_size=4, query_reduction="last", score_bias=True)
    for part in (model, tokenizer := tokenizer_of_notes(), reading_protocol(tokenizer)):
        part.save_pretrained("my-msa")
    texts = notes()
    rows = [
        {"key": key, "text": text, "question": text.splitlines()[0], "positives": [key]} for key, text in texts.items()
    ]
    for name, more in (("docs.jsonl", []), ("questions.jsonl", [{**rows[0], "positives": []}])):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]), encoding="utf-8")
    page = Path(__file__).parents[2] / "docs" / "finetuning.md"
    (example,) = re.findall(
        r"```python\n([^`]*train_on_corpus.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    example = example.replace(
        "for row in asked])\nmodel", "for row in asked], steps=80, batch_size=32, learning_rate=2e-2)\nmodel"
    )
    exec(compile(example, page.name, "exec"), {})
    finished = MSAForCausalLM.from_pretrained("my-msa-finished")
    differ = [name for name, value in finished.state_dict().items() if not value.equal(model.state_dict()[name])]
    assert differ and all(re.search(r"router_[qk]_proj", name) for name in differ)
    assert finished.config.routers_trained

    def first(model: MSAForCausalLM) -> float:
        documents = numbered_rows(tokenizer, texts.values(), batch_tokens=100_000)
        questions = numbered_rows(tokenizer, [row["question"] + "\n" for row in rows], batch_tokens=100_000)
        ((numbers, kept),), ((order, asked),) = documents, questions
        with torch.no_grad():
            scores = route_rows(model.eval(), asked, encode_rows(model, kept), kept.lengths)
        best = numbers[torch.stack(list(scores.values())).sum(0).argmax(1)]
        return float((best == order).float().mean())

    assert first(finished) > first(model) + 0.3


def test_what_cannot_be_trained_is_refused() -> None:
    for field, name in (("query_reduction", "max"), ("head_reduction", "max"), ("chunk_reduction", "mean")):
        with pytest.raises(ValueError, match=f"this model has .*'{name}'"):
            asked(made(**{field: name}))
        with pytest.raises(ValueError, match=f"this model has .*'{name}'"):
            CorpusRouters(made(**{field: name}))
    with pytest.raises(ValueError, match="no router projections"):
        CorpusRouters(made(shared_router=True))
    with pytest.raises(ValueError, match="needs documents"):
        corpus_states(made(), [])
    numbered = [(torch.arange(3), rows_of([3, 4, 5]))]
    for gold, message in (
        ([[0], [1]], "2 entries for 3 questions"),
        ([[0], [1], []], r"Question 2 is answered by documents \[\] of 3"),
        ([[0], [3], [1]], r"Question 1 is answered by documents \[3\] of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            train_on_corpus(made(), numbered, numbered, gold, show_progress=False)
    options: dict[str, Any]
    for options, message in (
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"among": 0}, "`among` must be at least 1"),
        ({"learning_rate": math.nan}, "`learning_rate` must be above 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            train_on_corpus(made(), numbered, numbered, [[0]] * 3, **options)
    with pytest.raises(ValueError, match="no questions to train on"):
        train_on_corpus(made(), numbered, [], [])
    model = made()
    layer = attention_layers(model)[model.config.memory_layers[0]]
    before = layer.router_k_proj.weight.clone()
    many: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 1e38, "show_progress": False}
    with pytest.raises(ValueError, match="no numbers; the model is as it was"):
        train_on_corpus(model, numbered, numbered, [[0]] * 3, **many)
    assert layer.router_k_proj.weight.equal(before) and not model.config.routers_trained
