"""Prompts that PEFT learns, before the questions of a memory: virtual tokens that are seen and do not route."""

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from setups import Setup, assert_same, batch_of, setup, tokens
from steps import assert_same_gradients, gradients, step
from torch import Tensor

from msa_hf import MSACache
from msa_hf.model.compat_msa import CACHE

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

VIRTUAL = 4
CONFIGS: dict[str, Any] = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=16),
    "cpt": lambda: CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
}
IN_THE_CACHE = ("prefix", "cartridge")
EXACTLY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompted(kind: str, family: str = "qwen3", attention: str = "sdpa") -> tuple[Setup, Any]:
    """A tiny model with a memory, and the same with a learned prompt."""
    made = setup(family, attention, score_bias=True)
    torch.manual_seed(0)
    return made, get_peft_model(copy.deepcopy(made.model), CONFIGS[kind]()).eval()


def by_hand(made: Setup, wrapped: Any, kind: str, batch: dict[str, Tensor], **kwargs: Any) -> Any:
    """The forward with virtual tokens put before the questions here, which alone route."""
    size = len(batch["input_ids"])
    prompt = wrapped.get_prompt(size)
    mask = torch.nn.functional.pad(batch["attention_mask"], (VIRTUAL, 0), value=1)
    routes = batch["attention_mask"].bool()
    if kind in IN_THE_CACHE:
        cache = MSACache(config=made.model.config)
        for number, layer in enumerate(prompt.layers):
            cache.update(layer.keys, layer.values, number)
        ids = {"input_ids": batch["input_ids"], "past_key_values": cache, "routing_mask": routes}
    else:
        embeds = torch.cat([prompt, made.model.get_input_embeddings()(batch["input_ids"])], dim=1)
        ids = {"inputs_embeds": embeds, "routing_mask": torch.nn.functional.pad(routes, (VIRTUAL, 0))}
    return made.model(**ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("family, attention", [("qwen3", "sdpa"), ("gemma2", "eager")])
@pytest.mark.parametrize("kind", CONFIGS)
def test_virtual_tokens_stand_before_the_questions_and_do_not_route(kind, family, attention) -> None:
    """Logits and routing are those of the prompt put there by hand; a question alone and beside longer ones agree."""
    made, wrapped = prompted(kind, family, attention)
    batch = batch_of(tokens(6, 3, 9, seed=5))
    with torch.no_grad():
        ours = wrapped(**batch, memory=made.bank, output_document_scores=True)
        theirs = by_hand(made, wrapped, kind, batch, memory=made.bank, output_document_scores=True)
        assert_same(ours.logits, theirs.logits)
        for layer, found in theirs.routing.items():
            assert torch.equal(ours.routing[layer].documents, found.documents)
            assert_same(ours.routing[layer].document_scores, found.document_scores)
        # Also without an attention mask. (PEFT puts padding behind virtual tokens, where it fills a sliding window.)
        alone = {"input_ids": batch["input_ids"][2:]}
        assert_same(wrapped(**alone, memory=made.bank).logits, ours.logits[2:])
        routes = batch["attention_mask"].bool().clone()
        routes[:, -2:] = False
        fewer = wrapped(**batch, memory=made.bank, routing_mask=routes, output_document_scores=True)
        assert not torch.equal(fewer.routing[3].document_scores, ours.routing[3].document_scores)


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "plain"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_learned_prompt_generates_what_its_forward_predicts(kind, memory) -> None:
    """Greedy tokens with a cache, without one, over beams of one, and alone are the best of the forward's logits."""
    made, wrapped = prompted(kind)
    batch = batch_of(tokens(6, 3, 9, seed=5))
    asked = {"memory": made.bank} if memory else {}
    found = wrapped.generate(**batch, **asked, **EXACTLY)
    assert torch.equal(wrapped.generate(**batch, **asked, **EXACTLY, use_cache=False), found)
    longest = {"input_ids": batch["input_ids"][2:]}
    assert torch.equal(wrapped.generate(**longest, **asked, **EXACTLY), found[2:])
    ids = found[2:]
    routes = {"routing_mask": torch.arange(14)[None] < 9} if memory else {}
    with torch.no_grad():
        logits = wrapped(input_ids=ids, **asked, **routes).logits
    assert torch.equal(logits[:, -6:-1].argmax(-1), ids[:, -5:])
    if memory:
        beams = wrapped.generate(**batch, **asked, **EXACTLY, num_beams=2)
        assert beams.shape == found.shape
        assert torch.equal(wrapped.generate(**batch, **asked, **EXACTLY, num_beams=2, use_cache=False), beams)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_learns_from_a_memory_and_from_a_pool(kind) -> None:
    """Its parameters, and no others, get the gradients of the same prompt put there by hand."""
    made, wrapped = prompted(kind)
    wrapped.train()
    inputs = step().pool()
    del inputs["answer_mask"]
    questions = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = inputs["labels"]
    wide = labels if kind in IN_THE_CACHE else torch.nn.functional.pad(labels, (VIRTUAL, 0), value=-100)
    for ours, theirs in (
        ({"memory": made.bank}, {"memory": made.bank}),
        ({"documents": made.documents}, {"documents": made.documents}),
    ):
        if kind == "cpt":
            output = wrapped(**questions, **ours)  # its loss is a weighted one of its own
            by_ours = output.logits.square().mean()
        else:
            by_ours = wrapped(**questions, labels=labels, **ours).loss
        found = gradients(wrapped, by_ours)
        assert {name.partition(".")[0] for name in found} == {"prompt_encoder"}
        assert all(bool(gradient.any()) for gradient in found.values())
        if kind != "cpt":
            asking = (labels != -100).long().cumsum(1) == 0 if "documents" in theirs else torch.ones_like(labels).bool()
            batch = {**questions}
            routes = questions["attention_mask"].bool() & asking
            expected = gradients(
                wrapped, routed_by_hand(made, wrapped, kind, batch, routes, labels=wide, **theirs).loss
            )
            assert_same_gradients(found, expected)


def routed_by_hand(
    made: Setup, wrapped: Any, kind: str, batch: dict[str, Tensor], routes: Tensor, **kwargs: Any
) -> Any:
    """`by_hand` with other tokens that route."""
    size = len(batch["input_ids"])
    prompt = wrapped.get_prompt(size)
    mask = torch.nn.functional.pad(batch["attention_mask"], (VIRTUAL, 0), value=1)
    if kind in IN_THE_CACHE:
        return made.model(
            input_ids=batch["input_ids"], past_key_values=prompt, routing_mask=routes, attention_mask=mask, **kwargs
        )
    embeds = torch.cat([prompt, made.model.get_input_embeddings()(batch["input_ids"])], dim=1)
    routes = torch.nn.functional.pad(routes, (VIRTUAL, 0))
    return made.model(inputs_embeds=embeds, routing_mask=routes, attention_mask=mask, **kwargs)


def test_packed_rows_have_no_place_for_virtual_tokens() -> None:
    """They are refused with what to pass instead."""
    _, wrapped = prompted("prompt")
    with pytest.raises(ValueError, match=r"Packed rows.*`documents`"):
        wrapped(**step().packed())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_learned_prompt_saves_and_loads(kind, tmp_path) -> None:
    """Onto a fresh model with a memory; a plain model gets PEFT's own class."""
    made, wrapped = prompted(kind)
    batch = batch_of(tokens(6, 3, seed=5))
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(made.model), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch, memory=made.bank).logits, wrapped(**batch, memory=made.bank).logits)
    assert type(get_peft_model(made.base, CONFIGS[kind]())) is PeftModelForCausalLM


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_learned_prompt_stands_aside_and_can_be_copied(kind) -> None:
    """Disabled, or where the model inside is asked, it is not there; a copy and a pickle are models of their own."""
    made, wrapped = prompted(kind)
    batch = batch_of(tokens(6, 3, 9, seed=5))
    found = wrapped.generate(**batch, memory=made.bank, **EXACTLY)
    plain = made.model.generate(**batch, memory=made.bank, **EXACTLY)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(**batch, memory=made.bank, **EXACTLY), plain)
    assert torch.equal(wrapped.base_model.generate(**batch, memory=made.bank, **EXACTLY), plain)
    twins = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))]
    with torch.no_grad():
        for weight in wrapped.base_model.parameters():
            weight.zero_()
    for twin in twins:
        assert torch.equal(twin.generate(**batch, memory=made.bank, **EXACTLY), found)


def test_a_later_turn_of_a_learned_prompt_is_refused() -> None:
    """Its cache counts virtual tokens, the mask does not."""
    made, wrapped = prompted("prompt")
    batch = batch_of(tokens(6, 3, seed=5))
    cache = wrapped.generate(**batch, memory=made.bank, **EXACTLY, return_dict_in_generate=True)[CACHE]
    with pytest.raises(ValueError, match="pass the whole history without"):
        wrapped.generate(**batch, **EXACTLY, **{CACHE: cache})
