"""The configuration refuses what makes no sense, naming the field, and comes back from disk as it was."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, base_config, base_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.model.configuration_msa import AUTO_MAP, CHOICES, FIELDS

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "cases").glob("*.json"))
CUSTOM: dict[str, Any] = {
    "memory_layers": [1, 3],
    "chunk_size": 7,
    "top_k": 3,
    "similarity": "dot",
    "training_similarity": "cosine",
    "head_reduction": "max",
    "query_reduction": "last",
    "chunk_reduction": "mean",
    "shared_router": True,
    "score_bias": True,
    "prefix_token_ids": [3, 127, 0],
    "lm_loss_weight": 0.25,
    "aux_loss_weight": 2,
    "answer_loss_weight": 0.5,
    "aux_loss": "infonce_focal",
    "aux_temperature": 0.07,
    "aux_layers": [3],
    "focal_gamma": 1.5,
}


def make_config(family: str = "qwen3", **fields: Any) -> MSAConfig:
    """The configuration of a tiny model with a memory."""
    base = base_config(family).to_dict()
    base.pop("model_type")
    return MSAConfig(base_model_type=family, **{**base, **fields})


# Fields ---------------------------------------------------------------------------------------------------------------


def test_defaults_are_the_paper_s() -> None:
    """Every field has the value that the paper or the published behavior gives it."""
    config = make_config()
    assert {name: getattr(config, name) for name in FIELDS} == {
        "base_model_type": "qwen3",
        "memory_layers": [2, 3],
        "chunk_size": 64,
        "top_k": 16,
        "similarity": "cosine",
        "training_similarity": None,
        "head_reduction": "mean",
        "query_reduction": "max",
        "chunk_reduction": "max",
        "shared_router": False,
        "score_bias": False,
        "prefix_token_ids": [],
        "lm_loss_weight": 1.0,
        "aux_loss_weight": 0.1,
        "answer_loss_weight": 0.0,
        "aux_loss": "infonce_decoupled",
        "aux_temperature": 0.1,
        "aux_layers": [2, 3],
        "focal_gamma": 2.0,
    }


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {"num_hidden_layers": 5}, [2, 3, 4]),
        ("llama", {"num_hidden_layers": 1}, [0]),
        ("gemma2", {}, [3]),
        ("gpt_oss", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}, [0]),
        ("phi3", {"sliding_window": None}, [2, 3]),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": False}, [2, 3]),
    ],
)
def test_default_memory_layers(family: str, fields: dict[str, Any], expected: list[int]) -> None:
    """The full-attention layers of the upper half; where there is none, the last full-attention layer."""
    assert make_config(family, **fields).memory_layers == expected


def test_default_aux_layers() -> None:
    """The memory layers of the upper half; all of them where none lies there."""
    assert make_config(memory_layers=[0, 1, 3]).aux_layers == [3]
    assert make_config(memory_layers=[0, 1]).aux_layers == [0, 1]


def test_first_position_follows_prefix_and_top_k() -> None:
    """Active tokens start behind the prefix and k documents (paper, 3.3)."""
    config = make_config(prefix_token_ids=[5, 6, 7], top_k=9)
    assert (config.prefix_length, config.first_position) == (3, 12)


def test_layers_are_sorted() -> None:
    """Any order may be given; the stored one ascends."""
    config = make_config(memory_layers=[3, 0, 2], aux_layers=(2, 0))
    assert config.memory_layers == [0, 2, 3] and config.aux_layers == [0, 2]


def test_there_is_a_custom_value_for_every_field() -> None:
    """The tests below cover the fields that exist."""
    assert CUSTOM.keys() | {"base_model_type"} == set(FIELDS)
    config = make_config()
    assert not [name for name, value in CUSTOM.items() if getattr(config, name) == value]


# Refusals -------------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    *((name, value) for name in CHOICES for value in ("", "Mean", 1, True, ["max"])),
    *((name, None) for name in CHOICES if name != "training_similarity"),
    *((name, value) for name in ("chunk_size", "top_k") for value in (0, -1, 2.0, "4", True, None, [4])),
    *((name, value) for name in ("shared_router", "score_bias") for value in (0, 1, "true", None)),
    *(
        (name, value)
        for name in ("lm_loss_weight", "aux_loss_weight", "answer_loss_weight")
        for value in (-0.1, float("nan"), float("inf"), True, "1", None)
    ),
    *(
        (name, value)
        for name in ("aux_temperature", "focal_gamma")
        for value in (0, -1.0, float("nan"), True, "0.1", None)
    ),
    *(
        (name, value)
        for name in ("memory_layers", "aux_layers")
        for value in ([], [4], [-1], [3, 3], [2.0], ["3"], [True, 3], [None], 3, "3", {3})
    ),
    ("aux_layers", [1]),
    *(("prefix_token_ids", value) for value in ([128], [-1], [1.0], ["1"], [True], [None], 5, "12", {1})),
    *(("base_model_type", value) for value in ("", "qwen33", "msa", 3, ["qwen3"], True)),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda item: str(item))
def test_bad_values_are_refused(field: str, value: Any) -> None:
    """The error names the field, whatever the wrong value is."""
    with pytest.raises(ValueError, match=f"`{field}`"):
        make_config(**{field: value}) if field != "base_model_type" else MSAConfig(base_model_type=value, vocab_size=64)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_windowed_layers_hold_no_memory(family: str) -> None:
    """A sliding-window layer is refused, and the full-attention layers are named."""
    with pytest.raises(ValueError, match=r"`memory_layers` names \[2\], which are not full-attention.*\[1, 3\]"):
        make_config(family, memory_layers=[2, 3])


def test_memory_layers_without_full_attention() -> None:
    """Where all layers are windowed the default has nothing to choose from."""
    with pytest.raises(ValueError, match=r"`memory_layers`.*no full-attention layer"):
        make_config("mistral", sliding_window=16)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("topk", "top_k"),
        ("chunk_sizes", "chunk_size"),
        ("memory_layer", "memory_layers"),
        ("simularity", "similarity"),
        ("aux_temprature", "aux_temperature"),
        ("prefix_tokens_ids", "prefix_token_ids"),
        ("lm_loss_weigth", "lm_loss_weight"),
        ("scorebias", "score_bias"),
    ],
)
def test_misspelt_fields_are_refused(misspelt: str, meant: str) -> None:
    """The error names the field that was probably meant."""
    with pytest.raises(ValueError, match=f"`{misspelt}` is not a field of MSAConfig; did you mean `{meant}`"):
        make_config(**{misspelt: 1})
    with pytest.raises(ValueError, match=f"`{misspelt}`.*`{meant}`"):
        MSAConfig.from_dict(make_config().to_dict(), **{misspelt: 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_the_base_are_not_taken_for_misspelt_ones(family: str) -> None:
    """All that the base's own configuration knows is accepted, also under names that resemble ours."""
    config = make_config(family)
    assert MSAConfig.from_dict(config.to_dict()) == config


