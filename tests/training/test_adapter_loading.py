"""Adapters of other memory layers: an error with cause and remedy, loaded by PEFT or by transformers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights

from msa_hf import MSAForCausalLM
from msa_hf.training import peft_config

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
