"""Answers and their diagnosis do not depend on what else is asked, on bases whose positions depend on the batch."""

from typing import Any

import pytest
import torch
from scripted import COMPACT, TEXTS, bank_of, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf import MSAForCausalLM
from msa_hf.evaluation.prompting import Writer
from msa_hf.generation import MemoryInterleave
from msa_hf.training import diagnose

TOKENIZER = byte_tokenizer()
QUESTIONS = ["Where?", "How far off is the reef, in miles, from the fjord by the heath and the inlet of the marsh?"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 48,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


@pytest.fixture(scope="module", params=["longrope", "dynamic"])
def model(request: pytest.FixtureRequest) -> Any:
    """A model whose frequencies would change between the short question and the long one."""
    switching = request.param == "longrope"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi3" if switching else "llama",
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024 if switching else 48,
        rope_parameters=LONGROPE if switching else DYNAMIC,
        **({"original_max_position_embeddings": 48, "sliding_window": None} if switching else {}),
        pad_token_id=TOKENIZER.pad_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.25)
    return MSAForCausalLM.from_base(base, chunk_size=8, top_k=4)


@pytest.mark.parametrize("reuse", [False, True], ids=["again", "reuse"])
def test_answers(model: Any, reuse: bool) -> None:
    bank = bank_of(model, TOKENIZER, COMPACT, TEXTS[:6])
    asker = MemoryInterleave(
        model, TOKENIZER, bank, COMPACT, max_rounds=2, max_new_tokens=12, router_may_end=False, reuse_cache=reuse
    )
    together = asker.ask(QUESTIONS)
    for question, answer in zip(QUESTIONS, together, strict=True):
        alone = asker.ask(question)
        assert alone.token_ids == answer.token_ids
        assert [source.key for source in alone.documents] == [source.key for source in answer.documents]
        scores = [[source.score for source in item.documents] for item in (alone, answer)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_answers_without_the_memory(model: Any) -> None:
    bank = bank_of(model, TOKENIZER, COMPACT, TEXTS[:6])
    writer = Writer(model, TOKENIZER, bank, COMPACT, 12)
    prompts = [writer.prompt(question, [])[0] for question in QUESTIONS]
    assert len(prompts[0][0]) < 30 and len(prompts[1][0]) > 60
    together = writer.write(prompts)
    assert together == [writer.write([prompt])[0] for prompt in prompts]


def test_diagnosis(model: Any) -> None:
    bank = bank_of(model, TOKENIZER, COMPACT, TEXTS[:6])
    judged = [{"question": question, "answer": "10 miles", "positives": ["0"]} for question in QUESTIONS]
    conditions = ["routed", "gold_text", "no_memory", "ids"]
    found = [
        diagnose(model, TOKENIZER, bank, judged, COMPACT, conditions=conditions, max_new_tokens=6, batch_size=size)
        for size in (1, 2)
    ]
    assert found[0].predictions == found[1].predictions and found[0].ids == found[1].ids