def test_missing_base_model_type() -> None:
    """The error says what it is and who sets it; the bare configuration that transformers makes is allowed."""
    MSAConfig()
    for fields in ({"hidden_size": 64}, {"top_k": 4}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=r"`base_model_type` is missing.*from_base"):
            MSAConfig(**fields)


# On disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [MSAConfig, AutoConfig], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family: str, loader: Any, tmp_path: Path) -> None:
    """Every field, the memory's and the base's, comes back with its value and type."""
    fields = {**CUSTOM, "memory_layers": [1, 3]}
    config = make_config(family, **fields)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is MSAConfig and loaded == config
    for name, value in fields.items():
        assert getattr(loaded, name) == value and type(getattr(loaded, name)) is type(value), name
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "msa"
    assert set(FIELDS) <= written.keys(), "every field is written, so that a later default changes no checkpoint"
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_base_config_gives_back_the_base_s(family: str) -> None:
    """The base's own class with its own values, and none of ours."""
    base = base_config(family)
    ours = make_config(family, **CUSTOM).base_config()
    assert type(ours) is type(base)
    assert ours.to_dict() == base.to_dict()
    assert not [name for name in FIELDS if name in ours.to_dict()]


def test_base_config_of_a_saved_model(tmp_path: Path) -> None:
    """What saving a model adds (code, class names) is the memory's as well, and is taken off."""
    base = base_model("qwen3")
    base.save_pretrained(tmp_path / "base")
    MSAForCausalLM.from_base(base).save_pretrained(tmp_path / "msa")
    loaded = AutoConfig.from_pretrained(tmp_path / "msa")
    assert loaded.auto_map == AUTO_MAP
    expected = AutoConfig.from_pretrained(tmp_path / "base").to_dict()
    assert {**loaded.base_config().to_dict(), "_name_or_path": ""} == {**expected, "_name_or_path": ""}


