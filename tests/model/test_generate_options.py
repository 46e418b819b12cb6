"""Options of transformers' generate() with a memory: each gives the answer that it would give alone, or is refused with
the reason before the model runs."""

import copy
import inspect
from typing import Any

import pytest
import torch
from setups import Setup, batch_of, setup, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, StaticCache
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from msa_hf import MSACache, MSAForCausalLM
from msa_hf.model.cache_msa import MSAQuantizedCache
from msa_hf.model.compat_msa import cache_of

STEPS = 8
EXACTLY: dict[str, Any] = {"min_new_tokens": STEPS, "max_new_tokens": STEPS, "do_sample": False}
PROMPT = torch.tensor(tokens(9, seed=12))
REPEATING = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
WINDOWED = ("gemma2", "eager")
PLAIN = ("qwen3", "sdpa")


class Runs:
    """Counts the forwards of a model, and how many of them routed."""

    def __init__(self, model: Any) -> None:
        self.all = self.routed = 0
        self.hook = model.register_forward_hook(self.see)

    def see(self, module: Any, args: Any, output: Any) -> None:
        self.all += 1
        self.routed += bool(getattr(output, "routing", None))


def refused(made: Setup, match: str, kind: type[Exception] = ValueError, **options: Any) -> None:
    """generate() with `options` raises before the model runs once."""
    runs = Runs(made.model)
    with pytest.raises(kind, match=match):
        made.model.generate(**{"inputs": PROMPT, "memory": made.bank, **EXACTLY, **options})
    assert runs.all == 0
    runs.hook.remove()


# The signature --------------------------------------------------------------------------------------------------------


def test_arguments_stand_where_transformers_has_them() -> None:
    """The generation configuration is the second argument, others follow; `memory` is a keyword only."""
    made = setup()
    expected = made.model.generate(PROMPT, memory=made.bank, **EXACTLY)
    config = GenerationConfig(**EXACTLY)
    assert torch.equal(made.model.generate(PROMPT, config, memory=made.bank), expected)
    banned = SuppressTokensLogitsProcessor([int(expected[0, 9])])
    found = made.model.generate(PROMPT, config, LogitsProcessorList([banned]), memory=made.bank)
    assert int(found[0, 9]) != int(expected[0, 9])
    keyword = made.model.generate(PROMPT, config, logits_processor=LogitsProcessorList([banned]), memory=made.bank)
    assert torch.equal(found, keyword)
    parameters = inspect.signature(MSAForCausalLM.generate).parameters
    assert parameters["memory"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters)[:3] == list(inspect.signature(GenerationMixin.generate).parameters)[:3]
    # Without a memory as well.
    assert torch.equal(made.model.generate(PROMPT, config), made.base.generate(PROMPT, config))


def test_a_bank_in_the_place_of_the_configuration_is_refused() -> None:
    """Who passes the bank second, as earlier versions took it, is told its keyword; others what is amiss."""
    made = setup()
    with pytest.raises(TypeError, match="a bank is passed as `memory=bank`"):
        made.model.generate(PROMPT, made.bank, **EXACTLY)
    with pytest.raises(TypeError, match="`memory=bank`"):
        made.model.generate(PROMPT, made.bank, memory=made.bank, **EXACTLY)
    with pytest.raises(TypeError, match="multiple values for argument 'generation_config'"):
        made.model.generate(PROMPT, GenerationConfig(), generation_config=GenerationConfig(), memory=made.bank)
    with pytest.raises(TypeError, match="at most"):
        made.model.generate(PROMPT, *[None] * 12, memory=made.bank)


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "hybrid"])
@pytest.mark.parametrize("place", ["keyword", "configuration", "model"])
def test_growing_caches(kind: str, place: str, recwarn: pytest.WarningsRecorder) -> None:
    """`cache_implementation` of a growing cache, wherever it is set, is the cache that a memory has anyway."""
    made = setup()
    expected = made.model.generate(PROMPT, memory=made.bank, **EXACTLY)
    options: dict[str, Any] = dict(EXACTLY)
    if place == "keyword":
        options["cache_implementation"] = kind
    elif place == "configuration":
        options = {"generation_config": GenerationConfig(cache_implementation=kind, **EXACTLY)}
    else:
        made.model.generation_config.cache_implementation = kind
    found = made.model.generate(PROMPT, memory=made.bank, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, expected)
    if place == "configuration":
        assert options["generation_config"].cache_implementation == kind
    elif place == "model":
        assert made.model.generation_config.cache_implementation == kind


