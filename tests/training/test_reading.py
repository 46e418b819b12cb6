"""Rows that read: what is learnt of them, and their loss with a memory."""

import random
import re

import torch
from scripted import byte_tokenizer, memory_model

from msa_hf.generation import COMPACT
from msa_hf.training.contrastive import TokenRows, encode_rows
from msa_hf.training.reading import answer_losses, plain_reading_loss, reading_loss, reading_row

TOKENIZER = byte_tokenizer()


def test_only_the_answer_is_learnt_and_the_block_routes() -> None:
    row = reading_row(TOKENIZER, COMPACT, "Who?", ["Ann came.", "Bo left."], "Ann", random.Random(0))
    learnt = [token for token, label in zip(row.ids, row.labels, strict=True) if label != -100]
    assert TOKENIZER.decode(learnt) == "Ann<|end|>"
    assert row.labels[-len(learnt) :] == learnt
    text = TOKENIZER.decode([token for token, routes in zip(row.ids, row.routes, strict=True) if routes])
    assert "Ann came." in text and "Bo left." in text
    alone = reading_row(TOKENIZER, COMPACT, "Who?", [], "nobody", random.Random(0))
    assert "Ann" not in TOKENIZER.decode(alone.ids) and any(alone.routes)


def test_texts_are_numbered_as_in_banks_of_any_size() -> None:
    pick = random.Random(0)
    rows = [reading_row(TOKENIZER, COMPACT, "Who?", ["Ann came."] * 12, "Ann", pick) for _ in range(60)]
    found = [re.findall(r"\d+", TOKENIZER.decode(row.ids)) for row in rows]
    digits = {max(map(len, numbers)) for numbers in found}
    assert {2, 3, 4, 5, 6} <= digits and all(len(set(numbers)) == 12 for numbers in found)


def test_the_loss_is_that_of_the_training_forward() -> None:
    model = memory_model(TOKENIZER, COMPACT, score_bias=True)
    model.config.aux_loss_weight = 0.0
    torch.manual_seed(0)
    documents = TokenRows(torch.randint(5, 60, (4, 9)), torch.tensor([9, 9, 9, 9]))
    rows = [
        reading_row(TOKENIZER, COMPACT, question, ["Ann came."], "Ann", random.Random(1))
        for question in ("Who?", "And?")
    ]
    ids, labels = torch.tensor([row.ids for row in rows]), torch.tensor([row.labels for row in rows])
    routes = torch.tensor([row.routes for row in rows])
    expected = model(input_ids=ids, labels=labels, routing_mask=routes, documents=documents.ids).lm_loss
    with torch.no_grad():
        pool = encode_rows(model, documents)
    found = reading_loss(model, ids, labels, routes, pool, documents.lengths)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_what_an_answer_costs_is_the_sum_over_its_own_tokens() -> None:
    model = memory_model(TOKENIZER, COMPACT)
    texts, answers = ["Ann came.", "Bo left early, and nobody saw it.", "It rains."], ["Ann", "nobody at all", "it"]
    made = [
        reading_row(TOKENIZER, COMPACT, "Who?", [text], answer, random.Random(2))
        for text, answer in zip(texts, answers, strict=True)
    ]
    alone = []
    for row in made:
        output = model(input_ids=torch.tensor([row.ids]))
        shares = output.logits[0, :-1].log_softmax(1)
        costs = [-shares[place, label] for place, label in enumerate(row.labels[1:]) if label != -100]
        assert len(costs) == len([label for label in row.labels if label != -100])
        alone.append(torch.stack(costs).sum())
    width = max(len(row.ids) for row in made)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in made])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in made])
    found = answer_losses(model, ids, labels)
    torch.testing.assert_close(found, torch.stack(alone))
    assert not found.requires_grad
    mean = plain_reading_loss(model, ids, labels)
    torch.testing.assert_close(found.sum() / (labels != -100).sum(), mean.detach())