def test_base_attributes_answer_as_the_base() -> None:
    """Names that the base maps (`num_experts`), and its tensor-parallel plan, are found under ours."""
    base, ours = base_config("qwen3_moe"), make_config("qwen3_moe")
    assert ours.num_experts == base.num_experts == 4
    assert ours.base_model_tp_plan == base.base_model_tp_plan
    assert "base_model_tp_plan" not in ours.to_dict() and "attribute_map" not in ours.to_dict()


# Overrides ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a memory in layer 3."""
    path = tmp_path_factory.mktemp("saved")
    MSAForCausalLM.from_base(base_model("qwen3"), memory_layers=[3], top_k=2).save_pretrained(path)
    return path


DOORS: dict[str, Any] = {
    "MSAConfig": lambda path, **fields: MSAConfig.from_pretrained(path, **fields),
    "AutoConfig": lambda path, **fields: AutoConfig.from_pretrained(path, **fields),
    "MSAForCausalLM": lambda path, **fields: MSAForCausalLM.from_pretrained(path, **fields).config,
    "AutoModelForCausalLM": lambda path, **fields: AutoModelForCausalLM.from_pretrained(path, **fields).config,
}


@pytest.mark.parametrize("door", DOORS)
def test_overrides_on_loading(door: str, saved: Path) -> None:
    """A field given to from_pretrained replaces the saved one; the others stay."""
    fields = {"top_k": 5, "prefix_token_ids": [1, 2], "query_reduction": "mean"}
    config = DOORS[door](saved, **fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.memory_layers == [3] and config.chunk_size == 64


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 0), ("chunk_size", True), ("similarity", "l2"), ("memory_layers", [4]), ("prefix_token_ids", [500])],
)
def test_overrides_on_loading_are_validated(door: str, field: str, value: Any, saved: Path) -> None:
    """A wrong override is refused like a wrong argument, through every door."""
    with pytest.raises(ValueError, match=f"`{field}`"):
        DOORS[door](saved, **{field: value})


def test_overrides_may_not_contradict_what_is_saved(saved: Path) -> None:
    """Other memory layers need other auxiliary layers; both together are fine."""
    with pytest.raises(ValueError, match=r"`aux_layers` must be distinct layers among \[2\], got \[3\]"):
        MSAConfig.from_pretrained(saved, memory_layers=[2])
    assert MSAConfig.from_pretrained(saved, memory_layers=[2], aux_layers=[2]).aux_layers == [2]
    assert MSAConfig.from_pretrained(saved, memory_layers=[2], aux_layers=None).aux_layers == [2]


def test_overrides_do_not_change_the_dictionary() -> None:
    """from_dict leaves its argument alone and reports what it did not use."""
    fields = make_config().to_dict()
    before = copy.deepcopy(fields)
    config, unused = MSAConfig.from_dict(fields, top_k=4, something_else=1, return_unused_kwargs=True)
    assert fields == before and config.top_k == 4 and unused == {"something_else": 1}


