"""Retrofitting a live model changes nothing that it computes, can be undone, and refuses what cannot hold a memory."""

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, base_config, base_model
from torch import nn
from transformers import PreTrainedModel

from msa_hf import MSAConfig, MSAForCausalLM, MSAModel

MEMORY: dict[str, Any] = {"chunk_size": 4, "top_k": 2, "prefix_token_ids": [3, 4]}
IDS = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


# Soft caps and sinks are beyond sdpa: one version of transformers refuses it there, another leaves them out.
WITH_SDPA = [family for family in FAMILIES if family not in ("gemma2", "gpt_oss")]


@torch.no_grad()
def logits_of(model: Any, **kwargs: Any) -> torch.Tensor:
    return model.eval()(IDS, **kwargs).logits


def hooks_of(model: nn.Module) -> int:
    """Hooks on all modules together."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def state_of(model: Any) -> dict[str, Any]:
    """What retrofitting touches; the values compare equal where nothing changed."""
    return {
        "class": type(model),
        "config": model.config,
        "config_dict": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
        "configs": {id(getattr(module, "config", None)) for module in model.modules()},
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "modules": [name for name, _ in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": hooks_of(model),
        "training": [module.training for module in model.modules()],
        "generation": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
    }


# In place and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "implementation"), [(name, "eager") for name in FAMILIES] + [(name, "sdpa") for name in WITH_SDPA]
)
def test_live_retrofit_is_reversible(family: str, implementation: str) -> None:
    """The same object goes and comes back: class, configuration, parameters and logits, to the bit."""
    base = base_model(family)
    base.set_attn_implementation(implementation)
    before, config = state_of(base), copy.deepcopy(base.config)
    logits = logits_of(base)

    model = MSAForCausalLM.from_base(base, **MEMORY)
    assert model is base and isinstance(model, MSAForCausalLM) and isinstance(model, before["class"])
    assert torch.equal(logits_of(model), logits), "without a memory the model is its base"
    assert hooks_of(model) == len(model.config.memory_layers)
    model.encode_documents([[5, 6, 7], [8, 9]], show_progress=False)

    assert model.to_base() is base
    after, found = state_of(base), logits_of(base)
    assert type(base.config) is type(config)
    assert (base.config.dtype, base.config.name_or_path) == (config.dtype, config.name_or_path)
    assert torch.equal(found, logits)
    for name in before.keys() - {"config", "configs"}:
        assert after[name] == before[name], name
    assert len(after["configs"]) == len(before["configs"])


@pytest.mark.parametrize("family", FAMILIES)
def test_retrofit_can_be_repeated(family: str) -> None:
    """A model that went back can get another memory, with other layers, and go back again."""
    base = base_model(family)
    logits = logits_of(base)
    layers = MSAForCausalLM.from_base(base, **MEMORY).config.memory_layers
    base.to_base()
    again = MSAForCausalLM.from_base(base, memory_layers=layers[-1:], chunk_size=3, top_k=5)
    assert again.config.memory_layers == layers[-1:] and again.config.prefix_token_ids == []
    assert sum("router_q_proj" in name for name, _ in again.named_parameters()) == 1
    assert torch.equal(logits_of(again), logits)
    assert torch.equal(logits_of(again.to_base()), logits)


@pytest.mark.parametrize("option", ["shared_router", "score_bias"])
def test_retrofit_with_options_is_reversible(option: str) -> None:
    """Routers that are fewer or more than the two projections go as well."""
    base = base_model("qwen3")
    before = state_of(base)
    model = MSAForCausalLM.from_base(base, **MEMORY, **{option: True})
    count = sum(".router_" in name for name, _ in model.named_parameters())
    assert count == {"shared_router": 0, "score_bias": 6}[option]
    model.to_base()
    after = state_of(base)
    assert after["parameters"] == before["parameters"] and after["attributes"] == before["attributes"]
    assert after["hooks"] == 0


def test_headless_model_is_reversible() -> None:
    """MSAModel does the same for a backbone."""
    base = base_model("qwen3").model.eval()
    with torch.no_grad():
        states = base(IDS).last_hidden_state
        model = MSAModel.from_base(base, **MEMORY)
        assert model is base and torch.equal(model(IDS).last_hidden_state, states)
        assert torch.equal(model.to_base()(IDS).last_hidden_state, states)
    assert type(base) is transformers.Qwen3Model


def test_what_changed_meanwhile_is_kept() -> None:
    """Going back undoes the memory, not what was done to the model while it had one."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), **MEMORY)
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    model.generation_config.temperature = 0.25
    model.train()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    expected = model.lm_head.weight.clone()
    base = model.to_base()
    assert base.config._attn_implementation == "eager" and base.config.use_cache is False
    assert base.generation_config.temperature == 0.25
    assert base.training and torch.equal(base.lm_head.weight, expected)


