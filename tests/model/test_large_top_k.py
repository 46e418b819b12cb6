"""`top_k` above the number of documents takes all of them, and costs no more than that."""

import logging
from typing import Any

import pytest
import torch
from families import COMMON
from setups import Setup, assert_same, batch_of, setup, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf import MSAForCausalLM

HUGE = 10**9


def with_top_k(made: Setup, count: int) -> Any:
    made.model.config.top_k = count
    return made.model


@pytest.mark.parametrize("family, attention", [("qwen3", "sdpa"), ("gemma2", "eager")])
@pytest.mark.parametrize("fields", [{}, {"score_bias": True}, {"query_reduction": "mean"}], ids=["max", "bias", "mean"])
def test_all_documents_are_taken(family: str, attention: str, fields: dict[str, Any]) -> None:
    """A billion, and one too many, choose what exactly as many do, at the positions that `top_k` says."""
    made = setup(family, attention, **fields)
    batch = batch_of(tokens(9, 2, seed=12))
    count = len(made.documents)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 20
    with torch.no_grad():
        expected = with_top_k(made, count)(**batch, memory=made.bank, position_ids=positions)
        for top_k in (count + 1, HUGE):
            found = with_top_k(made, top_k)(**batch, memory=made.bank, position_ids=positions)
            assert torch.equal(found.logits, expected.logits)
            for layer, routing in found.routing.items():
                assert torch.equal(routing.documents[:, :count], expected.routing[layer].documents)
                assert routing.documents[:, :count].sort(1).values.tolist() == [list(range(count))] * 2
                assert (routing.documents[:, count:] == -1).all() and routing.documents.shape[1] <= 4096
        with_top_k(made, count + 1)
        assert made.model.config.first_position == 3 + count + 1
        made.reference.start()
        turn = made.reference.turn(tokens(9, 2, seed=12)[0], [True] * 9)
        assert_same(made.model(**batch, memory=made.bank).logits[0], turn.logits)


@pytest.mark.parametrize("top_k", [300, 10**8])
def test_generating_beyond_the_positions_says_so(top_k: int, caplog: pytest.LogCaptureFixture) -> None:
    """It runs, from a model made with such a `top_k` as well, and the log names the remedy."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        made = setup(top_k=top_k)
        found = made.model.generate(torch.tensor(tokens(9, seed=top_k)), memory=made.bank, max_new_tokens=4)
    finally:
        logger.removeHandler(caplog.handler)
    assert found.shape[1] > 9
    assert f"`top_k={top_k}` puts the first token of a question at position {top_k + 3}" in caplog.text
    assert "`model.config.top_k = 5`" in caplog.text


def test_a_table_of_positions_has_an_end() -> None:
    """A model that looks positions up is refused by name, not by an index that is out of range."""
    fields = {name: value for name, value in COMMON.items() if name != "intermediate_size"}
    config = AutoConfig.for_model("opt", ffn_dim=48, word_embed_proj_dim=32, **fields)
    model = MSAForCausalLM.from_base(AutoModelForCausalLM.from_config(config), chunk_size=3, top_k=300)
    bank = model.encode_documents(tokens(4, 7, seed=1), show_progress=False)
    with pytest.raises(ValueError, match=r"`top_k=300` puts .* 256 positions. 2 documents need"):
        model.generate(torch.tensor(tokens(5)), memory=bank, max_new_tokens=2)
    model.config.top_k = 2
    assert model.generate(torch.tensor(tokens(5)), memory=bank, max_new_tokens=2, min_new_tokens=2).shape == (1, 7)


def test_training_with_fewer_documents() -> None:
    """A pool smaller than `top_k` is read whole."""
    made = setup(top_k=HUGE)
    batch = batch_of(tokens(9, 4, seed=12))
    step = {"documents": made.documents, "positive_docs": torch.tensor([[0], [1]])}
    positions = torch.arange(9).expand(2, 9) + 20
    losses = [
        with_top_k(made, count)(**batch, **step, position_ids=positions).loss for count in (HUGE, len(made.documents))
    ]
    assert torch.equal(*losses)
