"""Without a memory a model does what its base does: generation with transformers' options, and export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from setups import setup
from torch import Tensor
from transformers import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList, TemperatureLogitsWarper

from msa_hf.model.compat_msa import CACHE

IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7], [11, 12, 13, 14, 11, 12, 13, 14]])
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
OUTPUTS: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": OUTPUTS,
    "without a cache": {**OUTPUTS, "use_cache": False},
    "sampled": {**OUTPUTS, "do_sample": True, "top_k": 7, "top_p": 0.9, "temperature": 1.3},
    "several": {"do_sample": True, "num_return_sequences": 3, "min_p": 0.01},
    "beams": {**OUTPUTS, "num_beams": 3},
    "sampled beams": {**OUTPUTS, "num_beams": 2, "do_sample": True},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]]},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "in pieces": {"prefill_chunk_size": 3},
    "processors": {
        "do_sample": True,
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.7)]),
        "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1000.0)]),
    },
}


def equal(one: Any, other: Any) -> bool:
    """Whether tensors, or what holds tensors, are equal to the bit."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return True


def generated(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"input_ids": IDS, "attention_mask": PADDED, "max_new_tokens": 5, **options}
    return model.generate(**options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_is_the_base_s(family: str, options: dict[str, Any]) -> None:
    """Tokens, scores, attentions and hidden states of all steps, to the bit."""
    made = setup(family, "eager", prefix_token_ids=[])
    expected, found = (generated(model, **options) for model in (made.base, made.model))
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
        return
    assert found.keys() == expected.keys() and {"scores", "attentions"} <= found.keys()
    for name, item in expected.items():
        assert equal(item, found[name]), name


@pytest.mark.parametrize("how", ["prompt_lookup", "assistant", "embeddings", "logits_to_keep", "custom", "continued"])
def test_other_ways_to_generate_are_the_base_s(how: str) -> None:
    made = setup("qwen3", "sdpa", prefix_token_ids=[])

    alone = {"input_ids": IDS[:1], "attention_mask": None}

    def run(model: Any) -> Tensor:
        ways: dict[str, Callable[[], Tensor]] = {
            "prompt_lookup": lambda: generated(
                model, input_ids=IDS[:1], attention_mask=None, prompt_lookup_num_tokens=3
            ),
            "assistant": lambda: generated(model, **alone, assistant_model=made.base),
            "embeddings": lambda: generated(model, input_ids=None, inputs_embeds=model.get_input_embeddings()(IDS)),
            "logits_to_keep": lambda: model(IDS, logits_to_keep=2).logits,
            "custom": lambda: generated(model, custom_generate=lambda model, input_ids, **kwargs: input_ids + 1),
            "continued": lambda: continued(model),
        }
        return ways[how]()

    def continued(model: Any) -> Tensor:
        first = generated(model, attention_mask=torch.ones_like(IDS), return_dict_in_generate=True)
        whole = torch.cat([first.sequences, IDS[:, :2]], dim=1)
        return generated(model, input_ids=whole, attention_mask=torch.ones_like(whole), **{CACHE: first[CACHE]})

    assert torch.equal(run(made.model), run(made.base))


def test_a_plain_forward_can_be_exported() -> None:
    """As the base's; with a memory the reason is given for which it cannot."""
    made = setup("llama", "sdpa", base={"num_hidden_layers": 2}, memory_layers=[1])
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(made.model, (), inputs, strict=False)
        assert torch.equal(program.module()(**inputs).logits, made.base(**inputs).logits)

        class Bound(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = made.model

            def forward(self, input_ids: Tensor) -> Tensor:
                return self.model(input_ids, memory=made.bank).logits

        with pytest.raises(Exception, match="A forward with a memory cannot be exported"):
            torch.export.export(Bound(), (IDS,), strict=False)
