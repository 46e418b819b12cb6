"""Questions for documents without any: rows to learn from, batches of equal length, sampling."""

import torch
from families import base_model

from msa_hf.training.question_generation import by_length, question_row, sample_questions


def test_only_the_question_and_its_end_are_learnt() -> None:
    ids, labels = question_row([5, 6, 7], [8, 9], [10, 11], 2)
    assert ids == [5, 6, 7, 8, 9, 10, 11, 2]
    assert labels == [-100] * 5 + [10, 11, 2]


def test_batches_hold_every_document_once_and_one_length_each() -> None:
    lengths = torch.tensor([3, 5, 3, 3, 8, 5, 3, 40])
    batches = list(by_length(lengths, batch_tokens=7, largest=10))
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    for batch in batches:
        assert len(lengths[batch].unique()) == 1
        assert len(batch) == 1 or int(lengths[batch].sum()) <= 7
    assert max(len(batch) for batch in by_length(lengths, 1000, largest=2)) == 2


def test_sampling_continues_each_passage_and_tag_as_the_model_would() -> None:
    model = base_model("llama").eval()
    torch.manual_seed(0)
    passages, tags = torch.randint(3, 128, (3, 7)), [[11, 12], [13, 14]]
    found = sample_questions(model, passages, tags, end=2, max_tokens=5, top_p=1e-6)  # the likeliest token alone
    assert found.shape == (3, 2, 5)
    for passage, rows in zip(passages.tolist(), found.tolist(), strict=True):
        for tag, row in zip(tags, rows, strict=True):
            ids = [*passage, *tag]
            for token in row:
                expected = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                assert token == expected
                if token == 2:
                    break
                ids.append(token)


def test_what_follows_the_end_is_the_end() -> None:
    model = base_model("llama").eval()
    passages = torch.randint(3, 128, (2, 4))
    first = sample_questions(model, passages, [[9]], end=-1, max_tokens=3, top_p=1e-6)[0, 0]
    found = sample_questions(model, passages, [[9]], end=int(first[1]), max_tokens=6, top_p=1e-6)[0, 0]
    assert int(found[0]) == int(first[0]) and found[1:].tolist() == [int(first[1])] * 5