def test_loaded_base_gets_its_configuration_back(tmp_path: Path) -> None:
    """Also what only loading fills in: architectures, dtype and where the model came from."""
    base_model("qwen3").save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = copy.deepcopy(base.config)
    after = MSAForCausalLM.from_base(base, **MEMORY).to_base().config
    assert after.to_dict() == before.to_dict() and after.name_or_path == before.name_or_path == str(tmp_path)
    assert (after.architectures, after.dtype) == (["Qwen3ForCausalLM"], torch.float32)


def test_checkpoint_goes_back_to_its_base(tmp_path: Path) -> None:
    """A model that was loaded with its memory can lose it, and what it then saves is a plain checkpoint."""
    base = base_model("gpt_neox")
    logits = logits_of(base)
    MSAForCausalLM.from_base(base, **MEMORY).save_pretrained(tmp_path / "msa")
    plain = MSAForCausalLM.from_pretrained(tmp_path / "msa").to_base()
    assert type(plain) is transformers.GPTNeoXForCausalLM and plain.config.architectures == ["GPTNeoXForCausalLM"]
    assert torch.equal(logits_of(plain), logits)
    plain.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(loaded) is transformers.GPTNeoXForCausalLM and torch.equal(logits_of(loaded), logits)


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copied, pickled])
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma2"])
def test_a_copy_has_a_memory_of_its_own(family: str, duplicate: Callable[[Any], Any]) -> None:
    """A copy encodes the same, and taking its memory off leaves the original alone."""
    model = MSAForCausalLM.from_base(base_model(family), **MEMORY)
    other = duplicate(model)
    documents = [[5, 6, 7, 8, 9], [10]]
    bank = model.encode_documents(documents, show_progress=False)
    layer = model.config.memory_layers[-1]
    with torch.no_grad():
        expected = model(IDS, memory=bank)
        found = other(IDS, memory=other.encode_documents(documents, show_progress=False))
    assert torch.equal(found.routing[layer].documents, expected.routing[layer].documents)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    other.to_base()
    assert hooks_of(other) == 0 and hooks_of(model) == len(model.config.memory_layers)
    assert not any(".router_" in name for name, _ in other.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS, memory=bank).logits, expected.logits)


def test_routers_take_the_layer_s_dtype() -> None:
    """A model in bfloat16 gets routers in bfloat16."""
    model = MSAForCausalLM.from_base(base_model("llama").to(torch.bfloat16), **MEMORY)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_class_of_one_s_own_keeps_its_forward() -> None:
    """A subclass is retrofitted as itself, even where it bears the name of the class that it derives from."""
    other = type("Qwen3ForCausalLM", (transformers.Qwen3ForCausalLM,), {"twice": lambda self: 2})
    plain = MSAForCausalLM.from_base(base_model("qwen3"), **MEMORY)
    base = base_model("qwen3")
    base.__class__ = other
    model = MSAForCausalLM.from_base(base, **MEMORY)
    assert model.twice() == 2 and not hasattr(plain, "twice")
    assert type(model.to_base()) is other
    assert type(plain) is type(MSAForCausalLM.from_base(base_model("qwen3")))


