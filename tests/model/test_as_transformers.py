"""A model with a memory is one of transformers' models: what its users, trainers and servers do with those works."""

import copy
import logging
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from families import base_config, base_model
from setups import setup
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from msa_hf import MSAConfig, MSAForCausalLM, MSAModel
from msa_hf.model.attention_msa import OPERATIONS

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def memory_config(family: str = "qwen3", **fields: Any) -> MSAConfig:
    base = base_config(family).to_dict()
    return MSAConfig(base_model_type=base.pop("model_type"), chunk_size=3, top_k=2, **base, **fields)


# The classes ----------------------------------------------------------------------------------------------------------


def test_the_generic_classes_are_models_of_transformers() -> None:
    """What is asked of a class before there is a model."""
    assert issubclass(MSAForCausalLM, PreTrainedModel) and issubclass(MSAModel, PreTrainedModel)
    assert MSAForCausalLM.can_generate() and not MSAModel.can_generate()
    assert not hasattr(MSAModel, "generate") and issubclass(MSAForCausalLM, GenerationMixin)
    assert MSAForCausalLM.main_input_name == "input_ids" and MSAForCausalLM.config_class is MSAConfig
    assert MSAForCausalLM._no_split_modules is None
    assert not MSAForCausalLM._can_set_experts_implementation()


@pytest.mark.parametrize(("auto", "ours"), [(AutoModelForCausalLM, MSAForCausalLM), (AutoModel, MSAModel)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_auto_classes_make_a_model_of_a_configuration(auto: Any, ours: Any, attention: str) -> None:
    model = auto.from_config(memory_config(), attn_implementation=attention, dtype=torch.bfloat16)
    assert isinstance(model, ours) and model.config._attn_implementation == attention
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert set(model._no_split_modules) == {"Qwen3DecoderLayer"}


def test_a_model_without_weights_takes_part_in_placing() -> None:
    """`init_empty_weights` and a device map keep layers whole."""
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(memory_config())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    places = accelerate.infer_auto_device_map(
        model, max_memory={"cpu": 100_000, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert [name for name in places if "layers" in name] == [f"model.layers.{layer}" for layer in range(4)]


def test_the_headless_model_neither_generates_nor_speaks_of_it(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = MSAModel(memory_config())
        assert not model.can_generate()
        assert not hasattr(model, "generate")
    finally:
        logger.removeHandler(caplog.handler)
    assert "generative capabilities" not in caplog.text


def test_fields_of_the_base_are_changed_on_loading(tmp_path: Path) -> None:
    """`from_pretrained` and `from_base` take them as the base's own `from_pretrained` does."""
    base_model("qwen3").save_pretrained(tmp_path / "base")
    changes: dict[str, Any] = {"use_cache": False, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64, **changes)
    MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=3).save_pretrained(tmp_path / "ours")
    for model in (
        MSAForCausalLM.from_base(tmp_path / "base", dtype=torch.float64, chunk_size=5, **changes),
        MSAForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64, chunk_size=5, **changes),
        AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64, chunk_size=5, **changes),
    ):
        assert model.config.use_cache is False and model.config.rope_parameters["rope_theta"] == 77.0
        assert model.config.chunk_size == 5
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, base(IDS).logits)


# The attention implementation -----------------------------------------------------------------------------------------


def test_the_attention_implementation_is_set_by_parts() -> None:
    """A dict names the whole model `""`; the name that was asked for is the one that the configuration shows."""
    made = setup("qwen3")
    logits = {}
    for name in ("eager", "sdpa"):
        made.model.set_attn_implementation({"": name})
        assert made.model.config._attn_implementation == name
        with torch.no_grad():
            logits[name] = made.model(IDS, memory=made.bank).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=1e-5)
    made.model.set_attn_implementation({})
    assert made.model.config._attn_implementation == "sdpa"


def test_a_memory_is_refused_on_an_attention_that_knows_none() -> None:
    """Continuous batching sets `paged|eager`; without a memory that is its own business."""
    made = setup("qwen3")
    made.model.set_attn_implementation("paged|eager")
    for call in (
        lambda: made.model(IDS, memory=made.bank),
        lambda: made.model.encode_documents([[5, 6]], show_progress=False),
        lambda: made.model(IDS, documents=[[5, 6]]),
    ):
        with pytest.raises(ValueError, match=r"paged\|eager.*cannot hold a memory"):
            call()
    made.model.set_attn_implementation("eager")
    made.model(IDS, memory=made.bank)


