"""Reading candidates again: the likelihood of a query behind each text, learning it, and hits in a new order."""

import pytest
import torch
from families import FAMILIES, base_model
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model

from msa_hf.retrieval import FusionWeights, Hit, QueryLikelihood, add_lexical_index, reread, search
from msa_hf.retrieval.reranking import OPENING
from msa_hf.training.ranking import ranking_loss, ranking_row

TOKENIZER = byte_tokenizer()
MODEL = memory_model(TOKENIZER, COMPACT)
TEXTS = [
    "The quarry is two miles from the cedar.",
    "Larch.",
    "Pine and larch stand beside the quarry's upper road, " * 3,
]
QUERY = "Where is the quarry?"


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def likelihood(model: torch.nn.Module, text: list[int], query: list[int]) -> float:
    """By one row at a time, token after token."""
    given = [*text, *tokens(OPENING)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*given, *query]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(given) + place - 1, token]) for place, token in enumerate(query))


@pytest.mark.parametrize("batch_tokens", [1, 150, 32_768])
def test_scores_are_the_likelihoods_of_the_query(batch_tokens: int) -> None:
    reader = QueryLikelihood(MODEL, TOKENIZER, longest=100, batch_tokens=batch_tokens)
    expected = [likelihood(MODEL, tokens(text)[:100], tokens(QUERY)) for text in TEXTS]
    torch.testing.assert_close(torch.tensor(reader.scores(f" {QUERY}\n", TEXTS)), torch.tensor(expected))


@pytest.mark.parametrize("family", [name for name in ("llama", "gemma2", "qwen3_moe") if name in FAMILIES])
def test_any_causal_model_reads(family: str) -> None:
    model = base_model(family).eval()
    vocabulary = model.config.get_text_config().vocab_size
    texts = [[number % vocabulary for number in range(5, 5 + length)] for length in (3, 17, 8)]
    query = [9, 4, 30]
    reader = QueryLikelihood(model, TOKENIZER)
    reader._opening = [7, 11]
    found = reader.token_scores(query, texts)
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([[*text, 7, 11, *query]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = sum(float(logits[len(text) + 1 + place, token]) for place, token in enumerate(query))
        assert score == pytest.approx(expected, abs=1e-4)


def test_nothing_to_read_and_nothing_to_ask() -> None:
    reader = QueryLikelihood(MODEL, TOKENIZER)
    assert reader.scores(QUERY, []) == []
    with pytest.raises(ValueError, match="no tokens"):
        reader.scores("  ", TEXTS)
    for name in ("longest", "batch_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
            QueryLikelihood(MODEL, TOKENIZER, **{name: 0})


def test_the_loss_is_that_of_the_scores() -> None:
    """Cross entropy over candidates, of which one question has fewer, and the likelihood of the right one."""
    reader = QueryLikelihood(MODEL, TOKENIZER, longest=50)
    questions, candidates = [QUERY, "What stands?"], [[0, 1, 2], [2, 1]]
    rows = [
        [ranking_row(tokens(TEXTS[place]), tokens(OPENING), tokens(question), 50) for place in places]
        for question, places in zip(questions, candidates, strict=True)
    ]
    rows[1].append(([0], [-100]))
    width = max(len(ids) for question in rows for ids, _ in question)
    ids = torch.tensor([[row + [0] * (width - len(row)) for row, _ in question] for question in rows])
    labels = torch.tensor([[row + [-100] * (width - len(row)) for _, row in question] for question in rows])
    right = torch.tensor([2, 0])
    found = ranking_loss(MODEL, ids, labels, right, likelihood_weight=0.3)
    expected = torch.tensor(0.0)
    for question, places, place in zip(questions, candidates, right.tolist(), strict=True):
        scores = torch.tensor(reader.scores(question, [TEXTS[place] for place in places]))
        expected += -scores.log_softmax(0)[place] / 2 - 0.3 * scores[place] / len(tokens(question)) / 2
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
    found.backward()
    assert MODEL.get_input_embeddings().weight.grad is not None
    MODEL.zero_grad()


def hits_of_words() -> list[Hit]:
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    return search(bank, "cedar quarry pine larch", k=4, mode="lexical")


def test_hits_are_ranked_anew() -> None:
    pytest.importorskip("tantivy")
    hits, reader = hits_of_words(), QueryLikelihood(MODEL, TOKENIZER)
    assert len(hits) > 1
    scores = dict(zip((hit.key for hit in hits), reader.scores(QUERY, [hit.text or "" for hit in hits]), strict=True))
    by_reading = reread(QUERY, hits, reader, FusionWeights(("found", "reader"), "reader"))
    assert [hit.key for hit in by_reading] == sorted(scores, key=lambda key: -scores[key])
    assert [hit.rank for hit in by_reading] == [hit.why.reader.rank for hit in by_reading if hit.why.reader]
    assert all(hit.why.reader.score == scores[hit.key] for hit in by_reading if hit.why.reader)
    as_found = reread(QUERY, hits, reader, FusionWeights(("found", "reader"), "found"))
    assert [hit.key for hit in as_found] == [hit.key for hit in hits] and as_found[0].why.lexical == hits[0].why.lexical
    both = reread(QUERY, hits, reader)
    assert {hit.key for hit in both} == set(scores) and both[0].why.fused_by == "reciprocal ranks"
    assert reread(QUERY, [], reader) == []


def test_texts_that_are_not_kept_are_named() -> None:
    pytest.importorskip("tantivy")
    from dataclasses import replace

    hits = hits_of_words()
    with pytest.raises(ValueError, match=f"does not keep the text of {hits[1].key!r}"):
        reread(QUERY, [hits[0], replace(hits[1], text=None)], QueryLikelihood(MODEL, TOKENIZER))
