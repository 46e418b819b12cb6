"""Every round against a computation from scratch."""

import itertools

import pytest
import torch
from asking import (
    ONE,
    TOKENIZER,
    asker,
    made,
    read,
    script,
)
from scripted import TEXTS

from msa_hf import MSACache


def published_transcript(rounds: list[list[int]], closed: bool) -> tuple[list[int], list[bool]]:
    """The published transcript of question ONE, put together by hand, and which of its tokens route."""
    pieces = [
        (
            "\nPlease answer the question based on the above historical document information\n\n" + ONE + "\n"
            "Please return all documents related to the question\n",
            True,
        ),
        ("<|im_end|>\n<|im_start|>", False),
    ]
    for number, documents in enumerate(rounds):
        pieces.append(("".join(f"[{id}]" for id in documents) + "<|object_ref_end|>", False))
        block = "".join(f"[{id}]. {TEXTS[id]}\n" for id in documents) + "<|object_ref_end|>"
        pieces.append((block, number == len(rounds) - 1))
    if closed:
        text = f"<End-of-Retrieve><|im_start|>The user's question is: {ONE}\n<|object_ref_end|>"
        pieces.append((text, False))
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    routes = [[route] * len(piece) for piece, (_, route) in zip(ids, pieces, strict=True)]
    return list(itertools.chain(*ids)), list(itertools.chain(*routes))


@torch.no_grad()
@pytest.mark.parametrize("rounds", [[[17, 4], [12]], [[5]], []], ids=["two", "one", "none"])
@pytest.mark.parametrize("ends", ["said", "limit"])
def test_every_round_equals_a_computation_from_scratch(rounds, ends) -> None:
    """Routing of every round to the bit, and the answer's tokens: plain calls of the model on the whole transcript.

    The question and the last block route, in the published words. Where the model ends retrieval itself, the answer
    comes from the cache of that round; else everything was prefilled again.
    """
    said = ends == "said"
    interleave = asker("published", max_rounds=len(rounds) + said, documents_per_round=2)
    model, bank, _ = made("published")
    says = ["".join(f"[{id}]" for id in documents) + "<|object_ref_end|>" for documents in rounds]
    with script(interleave, {ONE: [*says, "<End-of-Retrieve>"]}) as script_of:
        answer = interleave.ask(ONE)
    assert read(answer) == [*rounds, *([[]] if said else [])]

    for number, item in enumerate(answer.trace.rounds):
        ids, routes = published_transcript(rounds[:number], closed=False)
        output = model(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes]), use_cache=False)
        assert item.stages["prefill"].tokens == len(ids)
        for layer, found in output.routing.items():
            assert [choice.position for choice in item.chosen[layer]] == found.documents[0].tolist()
            assert [choice.score for choice in item.chosen[layer]] == found.scores[0].tolist()
    ids, routes = published_transcript(rounds, closed=True)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": sorted(interleave.answering.stop_ids())}
    whole = model.generate(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes]), **options)
    assert answer.token_ids == whole[0, len(ids) :].tolist()
    prefilled = [length for length in script_of.fed if length > 1][-1]
    closing = len(ids) - len(published_transcript(rounds, closed=False)[0])
    assert prefilled == (closing if said else len(ids))


@torch.no_grad()
def test_a_reused_cache_equals_turns_of_a_conversation() -> None:
    """`reuse_cache`: each block is a further turn on one cache, where only the block routes; and that is another thing
    than a transcript prefilled again, from the second round on."""
    interleave = asker("published", max_rounds=2, documents_per_round=2, reuse_cache=True)
    model, bank, _ = made("published")
    rounds = [[17, 4], [12]]
    says = {ONE: ["[17][4]<|object_ref_end|>", "[12]<|object_ref_end|>"]}
    with script(interleave, says):
        reused = interleave.ask(ONE)
        again = asker("published", max_rounds=2, documents_per_round=2).ask(ONE)
    kept, fed = MSACache(config=model.config), 0
    for number, item in enumerate(reused.trace.rounds):
        ids, routes = published_transcript(rounds[:number], closed=False)
        new = {"input_ids": torch.tensor([ids[fed:]]), "routing_mask": torch.tensor([routes[fed:]])}
        output = model(**new, memory=bank, past_key_values=kept)
        assert item.stages["prefill"].tokens == len(ids) - fed
        fed = len(ids)
        for layer, found in output.routing.items():
            assert [choice.position for choice in item.chosen[layer]] == found.documents[0].tolist()
            scores = torch.tensor([choice.score for choice in item.chosen[layer]])
            torch.testing.assert_close(scores, found.scores[0], atol=1e-6, rtol=1e-5)
    ids, routes = published_transcript(rounds, closed=True)
    history = {"input_ids": torch.tensor([ids]), "routing_mask": torch.tensor([[False] * fed + routes[fed:]])}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": sorted(interleave.answering.stop_ids())}
    whole = model.generate(**history, memory=bank, past_key_values=kept, **options)
    assert reused.token_ids == whole[0, len(ids) :].tolist()
    assert reused.trace.rounds[0].chosen == again.trace.rounds[0].chosen
    assert reused.trace.rounds[1].chosen != again.trace.rounds[1].chosen