def test_untrained_routers_are_announced(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Who loads a plain checkpoint with a memory is told that its routers have learnt nothing."""
    base_model("qwen3").save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        MSAForCausalLM.from_base(tmp_path, memory_layers=[1, 3])
    finally:
        logger.removeHandler(caplog.handler)
    assert "layers [1, 3] are untrained" in caplog.text


# Attention implementations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_SDPA)
def test_switching_the_attention_implementation(family: str) -> None:
    """Eager and sdpa agree with and without a memory, and switching there and back gives the same logits again."""
    model = MSAForCausalLM.from_base(base_model(family), **MEMORY)
    bank = model.encode_documents([[5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]], show_progress=False)
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        pair = [logits_of(model), logits_of(model, memory=bank)]
        for earlier, now in zip(found.setdefault(name, pair), pair, strict=True):
            assert torch.equal(earlier, now)
    assert not torch.equal(found["eager"][0], found["eager"][1])
    for eager, sdpa in zip(found["eager"], found["sdpa"], strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-5 * eager.abs().max().item(), rtol=1e-5)


def test_sdpa_is_refused_where_the_base_has_none() -> None:
    """GPT-OSS has sinks, which sdpa has not: the base refuses, and the model stays on eager."""
    model = MSAForCausalLM.from_base(base_model("gpt_oss"), **MEMORY)
    logits, before = logits_of(model), state_of(model)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention|sdpa"):
        model.set_attn_implementation("sdpa")
    assert state_of(model) == before and torch.equal(logits_of(model), logits)


@pytest.mark.parametrize(
    "name",
    ["flash_attention_2", "flash_attention_3", "flex_attention", "nonsense", {"": "flash_attention_2"}],
)
def test_other_attention_implementations_are_refused(name: Any) -> None:
    """The message names the one asked for and those that can hold a memory; the model goes on as it was."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), **MEMORY)
    logits, before = logits_of(model), state_of(model)
    with pytest.raises(ValueError) as caught:
        model.set_attn_implementation(name)
    name = name[""] if isinstance(name, dict) else name
    assert f'attn_implementation="{name}"' in str(caught.value) and "['eager', 'sdpa']" in str(caught.value)
    assert state_of(model) == before and torch.equal(logits_of(model), logits)


def test_base_with_another_attention_is_refused() -> None:
    """A live model on flex attention is not switched silently."""
    base = base_model("qwen3")
    base.set_attn_implementation("flex_attention")
    before = state_of(base)
    with pytest.raises(ValueError, match='"flex_attention"` is not supported: it cannot hold a memory'):
        MSAForCausalLM.from_base(base)
    assert state_of(base) == before


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementation_given_on_loading(name: str, tmp_path: Path) -> None:
    """from_base and from_pretrained take `attn_implementation`; flex is refused there too."""
    base_model("qwen3").save_pretrained(tmp_path / "base")
    model = MSAForCausalLM.from_base(tmp_path / "base", attn_implementation=name)
    assert model.config._attn_implementation == name
    model.save_pretrained(tmp_path / "msa")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "msa", attn_implementation=name)
    assert loaded.config._attn_implementation == name
    for load in (
        lambda: MSAForCausalLM.from_base(tmp_path / "base", attn_implementation="flex_attention"),
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "msa", attn_implementation="flex_attention"
        ),
    ):
        with pytest.raises(ValueError, match='"flex_attention"` is not supported: it cannot hold a memory'):
            load()


# Refusals -------------------------------------------------------------------------------------------------------------


def gemma3_with_vision() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 14,
        "patch_size": 7,
    }
    text = base_config("gemma3_text").to_dict()
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ),
        r"'t5' is an encoder-decoder.*decoder-only",
    ),
    "bart": (
        lambda: transformers.BartForCausalLM(
            transformers.BartConfig(
                vocab_size=64,
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=64,
            )
        ),
        r"BartForCausalLM cannot hold a memory: its layer 0 has two attention modules",
    ),
    "bert": (
        lambda: transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)),
        r"BertLMHeadModel cannot hold a memory: it has no attention layer with a `layer_idx` and query",
    ),
    "distilbert": (
        lambda: transformers.DistilBertForMaskedLM(
            transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=32)
        ),
        r"'distilbert' has no causal LM class",
    ),
    "falcon": (
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
        # What transformers says of it until 5.24; from then on a trial finds it out.
        r"FalconForCausalLM cannot hold a memory: FalconAttention (does not use|of layer 1 computes attention)",
    ),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
        ),
        r"BloomForCausalLM cannot hold a memory: BloomAttention does not use transformers' attention interface",
    ),
    "mamba": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
        ),
        r"'mamba' has no attention heads.*full-attention layer",
    ),
    "windowed": (
        lambda: base_model("mistral", sliding_window=8),
        r"`memory_layers`: the base model has no full-attention layer.*`sliding_window`",
    ),
    "windowed_by_type": (
        lambda: base_model("gemma2", layer_types=["sliding_attention"] * 4),
        r"`memory_layers`: the base model has no full-attention layer",
    ),
    "multimodal": (gemma3_with_vision, r"'gemma3' is a composite configuration.*get_text_config"),
    "classifier": (
        lambda: transformers.Qwen3ForSequenceClassification(base_config("qwen3")),
        r"MSAForCausalLM cannot stand on Qwen3ForSequenceClassification; it needs Qwen3ForCausalLM",
    ),
    "backbone": (
        lambda: base_model("qwen3").model,
        r"MSAForCausalLM cannot stand on Qwen3Model; it needs Qwen3ForCausalLM",
    ),
    "not_transformers": (lambda: nn.Linear(2, 2), r"Linear is not a model of transformers"),
    "has_a_memory": (
        lambda: MSAForCausalLM.from_base(base_model("qwen3")),
        r"has a memory already; load it with from_pretrained",
    ),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused(kind: str) -> None:
    """The error names what is missing, and the model is left as it was."""
    make, message = UNSUPPORTED[kind]
    model = make()
    before = None if kind == "not_transformers" else state_of(model)
    with pytest.raises(ValueError, match=message):
        MSAForCausalLM.from_base(model)
    assert before is None or state_of(model) == before


