"""Adapters of other memory layers: an error with cause and remedy, loaded by PEFT or by transformers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    load_peft_weights,
)
from transformers import AutoModelForCausalLM

from msa_hf import MSAForCausalLM
from msa_hf.training import peft_config
from msa_hf.training.adapter_memory import save_adapter_memory

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LAYERS = [1, 3]
OTHERS = [[1], [2], [0, 2], [1, 2, 3]]


def fresh(layers: list[int], **options: Any) -> Any:
    return MSAForCausalLM.from_base(base_model("qwen3"), memory_layers=layers, top_k=2, chunk_size=3, **options)


def adapted(layers: list[int], **options: Any) -> Any:
    model = fresh(layers, **options)
    torch.manual_seed(0)
    return get_peft_model(model, peft_config(model, r=2, init_lora_weights=False))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two memory layers, whose routers are no copies."""
    directory = tmp_path_factory.mktemp("adapter")
    model = adapted(LAYERS)
    for name, weight in model.named_parameters():
        if "router" in name and weight.requires_grad:
            weight.data.add_(1.0)
    model.save_pretrained(directory)
    return directory


def by_peft(layers: list[int], adapter: Path) -> Any:
    return PeftModel.from_pretrained(fresh(layers), adapter)


def beside_another(layers: list[int], adapter: Path) -> Any:
    model = adapted(layers)
    model.load_adapter(adapter, "second")
    return model


def by_transformers(layers: list[int], adapter: Path) -> Any:
    model = fresh(layers)
    model.load_adapter(str(adapter))
    return model


def by_transformers_from_weights(layers: list[int], adapter: Path) -> Any:
    model = fresh(layers)
    weights = load_peft_weights(str(adapter), device="cpu")
    model.load_adapter(peft_config=PeftConfig.from_pretrained(str(adapter)), adapter_state_dict=weights)
    return model


def routers(model: Any, name: str) -> list[torch.Tensor]:
    return [item for key, item in model.named_parameters() if "router" in key and f"modules_to_save.{name}." in key]


@pytest.mark.parametrize("layers", OTHERS, ids=str)
@pytest.mark.parametrize("load", [by_peft, beside_another, by_transformers])
def test_other_memory_layers_are_refused(load, layers, adapter) -> None:
    """Fewer, others, and more than those that the adapter has."""
    message = f"{str(adapter)!r} has routers for memory layers {LAYERS}, but the model has memory layers {layers}. Load"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*`memory_layers={re.escape(str(LAYERS))}`"):
        load(layers, adapter)


@pytest.mark.parametrize(
    "load, name",
    [
        (by_peft, "default"),
        (beside_another, "second"),
        (by_transformers, "default"),
        (by_transformers_from_weights, "default"),
    ],
)
def test_the_same_memory_layers_load(load, name, adapter) -> None:
    expected = routers(PeftModel.from_pretrained(fresh(LAYERS), adapter), "default")
    found = routers(load(LAYERS, adapter), name)
    assert len(found) == 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not torch.equal(found[0], routers(adapted(LAYERS), "default")[0])


def test_transformers_loads_other_whole_modules(tmp_path) -> None:
    """A head and all norms beside the routers: PEFT takes a name for the end of a module's."""
    model = fresh(LAYERS)
    adapted_one = get_peft_model(model, peft_config(model, r=2, modules_to_save=["lm_head", "norm"]))
    changed = {}
    for name, weight in adapted_one.named_parameters():
        if "modules_to_save" in name and "router" not in name:
            weight.data.add_(1.0)
            changed[name.removeprefix("base_model.model.")] = weight.data.clone()
    adapted_one.save_pretrained(tmp_path)
    loaded = dict(by_transformers(LAYERS, tmp_path).named_parameters())
    assert len(changed) == 18 and all(torch.equal(loaded[name], weight) for name, weight in changed.items())