FIXED = ("offloaded_static", "sliding_window", "hybrid_chunked", "paged")


@pytest.mark.parametrize("kind", FIXED)
def test_fixed_caches_are_refused(kind: str) -> None:
    """Other caches of fixed shape have no place for chosen documents."""
    made = setup()
    message = rf"`cache_implementation='{kind}'` cannot keep the documents.*Leave it out"
    refused(made, message, cache_implementation=kind)
    refused(made, message, generation_config=GenerationConfig(cache_implementation=kind), max_new_tokens=2)
    made.model.generation_config.cache_implementation = kind
    refused(made, message)


def test_offloading_needs_a_device_to_offload_from() -> None:
    """On the CPU, keys and values are where an offloaded cache would move them."""
    refused(setup(), "but the model computes on 'cpu'; leave it out", cache_implementation="offloaded")


def test_quantized_cache() -> None:
    """The keys and values of the tokens seen are quantized, the memory's are not: the contexts of every layer stay."""
    made = setup(*PLAIN, base={"scale": 0.15})
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    try:
        MSAQuantizedCache(backend="fp8", config=made.model.config)
    except ValueError:  # of a transformers before this backend; what it needs is asked for before the model runs
        refused(made, "fp8", **options)
        refused(made, "optimum-quanto", ImportError, cache_implementation="quantized")
        return
    exact = made.model.generate(PROMPT, memory=made.bank, return_dict_in_generate=True, output_logits=True, **EXACTLY)
    found = made.model.generate(
        PROMPT, memory=made.bank, return_dict_in_generate=True, output_logits=True, **EXACTLY, **options
    )
    assert torch.equal(found.logits[0], exact.logits[0])  # the prompt sees what is not quantized yet
    error = (found.logits[1] - exact.logits[1]).abs().max() / exact.logits[1].abs().max()
    assert 0 < error < 0.1
    plain = made.model.generate(PROMPT, return_dict_in_generate=True, output_logits=True, **EXACTLY)
    assert (plain.logits[1] - exact.logits[1]).abs().max() / exact.logits[1].abs().max() > 2 * error
    # In a batch with beams every sample keeps its own documents.
    batch, cache = batch_of(tokens(9, 5, seed=3)), MSAQuantizedCache(backend="fp8", config=made.model.config)
    made.model.generate(**batch, memory=made.bank, num_beams=3, past_key_values=cache, **EXACTLY)
    with torch.no_grad():
        contexts = cache_of(made.model(**batch, memory=made.bank)).contexts
    assert cache.contexts.keys() == contexts.keys()
    for layer, context in contexts.items():
        assert torch.equal(cache.contexts[layer].keys, context.keys.repeat_interleave(3, 0))


def test_a_quantized_cache_of_a_windowed_model_is_refused() -> None:
    """Transformers has none for layers with a window, and says so before the model runs."""
    refused(setup(*WINDOWED), "full attention|fp8", cache_implementation="quantized", cache_config={"backend": "fp8"})


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuple"])
def test_a_cache_that_keeps_no_documents_is_refused(kind: str) -> None:
    """Caches of transformers themselves, and tuples, are refused by name before the model runs."""
    made = setup()
    config = made.model.config
    cache: Any = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
        "tuple": lambda: ((torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)),) * 4,
    }[kind]()
    refused(made, "needs an MSACache", TypeError, past_key_values=cache)


# Drafts ---------------------------------------------------------------------------------------------------------------


