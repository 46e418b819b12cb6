"""Families that cannot hold a memory though they look like it are refused when they get one, not when asked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, base_config, base_model
from setups import setup
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf import MSAForCausalLM
from msa_hf.model.cache_msa import MSACache
from msa_hf.model.trial_msa import refuse_untouchable

IDS = torch.tensor([[5, 6, 7, 8]])


def tiny(kind: str, **fields: Any) -> Any:
    known = AutoConfig.for_model(kind).to_dict()
    given = {"num_key_value_heads": 4, **COMMON, **fields}
    config = AutoConfig.for_model(kind, **{name: value for name, value in given.items() if name in known})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def without_interface(kind: str) -> Any:
    """A model whose attention calls a function of its own, whichever is configured, as remote code may."""
    model = tiny("nemotron") if kind == "nemotron" else base_model("qwen3")
    if kind == "by hand":
        for layer in model.model.layers:
            layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    return model


SHAPES = {
    # Keys and values of latent attention differ in width.
    "deepseek_v2": (
        {
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "kv_lora_rank": 8,
            "q_lora_rank": None,
            "first_k_dense_replace": 4,
        },
        r"attends with queries .* where a memory needs 4 query heads",
    ),
    "diffllama": ({}, r"calls the attention interface 2 times per token"),
    "doge": ({}, r"masks every head in another way"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_attention_that_a_memory_does_not_fit(kind: str) -> None:
    """The error says what differs, and the model is left as it was."""
    fields, message = SHAPES[kind]
    model = tiny(kind, **fields)
    made = type(model)
    with pytest.raises(ValueError, match=rf"cannot hold a memory: \w+ of layer 2 {message}"):
        MSAForCausalLM.from_base(model)
    assert type(model) is made and not any("router" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("kind", ["nemotron", "by hand"])
def test_attention_that_does_not_call_the_interface(kind: str, tmp_path: Path) -> None:
    """A live model, a checkpoint, and one of which half lies on the disk."""
    message = r"cannot hold a memory: \w+ of layer 2 computes attention by itself"
    model = without_interface(kind)
    with torch.no_grad():
        expected = model(IDS).logits
    with pytest.raises(ValueError, match=message):
        MSAForCausalLM.from_base(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    if kind == "nemotron":
        model.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=message):
            MSAForCausalLM.from_base(tmp_path / "base")
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"}
        with pytest.raises(ValueError, match=message):
            MSAForCausalLM.from_base(
                tmp_path / "base", device_map=places, offload_folder=str(tmp_path), router_init="random"
            )
        with torch.device("meta"):
            without = AutoModelForCausalLM.from_config(model.config)
        with pytest.raises(ValueError, match=message):
            MSAForCausalLM.from_base(without, router_init="random")


def test_a_cache_that_holds_no_memory() -> None:
    """A hybrid whose layers want a cache that is not made of the configuration's fields alone."""
    fields = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    with pytest.raises(ValueError, match=r"cannot hold a memory: a trial of 2 tokens with a cache failed"):
        MSAForCausalLM.from_base(tiny("falcon_h1", **fields))


def test_configurations_that_clash() -> None:
    """Configurations whose fields cannot lie beside the memory's are refused in our words."""
    config = AutoConfig.for_model("nemotron_h")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"'nemotron_h' (counts its layers|has fields of its own called \['chunk_size'\])"
    ):
        MSAForCausalLM.from_base(model, router_init="random")


def test_the_trial_leaves_no_trace() -> None:
    """Modes, random numbers, buffers and gradients of a model in training are what they were."""
    base = base_model("qwen3", attention_dropout=0.5).train()
    base.model.layers[0].eval()
    modes = [module.training for module in base.modules()]
    model = MSAForCausalLM.from_base(base)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    refuse_untouchable(model)
    assert torch.equal(torch.rand(3), expected)
    ours = [module.training for name, module in model.named_modules() if "router" not in name]
    assert ours == modes and all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_models_without_their_weights_are_tried_as_twins(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on the meta device is accepted after a run of its twin, which has 16 bits and no weights either."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config(family))
    runs: list[torch.device] = []
    run = MSAForCausalLM.run_base
    monkeypatch.setattr(
        MSAForCausalLM, "run_base", lambda self, **kw: (runs.append(kw["input_ids"].device), run(self, **kw))[1]
    )
    model = MSAForCausalLM.from_base(base, router_init="random")
    assert [device.type for device in runs] == ["meta"] and next(model.parameters()).is_meta


@pytest.mark.parametrize("use", ["encode", "forward", "generate"])
def test_an_implementation_changed_by_hand_is_noticed(use: str) -> None:
    """Where the attention function of the memory is taken away later, nothing is answered without the memory."""
    made = setup()
    model = copy.deepcopy(made.model)
    views = [layer.self_attn.config for layer in model.model.layers]
    for layer in model.model.layers:
        layer.self_attn.config = model.config
    with pytest.raises(RuntimeError, match=r"layers \[2, 3\] did not call the memory's attention function"):
        if use == "encode":
            model.encode_documents(made.documents, show_progress=False)
        elif use == "forward":
            model(IDS, memory=made.bank)
        else:
            model.generate(IDS, memory=made.bank, max_new_tokens=2)
    for layer, view in zip(model.model.layers, views, strict=True):
        layer.self_attn.config = view
    cache = MSACache(config=model.config)
    assert model.generate(IDS, memory=made.bank, max_new_tokens=2, past_key_values=cache).shape == (1, 6)