# Published checkpoints ------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "router_layer_idx": ("1,3", {"memory_layers": [1, 3]}),
    "aux_loss": (False, {"aux_loss_weight": 0.0}),
    "lmloss_weigth": (0.5, {"lm_loss_weight": 0.5}),
    "auxloss_weight": (0.7, {"aux_loss_weight": 0.7}),
    "recloss_weight": (0.0, {}),
    "ansloss_weight": (0.3, {"answer_loss_weight": 0.3}),
    "aux_loss_method": (
        "INFONCE_DECOUPLE",
        {"aux_loss": "infonce_decoupled", "similarity": "dot", "training_similarity": "cosine"},
    ),
    "decouple_router": (False, {"shared_router": True}),
    "rewrite_position": (True, {}),
    "top_k_docs": (3, {"top_k": 3}),
    "pooling_kernel_size": (8, {"chunk_size": 8}),
    "infonce_loss_temp": (0.2, {"aux_temperature": 0.2}),
    "head_reduce_method": ("max", {"head_reduction": "max"}),
    "query_reduce_method": ("last", {"query_reduction": "last"}),
    "chunk_reduce_method": ("mean", {"chunk_reduction": "mean"}),
    "decouple_pooling_mode": ("mean", {}),
}
QWEN3: dict[str, Any] = {name: value for name, value in base_config("qwen3").to_dict().items() if name != "model_type"}
# What a published configuration means where its dictionary says nothing.
SILENT: dict[str, Any] = {
    **{name: getattr(make_config(), name) for name in FIELDS},
    "training_similarity": "cosine",
    "answer_loss_weight": 1.0,
    "aux_loss": "infonce",
}


@pytest.mark.parametrize("key", PUBLISHED)
def test_each_published_key(key: str) -> None:
    """Every key of `msa_config` sets its field and no other."""
    value, expected = PUBLISHED[key]
    config = MSAConfig(**QWEN3, msa_config={key: value})
    wanted = {**SILENT, **expected}
    wanted["aux_layers"] = [layer for layer in wanted["memory_layers"] if layer >= 2]
    assert {name: getattr(config, name) for name in FIELDS} == wanted
    assert not hasattr(config, "msa_config")


def test_every_published_key_is_covered() -> None:
    """The keys of all golden cases are among those tested above."""
    assert GOLDENS
    seen = set().union(*(json.loads(path.read_text())["msa_config"] for path in GOLDENS))
    assert seen == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("method", "similarity", "loss"),
    [
        ("INFONCE", "cosine", "infonce"),
        ("INFONCE_DECOUPLE", "dot", "infonce_decoupled"),
        ("INFONCE_FOCAL", "dot", "infonce_focal"),
        ("INFONCE_DECOUPLE_FOCAL", "dot", "infonce_decoupled_focal"),
    ],
)
def test_published_similarity(method: str, similarity: str, loss: str) -> None:
    """Inference is by cosine for `INFONCE` alone, training always: the published behavior, kept apart."""
    config = MSAConfig(**QWEN3, msa_config={"aux_loss_method": method})
    assert (config.similarity, config.training_similarity, config.aux_loss) == (similarity, "cosine", loss)


@pytest.mark.parametrize(
    ("layers", "expected"), [("2,3", [2, 3]), ("0", [0]), ("3, 1", [1, 3]), ("all", [0, 1, 2, 3]), ([1, 2], [1, 2])]
)
def test_published_layers(layers: Any, expected: list[int]) -> None:
    """Layers are written as text, as a list, or as "all"."""
    assert MSAConfig(**QWEN3, msa_config={"router_layer_idx": layers}).memory_layers == expected


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden_configurations_load(path: Path, tmp_path: Path) -> None:
    """A whole published config.json loads, overrides win over it, and it is saved in our form."""
    spec = json.loads(path.read_text())
    written = {**spec["hf_config"], "model_type": "msa", "msa_config": spec["msa_config"]}
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.top_k == spec["msa_config"]["top_k_docs"]
    assert config.chunk_size == spec["msa_config"]["pooling_kernel_size"]
    assert config.similarity == ("cosine" if spec["msa_config"]["aux_loss_method"] == "INFONCE" else "dot")
    assert isinstance(config.base_config(), Qwen3Config)
    assert AutoConfig.from_pretrained(tmp_path, top_k=9, similarity="cosine").top_k == 9
    config.save_pretrained(tmp_path / "ours")
    assert "msa_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "ours") == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unheard_of", 1),
        ("recloss_weight", 0.5),
        ("decouple_pooling_mode", "max"),
        ("rewrite_position", False),
        ("router_layer_idx", "2,x"),
        ("router_layer_idx", ""),
    ],
)
def test_published_keys_that_are_refused(key: str, value: Any) -> None:
    """A key that is unknown, or means something that is not computed, raises and is named."""
    with pytest.raises(ValueError, match=f"`msa_config.*{key}"):
        MSAConfig(**QWEN3, msa_config={key: value})


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("router_layer_idx", "2,9", "memory_layers"),
        ("router_layer_idx", [], "memory_layers"),
        ("top_k_docs", 0, "top_k"),
        ("head_reduce_method", "sum", "head_reduction"),
        ("aux_loss_method", "TRIPLET", "aux_loss"),
        ("infonce_loss_temp", -1.0, "aux_temperature"),
    ],
)
def test_published_values_are_validated(key: str, value: Any, field: str) -> None:
    """What is translated is checked as the field that it sets."""
    with pytest.raises(ValueError, match=f"`{field}`"):
        MSAConfig(**QWEN3, msa_config={key: value})