def assistants(made: Setup) -> dict[str, dict[str, Any]]:
    other = MSAForCausalLM.from_base(copy.deepcopy(made.base), router_init="random").to_base()
    return {
        "plain": {"assistant_model": other},
        "itself": {"assistant_model": made.model},
        "copy": {"assistant_model": copy.deepcopy(made.model)},
        "early exit": {"assistant_early_exit": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "short lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    }


@pytest.mark.parametrize("family, attention", [PLAIN, WINDOWED], ids=["plain", "windowed"])
@pytest.mark.parametrize("kind", ["plain", "itself", "copy", "early exit", "lookup", "short lookup"])
def test_drafts_do_not_change_the_answer(family: str, attention: str, kind: str) -> None:
    """Assisted generation gives the tokens of greedy decoding; the model routes once, over the prompt."""
    made = setup(family, attention)
    expected = made.model.generate(REPEATING, memory=made.bank, **EXACTLY)
    options = assistants(made)[kind]
    try:  # some versions of transformers cannot draft for some models at all, with or without a memory
        made.base.generate(
            REPEATING,
            **EXACTLY,
            **{**options, **({"assistant_model": made.base} if "assistant_model" in options else {})},
        )
    except (TypeError, RuntimeError) as error:
        with pytest.raises(type(error)):
            made.model.generate(REPEATING, memory=made.bank, **EXACTLY, **options)
        return
    runs = Runs(made.model)
    found = made.model.generate(REPEATING, memory=made.bank, **EXACTLY, **options)
    assert torch.equal(found, expected)
    assert runs.routed == (2 if kind == "itself" else 1)
    # With logits, and with a routing mask and forced documents.
    mask = torch.zeros(REPEATING.shape, dtype=torch.bool)
    mask[:, 2:5] = True
    for extra in ({"routing_mask": mask}, {"force_documents": torch.tensor([[1, 4]])}):
        extra = {**extra, **EXACTLY}
        assert torch.equal(
            made.model.generate(REPEATING, memory=made.bank, **extra, **options),
            made.model.generate(REPEATING, memory=made.bank, **extra),
        )


@pytest.mark.parametrize("kind", ["itself", "copy"])
def test_an_assistant_with_a_memory_drafts_from_the_same_bank(kind: str) -> None:
    """The same model drafts exactly what it would say, so that all drafts are accepted; the bank is not copied."""
    made = setup(*PLAIN)
    made.model.generation_config.num_assistant_tokens = 4
    made.model.generation_config.assistant_confidence_threshold = 0.0
    options = assistants(made)[kind]
    assistant = options["assistant_model"]
    seen: list[Any] = []
    assistant.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("memory")), with_kwargs=True)
    options = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False, **options}
    runs = Runs(assistant)
    mine = [0]
    made.model.register_forward_hook(lambda _, args, output: mine.__setitem__(0, mine[0] + 1))
    found = made.model.generate(PROMPT, memory=made.bank, **options)
    expected = made.model.generate(PROMPT, memory=made.bank, min_new_tokens=10, max_new_tokens=10, do_sample=False)
    assert torch.equal(found, expected)
    assert seen and all(item is made.bank for item in seen if item is not None)
    if kind == "copy":
        # 4 drafted and 1 of its own per forward, of which two make ten tokens.
        assert runs.routed == 1 and mine[0] - 10 == 2


def test_an_assistant_of_other_weights_is_refused() -> None:
    """A bank of one model is nothing to another, so an assistant with a memory of its own is told apart at once."""
    made = setup(*PLAIN)
    other = setup(*PLAIN, base={"seed": 5}).model
    refused(made, r"The assistant has a memory, but cannot read this bank(.|\n)*to_base\(\)", assistant_model=other)
    other.to_base()
    found = made.model.generate(PROMPT, memory=made.bank, assistant_model=other, **EXACTLY)
    assert torch.equal(found, made.model.generate(PROMPT, memory=made.bank, **EXACTLY))


def test_sampling_with_an_assistant() -> None:
    """Speculative sampling runs with a memory, and under a seed gives the same tokens again."""
    made = setup(*PLAIN)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(
            made.model.generate(
                PROMPT, memory=made.bank, assistant_model=made.base, do_sample=True, max_new_tokens=6, min_new_tokens=6
            )
        )
    assert torch.equal(*found) and found[0].shape == (1, 15)


@pytest.mark.parametrize("kind", ["plain", "itself", "early exit", "lookup"])
@pytest.mark.parametrize("history", ["full", "new tokens"])
def test_drafts_in_a_later_turn_are_refused(kind: str, history: str) -> None:
    """Transformers would show the model again what the cache holds, and answer wrongly."""
    made = setup(*PLAIN)
    cache = MSACache(config=made.model.config)
    first = made.model.generate(PROMPT, memory=made.bank, past_key_values=cache, **EXACTLY)
    ids = torch.cat([first, torch.tensor(tokens(4, seed=30))], 1)
    later: dict[str, Tensor] = {"inputs": ids, "attention_mask": torch.ones_like(ids)}
    if history == "new tokens":
        later["inputs"] = ids[:, cache.get_seq_length() :]
    for memory in (made.bank, None):
        refused(made, "drafts from the start", **later, past_key_values=cache, **assistants(made)[kind], memory=memory)


