"""Other memory layers than those a checkpoint was saved with."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from transformers import AutoModelForCausalLM

from msa_hf import MSAConfig, MSAForCausalLM

IDS = torch.tensor([[5, 6, 7, 8]])
DOCUMENTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with memory in layers 1 to 3 of 4, and trained routers: none like its layer's projections."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), memory_layers=[1, 2, 3], router_init="random", chunk_size=3)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Any:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.WARNING)  # whatever others have left behind
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("load", [MSAForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize(
    "layers, aux", [([3], [3]), ([1, 3], [3]), ([1], [1]), ([2, 3], [2, 3])], ids=["last", "two", "lower", "upper"]
)
def test_fewer_memory_layers(layers: list[int], aux: list[int], load: Any, saved: Path, log: Any) -> None:
    """The routers of those that stay are the saved ones; the others' are left out without a word."""
    model = load(saved, memory_layers=layers)
    assert (model.config.memory_layers, model.config.aux_layers) == (layers, aux)
    assert "UNEXPECTED" not in log.text and "untrained" not in log.text
    whole = MSAForCausalLM.from_pretrained(saved).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, whole[name])
    assert {int(name.split(".")[2]) for name in model.state_dict() if "router" in name} == set(layers)
    bank = model.encode_documents(DOCUMENTS, show_progress=False)
    assert list(bank.layers) == layers and set(model(IDS, memory=bank).routing) == set(layers)


def test_more_memory_layers(saved: Path, log: Any) -> None:
    """New routers are copies of their layer's projections, and announced as untrained; the saved ones stay."""
    model = MSAForCausalLM.from_pretrained(saved, memory_layers=[0, 1, 2, 3])
    assert "Routers of layers [0] are untrained" in log.text
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.router_q_proj.weight, attention.q_proj.weight)
    assert not torch.equal(
        model.model.layers[1].self_attn.router_q_proj.weight, model.model.layers[1].self_attn.q_proj.weight
    )
    assert model.config.aux_layers == [2, 3]


def test_chosen_auxiliary_layers_stay(tmp_path: Path) -> None:
    """Layers that were named stay as far as they are still memory layers; named again, they count."""
    fields: dict[str, Any] = {"memory_layers": [0, 1, 2, 3], "aux_layers": [1, 3]}
    MSAForCausalLM.from_base(base_model("qwen3"), **fields).save_pretrained(tmp_path)
    for layers, aux in (([1, 2], [1]), ([0, 1, 2, 3], [1, 3]), ([2], [2]), ([0, 2], [2])):
        assert MSAConfig.from_pretrained(tmp_path, memory_layers=layers).aux_layers == aux
    assert MSAConfig.from_pretrained(tmp_path, memory_layers=[2, 3], aux_layers=[2]).aux_layers == [2]
    with pytest.raises(ValueError, match="`aux_layers` must be distinct layers among"):
        MSAConfig.from_pretrained(tmp_path, memory_layers=[2, 3], aux_layers=[1])


@pytest.mark.parametrize("fields", [{"shared_router": True}, {"score_bias": True}], ids=["shared", "bias"])
def test_routers_of_another_kind(fields: dict[str, bool], saved: Path, log: Any) -> None:
    """A memory without router projections leaves the saved ones out as well; new score biases are announced."""
    model = MSAForCausalLM.from_pretrained(saved, **fields)
    assert "UNEXPECTED" not in log.text and ("untrained" in log.text) == ("score_bias" in fields)
    assert any("router_q_proj" in name for name in model.state_dict()) == ("score_bias" in fields)


def test_weights_that_belong_nowhere_are_still_reported(tmp_path: Path, log: Any) -> None:
    """Only routers are left out in silence."""
    model = MSAForCausalLM.from_base(base_model("qwen3"))
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "model.layers.2.router": torch.zeros(1)})
    MSAForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.2.router" in log.text


def test_a_configuration_and_its_fields(saved: Path) -> None:
    """One or the other."""
    config = MSAConfig.from_pretrained(saved, memory_layers=[3])
    assert MSAForCausalLM.from_pretrained(saved, config=config).config.memory_layers == [3]
    with pytest.raises(TypeError, match=r"both a `config` and its fields \['memory_layers'\]"):
        MSAForCausalLM.from_pretrained(saved, config=config, memory_layers=[3])