def test_a_checkpoint_with_an_adapter_beside_it_loads(adapter, tmp_path) -> None:
    fresh(LAYERS).save_pretrained(tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((adapter / file).read_bytes())
    found = routers(MSAForCausalLM.from_pretrained(tmp_path), "default")
    expected = routers(by_peft(LAYERS, adapter), "default")
    assert len(found) == 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_refused_adapter_leaves_the_others(adapter) -> None:
    model = adapted([2])
    with pytest.raises(ValueError, match="memory layers"):
        model.load_adapter(adapter, "second")
    assert set(model.peft_config) == {"default"} and not any("second" in name for name, _ in model.named_parameters())


def test_a_score_bias_that_the_model_lacks_is_named(tmp_path) -> None:
    adapted(LAYERS, score_bias=True).save_pretrained(tmp_path)
    for load in (by_peft, by_transformers):
        with pytest.raises(ValueError, match=r"router_score_bias.*made with the same `score_bias`"):
            load(LAYERS, tmp_path)


def test_adapters_without_routers_go_onto_any_layers(tmp_path) -> None:
    get_peft_model(fresh(LAYERS), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path
    )
    for load in (by_peft, beside_another, by_transformers):
        load([2], tmp_path)


def test_other_missing_weights_stay_errors_of_peft(adapter, tmp_path) -> None:
    """A module of the user's that the file does not have is no matter of memory layers."""
    model = fresh(LAYERS)
    get_peft_model(model, peft_config(model, r=2, modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(KeyError, match="lm_head"):
        by_peft(LAYERS, tmp_path)


# Other fields of the memory ------------------------------------------------------------------------------------------

OTHER_FIELDS: list[dict[str, Any]] = [
    {"chunk_size": 4},
    {"similarity": "dot"},
    {"query_reduction": "last"},
    {"prefix_token_ids": [1, 2]},
    {"head_reduction": "max", "chunk_reduction": "mean"},
]


def by_auto_peft(base: Path, adapter: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_auto(base: Path, adapter: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter)


def onto_the_base(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(MSAForCausalLM.from_pretrained(base), adapter)


def onto_the_base_by_transformers(base: Path, adapter: Path) -> Any:
    model = MSAForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


LOADERS = [by_auto_peft, by_auto, onto_the_base, onto_the_base_by_transformers]


def trained(root: Path, **fields: Any) -> tuple[Path, Path]:
    """A base with a memory, and an adapter for it that was trained with other fields."""
    fresh(LAYERS).save_pretrained(root / "base")
    model = MSAForCausalLM.from_pretrained(root / "base", **fields)
    get_peft_model(model, peft_config(model, r=2)).save_pretrained(root / "adapter")
    save_adapter_memory(model.config, root / "adapter")
    return root / "base", root / "adapter"


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=str)
@pytest.mark.parametrize("load", LOADERS)
def test_other_fields_are_refused(load, fields, tmp_path) -> None:
    base, adapter = trained(tmp_path, **fields)
    said = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    said = re.escape(f"was trained with {said} (memory.json beside it), but the model has")
    with pytest.raises(ValueError, match=said):
        load(base, adapter)


@pytest.mark.parametrize("load", LOADERS)
def test_the_same_fields_load_and_another_top_k_is_said(load, tmp_path, caplog) -> None:
    base, adapter = trained(tmp_path, top_k=5, aux_loss_weight=0.5)
    caplog.set_level("WARNING", "msa_hf")
    model = load(base, adapter)
    assert model.config.top_k == 2
    assert len([line for line in caplog.messages if "with top_k=5, but the model has top_k=2: set" in line]) == 1
    caplog.clear()
    loaded = PeftModel.from_pretrained(MSAForCausalLM.from_pretrained(base, top_k=5), adapter)
    assert loaded.config.top_k == 5 and not any("top_k" in line for line in caplog.messages)


@pytest.mark.parametrize("load", [by_auto_peft, onto_the_base])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_fields_of_learned_prompts_are_compared(kind, load, tmp_path, caplog) -> None:
    """As those of other adapters: refused where what is read depends on them, said for another `top_k`."""
    base = tmp_path / "base"
    fresh(LAYERS).save_pretrained(base)
    for name, fields in (("other", {"chunk_size": 4}), ("same", {"top_k": 5})):
        model = MSAForCausalLM.from_pretrained(base, **fields)
        prompted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
        prompted.save_pretrained(tmp_path / name)
        save_adapter_memory(model.config, tmp_path / name)
    with pytest.raises(ValueError, match=re.escape("was trained with chunk_size=4 (memory.json beside it), but the")):
        load(base, tmp_path / "other")
    caplog.set_level("WARNING", "msa_hf")
    loaded = load(base, tmp_path / "same")
    assert len([line for line in caplog.messages if "with top_k=5, but the model has top_k=2: set" in line]) == 1
    with pytest.raises(ValueError, match=r"was trained with chunk_size=4"):
        loaded.load_adapter(tmp_path / "other", "second")
    assert set(loaded.peft_config) == {"default"}


def test_fields_go_through_auto_peft(tmp_path) -> None:
    _, adapter = trained(tmp_path, chunk_size=4, query_reduction="last")
    fields = json.loads((adapter / "memory.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, **fields)
    assert (model.config.chunk_size, model.config.query_reduction) == (4, "last")


@pytest.mark.parametrize("make", [MSAForCausalLM.from_pretrained, MSAForCausalLM.from_base])
def test_an_adapter_in_the_place_of_a_checkpoint(make, tmp_path) -> None:
    base, adapter = trained(tmp_path, chunk_size=4)
    said = re.escape(f"from_base({str(base)!r}, memory_layers=[1, 3], chunk_size=4, ")
    with pytest.raises(ValueError, match=f"is an adapter of PEFT and no checkpoint.*{said}"):
        make(adapter)
    (adapter / "memory.json").unlink()
    with pytest.raises(ValueError, match=r"is an adapter of PEFT.*from_base\('.*', \.\.\.\)"):
        make(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty") as error:
        make(tmp_path / "empty")
    assert "of PEFT" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", "{", '"chunk_size"'])
def test_a_damaged_file_of_fields(text, tmp_path) -> None:
    base, adapter = trained(tmp_path)
    (adapter / "memory.json").write_text(text)
    with pytest.raises(ValueError, match=r"memory\.json: .*; save the adapter again"):
        onto_the_base(base, adapter)