def test_headless_model_refuses_a_causal_lm() -> None:
    """MSAModel stands on backbones only."""
    with pytest.raises(ValueError, match=r"MSAModel cannot stand on Qwen3ForCausalLM; it needs Qwen3Model"):
        MSAModel.from_base(base_model("qwen3"))


@pytest.mark.parametrize("kind", ["t5", "falcon", "mamba", "windowed", "multimodal"])
def test_unsupported_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    """The same by path."""
    make, message = UNSUPPORTED[kind]
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MSAForCausalLM.from_base(tmp_path)


def test_checkpoint_with_a_memory_is_refused(tmp_path: Path) -> None:
    """from_base of an MSA checkpoint would drop what its routers learnt."""
    MSAForCausalLM.from_base(base_model("qwen3")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has a memory already; load it with from_pretrained"):
        MSAForCausalLM.from_base(tmp_path)


def test_unknown_arguments_are_refused(tmp_path: Path) -> None:
    """A misspelt argument is not swallowed, neither with a live model nor with a path."""
    with pytest.raises(TypeError, match=r"unexpected arguments \['topk'\]"):
        MSAForCausalLM.from_base(base_model("qwen3"), topk=3)
    base_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"'topk'"):
        MSAForCausalLM.from_base(tmp_path, topk=3)


BAD_MEMORY: dict[str, dict[str, Any]] = {
    "memory_layers": {"memory_layers": [4]},
    "chunk_size": {"chunk_size": 0},
    "top_k": {"top_k": -1},
    "similarity": {"similarity": "euclid"},
    "prefix_token_ids": {"prefix_token_ids": [128]},
    "router_init": {"router_init": "zeros"},
}


@pytest.mark.parametrize("field", BAD_MEMORY)
def test_bad_fields_leave_the_model_alone(field: str) -> None:
    """The error names the field; nothing of the model has changed."""
    base = base_model("qwen3")
    before = state_of(base)
    with pytest.raises(ValueError, match=f"`{field}`"):
        MSAForCausalLM.from_base(base, **BAD_MEMORY[field])
    assert state_of(base) == before


def test_a_retrofit_that_fails_late_leaves_the_model_alone() -> None:
    """Weights that cannot be copied are found after the routers were attached; those are taken off again."""
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(base_config("qwen3"))
    before = state_of(base)
    with pytest.raises(ValueError, match=r"Layer 2: `q_proj` is offloaded.*router_init='random'"):
        MSAForCausalLM.from_base(base)
    assert state_of(base) == before
    assert isinstance(MSAForCausalLM.from_base(base, router_init="random"), MSAForCausalLM)


def test_a_dispatched_model_is_refused() -> None:
    """Accelerate wraps the forward of a model that it spreads over devices; the way out is named."""
    accelerate = pytest.importorskip("accelerate")
    base = accelerate.dispatch_model(
        base_model("qwen3"), {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True
    )
    with pytest.raises(ValueError, match=r"dispatched over devices.*`device_map`"):
        MSAForCausalLM.from_base(base)


def test_fresh_model_needs_a_base_model_type() -> None:
    """A configuration that names no base makes no model."""
    with pytest.raises(ValueError, match=r"`base_model_type`"):
        MSAForCausalLM(MSAConfig())


def test_plain_models_are_untouched_by_the_import() -> None:
    """Importing registers names and changes nothing else: a base beside a retrofitted one computes as before."""
    base, expected = base_model("qwen3"), logits_of(base_model("qwen3"))
    MSAForCausalLM.from_base(base_model("qwen3"), **MEMORY)
    assert isinstance(base, PreTrainedModel) and type(base) is transformers.Qwen3ForCausalLM
    assert torch.equal(logits_of(base), expected) and hooks_of(base) == 0