@pytest.mark.parametrize("value", ["top_k", 3, ["top_k_docs"], True])
def test_msa_config_must_be_a_dictionary(value: Any) -> None:
    """Anything else is refused by name."""
    with pytest.raises(ValueError, match=r"`msa_config` must be a dictionary"):
        MSAConfig(**QWEN3, msa_config=value)


def test_msa_config_beside_a_field() -> None:
    """Both may say the same; where they differ neither wins."""
    same = MSAConfig(**QWEN3, msa_config={"top_k_docs": 3}, top_k=3)
    assert same.top_k == 3
    with pytest.raises(ValueError, match=r"`msa_config` and \['chunk_size', 'top_k'\] both set"):
        MSAConfig(**QWEN3, msa_config={"top_k_docs": 3, "pooling_kernel_size": 8}, top_k=4, chunk_size=16)
    with pytest.raises(ValueError, match=r"`msa_config` and \['top_k'\] both set"):
        MSAConfig.from_dict({**QWEN3, "msa_config": {"top_k_docs": 3}, "top_k": 4})


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma3_text"])
def test_copies_are_equal_and_independent(family: str) -> None:
    """deepcopy and pickle keep every field; changing the copy leaves the original."""
    config = make_config(family, **CUSTOM)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is MSAConfig and other == config
        assert other.base_config().to_dict() == config.base_config().to_dict()
        other.memory_layers.append(2)
        assert config.memory_layers == [1, 3]


CHANGED: dict[str, Any] = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, **CUSTOM}


@pytest.mark.parametrize("field", CHANGED)
def test_configs_that_differ_are_unequal(field: str) -> None:
    """Every field counts, the base's too."""
    config, other = make_config(memory_layers=[1, 2, 3]), make_config(memory_layers=[1, 2, 3])
    assert config == other
    setattr(other, field, CHANGED[field])
    assert config != other


def test_config_is_unequal_to_others() -> None:
    """Neither the base's configuration nor anything else equals ours."""
    config = make_config()
    assert config != base_config("qwen3") and config != config.to_dict() and config != make_config("llama")


def test_where_it_was_loaded_from_does_not_count(tmp_path: Path) -> None:
    """Equal contents are equal, from any directory, as text or as `torch.dtype`."""
    config = make_config(dtype="float32")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.name_or_path != config.name_or_path and loaded == config
    loaded.dtype = torch.float32
    assert loaded == config


def test_every_choice_is_accepted() -> None:
    """All documented values of the fields with choices construct."""
    for name, values in CHOICES.items():
        for value in values:
            assert getattr(make_config(**{name: value}), name) == value


def test_a_configuration_says_whether_anybody_trained_the_routers(tmp_path) -> None:
    """False from the retrofit on; nothing where nobody knows, as in checkpoints that lack the field."""
    model = MSAForCausalLM.from_base(base_model("llama"))
    assert model.config.routers_trained is False
    model.save_pretrained(tmp_path)
    assert MSAConfig.from_pretrained(tmp_path).routers_trained is False
    assert MSAConfig.from_pretrained(tmp_path, routers_trained=True).routers_trained is True
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["routers_trained"]
    unknown = MSAConfig.from_dict(fields)
    assert unknown.routers_trained is None and "routers_trained" not in unknown.to_dict()
    assert MSAForCausalLM.from_base(base_model("llama"), shared_router=True).config.routers_trained is None
    for wrong in (1, "yes"):
        with pytest.raises(ValueError, match="routers_trained"):
            MSAConfig.from_dict({**fields, "routers_trained": wrong})