def test_a_configuration_that_is_changed_directly_is_followed() -> None:
    made = setup("qwen3", "sdpa")
    made.model.config._attn_implementation = "eager"
    with torch.no_grad():
        changed = made.model(IDS, memory=made.bank, output_attentions=True)
    assert len(changed.attentions) == 4
    twin = copy.deepcopy(made.model)
    twin.config._attn_implementation = "sdpa"
    assert made.model.base_model.layers[0].self_attn.config._attn_implementation == "memory_eager"
    assert twin.base_model.layers[0].self_attn.config._attn_implementation == "memory_fused"


# Attention weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox", "phi3"])
@torch.no_grad()
def test_attention_weights_with_a_memory(family: str) -> None:
    """One [B, H, T, S] per layer, as the base's; what is missing to 1 in memory layers went to the documents.

    Up to the first memory layer all states are the base's, so that there the weights of the own tokens are the base's
    but for what the documents take away.
    """
    made = setup(family, "eager", prefix_token_ids=[])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = made.base(IDS, attention_mask=mask, position_ids=positions, output_attentions=True).attentions
    ours = made.model(IDS, attention_mask=mask, memory=made.bank, output_attentions=True).attentions
    assert [weights.shape for weights in ours] == [weights.shape for weights in plain]
    first, real = made.model.config.memory_layers[0], mask.bool()[:, None].expand(ours[0].shape[:3])
    for layer, weights in enumerate(ours):
        total = weights.sum(-1)[real]
        if family != "gpt_oss" and layer not in made.model.config.memory_layers:
            torch.testing.assert_close(total, torch.ones_like(total))
        elif family != "gpt_oss":
            assert bool((total < 1).all()) and bool((total > 0).all())
        if layer < first:
            torch.testing.assert_close(weights[real], plain[layer][real], atol=1e-5, rtol=1e-4)
    own = ours[first] / ours[first].sum(-1, keepdim=True)
    base = plain[first] / plain[first].sum(-1, keepdim=True)
    torch.testing.assert_close(own[real], base[real], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_attention_weights_asked_for_in_the_configuration() -> None:
    """Also with a cache, in pieces, and for the headless model; sdpa computes none, as the base."""
    made = setup("qwen3", "eager")
    whole = made.model(IDS, memory=made.bank, output_attentions=True)
    made.model.config.output_attentions = True
    assert all(map(torch.equal, made.model(IDS, memory=made.bank).attentions, whole.attentions))
    assert made.model(IDS, memory=made.bank, output_attentions=False).attentions is None
    backbone = made.model.base_model
    assert all(map(torch.equal, backbone(IDS, output_attentions=True).attentions, made.model(IDS).attentions))
    found = made.model.generate(
        IDS, memory=made.bank, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, output_attentions=True
    ).attentions
    assert [[tuple(weights.shape) for weights in step] for step in found] == [
        [(2, 4, 6, 6)] * 4,
        [(2, 4, 1, 7)] * 4,
        [(2, 4, 1, 8)] * 4,
    ]
    made.model.config.output_attentions = False
    made.model.set_attn_implementation("sdpa")
    assert not made.model(IDS, memory=made.bank, output_attentions=True).attentions


def test_attention_weights_in_training() -> None:
    """Those of a pool's questions are reported for every layer; packed rows have none of their own."""
    made = setup("qwen3", "eager")
    pool = made.model(IDS, documents=[[5, 6, 7], [8, 9]], output_attentions=True)
    assert [tuple(weights.shape) for weights in pool.attentions] == [(2, 4, 6, 6)] * 4
    packed = torch.tensor([[-2, -2, -2, 1, 1, 0]] * 2)
    rows = torch.tensor([[5, 6, 7, 8, 9, 10]] * 2)
    made.model(rows, doc_ids=packed)
    with pytest.raises(ValueError, match="`output_attentions`: packed rows"):
        made.model(rows, doc_ids=packed, output_attentions=True)


def test_attention_weights_of_a_long_prompt_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup("qwen3", "eager")
    with torch.no_grad():
        whole = made.model(IDS, memory=made.bank, output_attentions=True)
        monkeypatch.setattr("msa_hf.model.context_attention_msa.LOGIT_ELEMENTS", 1)
        pieces = made.model(IDS, memory=made.bank, output_attentions=True)
    for one, other in zip(whole.attentions, pieces.attentions, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.logits, pieces.logits)


# Training with a bank -------------------------------------------------------------------------------------------------


def gradients_with(made: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    made.model.zero_grad()
    made.model(IDS, labels=IDS, memory=made.bank, use_cache=False, **kwargs).loss.backward()
    return {name: weight.grad.clone() for name, weight in made.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "score_bias"])
@pytest.mark.parametrize("choice", ["routed", "forced", "all scores"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_forward_with_a_bank_is_trained_under_checkpointing(attention: str, choice: str, bias: bool) -> None:
    """Gradients are those without checkpointing, whatever the routing computes on the way."""
    made = setup("qwen3", attention, score_bias=bias)
    options: dict[str, Any] = {}
    if choice == "forced":
        options["force_documents"] = torch.tensor([[0, 2], [1, -1]])
    if choice == "all scores":
        options["output_document_scores"] = True
    made.model.train()
    expected = gradients_with(made, **options)
    made.model.gradient_checkpointing_enable()
    found = gradients_with(made, **options)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_routing_is_asked_for_no_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no derivative gets queries without one, also in training."""
    made = setup("qwen3")
    asked = []

    def route(queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append(queries.requires_grad)
        return route_documents(queries, *args, **kwargs)

    route_documents = OPERATIONS["route_documents"]
    monkeypatch.setitem(OPERATIONS, "route_documents", route)
    gradients_with(made)
    assert asked == [False, False]


def test_hooks_on_the_model_see_documents_too() -> None:
    """What wraps the call of a model, as some of PEFT's adapters do, takes part in encoding."""
    made = setup("qwen3", prefix_token_ids=[])
    documents = [[number + 1 for number in document] for document in made.documents]
    expected = made.model.encode_documents(documents, show_progress=False)

    def add_one(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "input_ids": kwargs["input_ids"] + 1}

    handle = made.model.register_forward_pre_hook(add_one, with_kwargs=True)
    found = made.model.encode_documents(made.documents, show_progress=False)
    handle.remove()
    for layer, memory in expected.layers.items():
        torch.testing.assert_close(found.layers[layer].pooled_kv, memory.pooled_kv)


# Serving --------------------------------------------------------------------------------------------------------------


def test_continuous_batching_without_a_memory_is_the_base_s() -> None:
    base = base_model("qwen3")
    options = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    found = []
    for attention in ("eager", "sdpa"):
        for model in (base, MSAForCausalLM.from_base(copy.deepcopy(base), chunk_size=3)):
            model.set_attn_implementation(attention)
            results = model.generate_batch([[5, 6, 7], [8, 9, 10, 11]], options, batching, progress_bar=False)
            found.append([results[key].generated_tokens for key in sorted(results)])
            assert model.config._attn_implementation == attention
    assert found == [found[0]] * 4 and all(len(tokens) == 4 for tokens in found[0])


def test_continuous_batching_with_a_memory_is_refused() -> None:
    made = setup("qwen3")
    with pytest.raises(ValueError, match=r"generate_batch.*no memory; use generate\(\)"):
        made.model.generate_batch([[5, 6, 7]], memory=made.bank)


def test_pipelines_and_servers_know_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """`pipeline("text-generation")` says nothing of an unsupported model; with a memory bound it answers with it."""
    made = setup("qwen3")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3")),
        pad_token="w0",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        writer = transformers.pipeline("text-generation", model=made.model, tokenizer=tokenizer)
    finally:
        logger.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert type(made.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    found = writer("w5 w6 w7 w8", return_full_text=False, memory=made.bank, **options)[0]["generated_text"]
    expected = made.model.generate(torch.tensor([[5, 6, 7, 8]]), memory=made.bank, **options)[0, 4:]
    assert found == tokenizer.decode(expected, skip_special_tokens=True)


@torch.no_grad()
def test_embedded_inputs_are_the_ids_also_where_there_is_padding() -> None:
    """States of padding have no meaning, but are those of the tokens that stand there, however they are given."""
    made = setup("qwen3")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    embedded = made.model.get_input_embeddings()(IDS)
    for model in (made.model, MSAModel.from_base(copy.deepcopy(made.base.base_model), chunk_size=3)):
        bank = model.encode_documents([[5, 6, 7]], show_progress=False)
        by_ids = model(input_ids=IDS, attention_mask=mask, memory=bank)[0]
        torch.testing.assert_close(model(inputs_embeds=embedded, attention_mask=mask, memory=bank)[0], by_ids)