@pytest.mark.parametrize("options", [{"use_mtp": True}, {"speculation_type": "dflash"}], ids=["mtp", "dflash"])
def test_drafts_from_hidden_states_are_refused(options: dict[str, Any]) -> None:
    """Other ways to draft keep caches of their own, which hold no documents."""
    refused(setup(), "drafts from the model's hidden states", **options)


# Attention weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_attention_weights_of_every_step(family: str) -> None:
    """On eager, in the base's shapes: own tokens alone, whose weights leave the rest to the memory."""
    made = setup(family, "eager")
    options: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True, **EXACTLY}
    base = made.base.generate(REPEATING, **options).attentions
    found = made.model.generate(REPEATING, memory=made.bank, **options).attentions
    assert [[item.shape for item in step] for step in found] == [[item.shape for item in step] for step in base]
    assert all(0 < float(item.sum(-1).mean()) < 0.99 for step in found for item in step)
    drafted = made.model.generate(REPEATING, memory=made.bank, prompt_lookup_num_tokens=2, **options).attentions
    assert len(drafted) == STEPS and all(len(step) == 4 for step in drafted)


@pytest.mark.parametrize("place", ["keyword", "model"])
def test_attention_weights_that_sdpa_does_not_hold(place: str) -> None:
    """Refused with the remedy, instead of an empty answer."""
    made = setup(*PLAIN)
    message = r"which attn_implementation='sdpa' does not hold; call `model.set_attn_implementation\('eager'\)` first"
    if place == "keyword":
        refused(made, message, output_attentions=True, return_dict_in_generate=True)
    else:
        made.model.generation_config.output_attentions = True
        refused(made, message)


# Padding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [128, -1, 200])
@pytest.mark.parametrize("place", ["keyword", "model"])
def test_padding_without_a_row_in_the_embedding(pad: int, place: str) -> None:
    """A tokenizer whose padding token was added without resizing the model: padded prompts, and samples that end."""
    made = setup(*PLAIN)
    batch = batch_of(tokens(9, 2, 5, seed=12))
    free = made.model.generate(**batch, memory=made.bank, **EXACTLY)
    end = int(free[0, 10])  # the first sample ends after two tokens, the others go on
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": end}
    expected = made.model.generate(**batch, memory=made.bank, pad_token_id=0, **options)
    padded = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)}
    if place == "keyword":
        options["pad_token_id"] = pad
    else:
        made.model.generation_config.pad_token_id = pad
    for inputs in (padded, {"input_ids": padded["input_ids"]}):
        found = made.model.generate(**inputs, memory=made.bank, **options)
        assert torch.equal(found[:, :9], padded["input_ids"])
        assert torch.equal(found[:, 9:].masked_fill(found[:, 9:] == pad, 0), expected[:, 9:])
        assert (found[0, 11:] == pad).all() and not (expected[0, 11:]).any()
    beams = made.model.generate(**padded, memory=made.bank, num_beams=2, **options)
    assert torch.equal(beams[:, :9], padded["input_ids"])


def test_padding_without_a_row_in_forward_and_training() -> None:
    """What stands under the mask has no effect on a forward, nor on a training step's losses."""
    made = setup(*PLAIN)
    batch = batch_of(tokens(9, 2, 5, seed=12))
    odd = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 500)
    with torch.no_grad():
        expected = made.model(**batch, memory=made.bank).logits
        found = made.model(input_ids=odd, attention_mask=batch["attention_mask"], memory=made.bank).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])
    labels = batch["input_ids"].masked_fill(~real, -100)
    labels[:, :-1] = -100
    step = {"documents": made.documents, "labels": labels, "positive_docs": torch.tensor([[0], [1], [2]])}
    losses = [
        made.model(input_ids=ids, attention_mask=batch["attention_mask"], **step).loss
        for ids in (batch["input_ids"], odd)
    ]
    assert torch.equal(*losses)
