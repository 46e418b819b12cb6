"""A checkpoint gives back the model that was saved: through every door, for every family, and to the base class too."""

import copy
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, base_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.masking_utils import eager_mask
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

import msa_hf
from msa_hf import MSAConfig, MSAForCausalLM, MSAModel
from msa_hf.model.checkpoint_msa import REMOTE_FILES

MEMORY: dict[str, Any] = {"chunk_size": 4, "top_k": 2, "prefix_token_ids": [3, 4]}
SHARD = "24KB"
REMOTE_FAMILIES = ("qwen3", "gpt_neox", "gemma3_text")
SOME = ("qwen3", "phi3", "gpt_neox", "gemma2", "gpt_oss")  # one of each way to name and shape weights


def random_ids(*shape: int, seed: int) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(5, 128, shape, generator=torch.Generator().manual_seed(seed))


# Lengths around the edges of a chunk.
DOCUMENTS = [random_ids(length, seed=length).tolist() for length in (1, 3, 4, 5, 8, 13)]
PROMPT = {"input_ids": torch.cat([torch.zeros(2, 2, dtype=torch.long), random_ids(2, 7, seed=99)], dim=1)}
PROMPT["attention_mask"] = torch.ones_like(PROMPT["input_ids"])
PROMPT["attention_mask"][0, :2] = 0
PROMPT["input_ids"][1, :2] = 17


def with_memory(family: str, **overrides: Any) -> Any:
    """A retrofitted tiny model whose routers differ from what any initialization gives, as trained ones do."""
    memory = {name: overrides.pop(name) for name in ("score_bias", "shared_router") if name in overrides}
    model = MSAForCausalLM.from_base(base_model(family, **overrides), **MEMORY, **memory)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router_" in name and parameter.shape[0] > 1 and "proj" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
            elif "router_score_bias" in name:
                parameter.fill_(2.5)
    return model.eval()


@functools.cache
def shared_model(family: str) -> Any:
    """`with_memory`, made once; tests do not change it."""
    return with_memory(family)


@torch.no_grad()
def behavior(model: Any, bank: Any = None) -> dict[str, Tensor]:
    """All that a model computes: alone, as an encoder, on a memory, and generating."""
    model.eval()
    bank = model.encode_documents(DOCUMENTS, show_progress=False) if bank is None else bank
    found = {"bank/offsets": bank.offsets}
    for layer, memory in bank.layers.items():
        found[f"bank/{layer}/routing_keys"], found[f"bank/{layer}/content"] = memory.routing_keys, memory.pooled_kv
    output = model(**PROMPT, memory=bank, output_hidden_states=True)
    for layer, routing in output.routing.items():
        found[f"routing/{layer}/documents"], found[f"routing/{layer}/scores"] = routing.documents, routing.scores
    real = PROMPT["attention_mask"].bool()
    found["last_hidden_state"] = output.hidden_states[-1][real]
    if hasattr(output, "logits"):
        found["logits"] = output.logits[real]
        found["logits_alone"] = model(**PROMPT).logits[real]
        found["generated"] = model.generate(**PROMPT, memory=bank, max_new_tokens=5, do_sample=False)
    return {name: value.contiguous() for name, value in found.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> the directory that `shared_model` was saved in; tests do not change it."""

    @functools.cache
    def directory(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        shared_model(family).save_pretrained(path)
        return path

    return directory


@functools.cache
def shared_behavior(family: str) -> dict[str, Tensor]:
    """`behavior` of `shared_model`."""
    return behavior(shared_model(family))


def assert_same_behavior(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Integers equal; floating-point numbers to `relative` of the largest."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected.is_floating_point():
            largest = expected[expected.isfinite()].abs().max().item()
            torch.testing.assert_close(
                ours[name], expected, atol=relative * largest, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(ours[name], expected), name


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Same names, same numbers to the bit."""
    mine, others = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == others.keys()
    assert not [name for name in mine if not torch.equal(mine[name], others[name])]


def saved_names(directory: Path) -> list[str]:
    """Names of the tensors in a directory's files."""
    names: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Memory layer -> its attention module."""
    return {module.layer_idx: module for module in model.modules() if hasattr(module, "router_q_proj")}


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [MSAForCausalLM, AutoModelForCausalLM], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, loader: Any, saved: Any) -> None:
    """The class, every weight, the configuration, and all that the model computes come back."""
    model = shared_model(family)
    loaded, info = loader.from_pretrained(saved(family), output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert_same_behavior(behavior(loaded), shared_behavior(family))


@pytest.mark.parametrize("family", SOME)
def test_auto_model_is_the_backbone(family: str, saved: Any) -> None:
    """AutoModel gives the headless model: same hidden states and routing, on its own bank and on the causal LM's."""
    model = shared_model(family)
    backbone = AutoModel.from_pretrained(saved(family))
    assert isinstance(backbone, MSAModel) and backbone.base_class is type(model.base_model)
    expected = {
        name: value
        for name, value in shared_behavior(family).items()
        if name.startswith(("bank", "routing", "last_hidden_state"))
    }
    assert_same_behavior(behavior(backbone), expected)
    bank = model.encode_documents(DOCUMENTS, show_progress=False)
    assert_same_behavior(behavior(backbone, bank), expected)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma2"])
def test_headless_model_round_trip(family: str, tmp_path: Path) -> None:
    """A headless model that was retrofitted and saved by itself loads again."""
    model = MSAModel.from_base(copy.deepcopy(base_model(family)).base_model, **MEMORY)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same_weights(loaded, model)
    assert_same_behavior(behavior(loaded), behavior(model))


@pytest.mark.parametrize("family", SOME)
def test_sharded_round_trip(family: str, tmp_path: Path) -> None:
    """Many small files hold what one does, and the base class reads them as well."""
    model = shared_model(family)
    model.save_pretrained(tmp_path, max_shard_size=SHARD)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    base = type(model).base_class.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(base(**PROMPT).logits[1], model(**PROMPT).logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SOME)
def test_tied_weights_stay_tied(family: str, tmp_path: Path) -> None:
    """The head is one tensor with the embedding before saving, in the file, and after loading."""
    model = with_memory(family, tie_word_embeddings=True)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    for directory, limit in ((tmp_path / "whole", "1GB"), (tmp_path / "sharded", SHARD)):
        model.save_pretrained(directory, max_shard_size=limit)
        names = saved_names(directory)
        assert f"{head}.weight" not in names and len(names) == len(set(names))
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert loaded.config.tie_word_embeddings
        assert_same_weights(loaded, model)
    assert_same_behavior(behavior(loaded), behavior(model))


@pytest.mark.parametrize("family", SOME)
def test_untied_weights_stay_untied(family: str, tmp_path: Path) -> None:
    """A head of its own comes back as one, also in families that tie by default."""
    model = with_memory(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("family", SOME)
def test_bfloat16_round_trip(family: str, saved: Any, tmp_path: Path) -> None:
    """A model in bfloat16 is saved and loaded as such, routers included."""
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same_weights(loaded, model)
    # Equal weights: only the order of float32 sums may tip the rounding of a result to the 8 bits of bfloat16.
    assert_same_behavior(behavior(loaded), behavior(model), relative=2**-7)


@pytest.mark.parametrize("option", ["score_bias", "shared_router"])
def test_options_of_the_memory_are_saved(option: str, tmp_path: Path) -> None:
    """A learned score bias comes back; a shared router neither saves nor misses router weights."""
    model = with_memory("qwen3", **{option: True})
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert getattr(loaded.config, option) is True
    assert any("router" in name for name in saved_names(tmp_path)) is (option == "score_bias")
    assert_same_weights(loaded, model)
    assert_same_behavior(behavior(loaded), behavior(model))


def test_saving_what_was_loaded_changes_no_file(tmp_path: Path) -> None:
    """Load and save is the identity on the directory, so checkpoints do not drift."""
    shared_model("qwen3_moe").save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]


def test_saving_over_the_directory_it_was_loaded_from(tmp_path: Path) -> None:
    """The code in the directory is replaced, not copied onto itself or left behind."""
    model = shared_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / REMOTE_FILES[0]).write_text("# left by an older release\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    source = Path(msa_hf.__file__).parent / "model"
    assert not [name for name in REMOTE_FILES if (tmp_path / name).read_bytes() != (source / name).read_bytes()]
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_published_layout_is_saved_in_ours(tmp_path: Path) -> None:
    """A published checkpoint (`msa_config`, routers in a Sequential, a temperature) is saved flat, and is the same."""
    model = shared_model("qwen3")
    weights = {
        name.replace("router_q_proj.", "router_q_proj.0.").replace("router_k_proj.", "router_k_proj.0."): value
        for name, value in model.state_dict().items()
    }
    config = model.config.base_config().to_dict()
    config.update(model_type="msa", msa_config={"router_layer_idx": "2,3", "top_k_docs": 2, "pooling_kernel_size": 4})
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(config))
    save_file({**weights, "temperature": torch.tensor(0.1)}, published / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(
        published, prefix_token_ids=MEMORY["prefix_token_ids"], output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_behavior(behavior(loaded), shared_behavior("qwen3"))
    loaded.save_pretrained(tmp_path / "ours")
    assert "msa_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert sorted(saved_names(tmp_path / "ours")) == sorted(model.state_dict())
    assert_same_behavior(behavior(MSAForCausalLM.from_pretrained(tmp_path / "ours")), shared_behavior("qwen3"))


def test_generation_options_stay_the_base_s(tmp_path: Path) -> None:
    """`top_k` of generate() counts tokens, `config.top_k` documents: neither takes the other's value."""
    base = base_model("qwen3")
    base.generation_config = GenerationConfig(do_sample=True, top_k=11, temperature=0.5, eos_token_id=2, pad_token_id=0)
    model = MSAForCausalLM.from_base(base, **MEMORY)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.top_k, loaded.generation_config.top_k, loaded.generation_config.temperature) == (2, 11, 0.5)
    base_again = type(loaded).base_class.from_pretrained(tmp_path)
    assert base_again.generation_config.top_k == 11
    (tmp_path / "generation_config.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.top_k != 2
    assert MSAForCausalLM(loaded.config).generation_config.top_k != 2


def test_memory_layers_can_be_added_on_loading(saved: Any) -> None:
    """A layer whose routers the checkpoint lacks starts as asked; the others keep what they learnt."""
    model = shared_model("llama")
    loaded = MSAForCausalLM.from_pretrained(saved("llama"), memory_layers=[1, 2, 3])
    assert loaded.config.memory_layers == [1, 2, 3]
    new, old = routers(loaded), routers(model)
    assert torch.equal(new[1].router_q_proj.weight, new[1].q_proj.weight)
    assert torch.equal(new[1].router_k_proj.weight, new[1].k_proj.weight)
    for layer in (2, 3):
        assert torch.equal(new[layer].router_q_proj.weight, old[layer].router_q_proj.weight)


def test_a_score_bias_added_on_loading_keeps_the_routers(saved: Any) -> None:
    """What the checkpoint lacks is initialized, and nothing beside it."""
    loaded, info = MSAForCausalLM.from_pretrained(saved("qwen3"), score_bias=True, output_loading_info=True)
    assert all("router_score_bias" in name for name in info["missing_keys"])
    trained = routers(shared_model("qwen3"))
    for layer, module in routers(loaded).items():
        assert torch.equal(module.router_q_proj.weight, trained[layer].router_q_proj.weight)
        assert torch.equal(module.router_k_proj.weight, trained[layer].router_k_proj.weight)
        assert torch.equal(module.router_score_bias.weight, torch.ones(1))


# What lies in the directory -------------------------------------------------------------------------------------------


def test_directory_holds_no_pickle(tmp_path: Path) -> None:
    """Weights are safetensors; the rest is JSON, the code and the card."""
    shared_model("qwen3").save_pretrained(tmp_path, max_shard_size=SHARD)
    names = {path.name for path in tmp_path.iterdir()}
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".py", ".md"}
    assert {name for name in names if name.endswith(".py")} == set(REMOTE_FILES)
    assert {name for name in names if name.endswith(".json")} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }


def test_remote_files_are_the_package_s() -> None:
    """No module that a checkpoint needs is forgotten, and none is listed that is not there."""
    package = Path(msa_hf.__file__).parent / "model"
    assert sorted(REMOTE_FILES) == sorted(path.name for path in package.glob("*_msa.py"))


def test_other_processes_do_not_write_the_code(tmp_path: Path) -> None:
    """Only the main process of a distributed job writes files."""
    shared_model("qwen3").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py")) and not (tmp_path / "config.json").exists()


# The base class -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_base_class_loads_the_checkpoint(family: str, saved: Any) -> None:
    """Without this package the checkpoint is the base model: only the routers are left over, and the logits agree."""
    model = shared_model(family)
    base, info = type(model).base_class.from_pretrained(saved(family), output_loading_info=True)
    assert type(base) is type(model).base_class
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {name for name in model.state_dict() if ".router_" in name} == set(info["unexpected_keys"])
    with torch.no_grad():
        logits = base.eval()(**PROMPT).logits[PROMPT["attention_mask"].bool()]
    expected = base_model(family)
    with torch.no_grad():
        theirs = expected(**PROMPT).logits[PROMPT["attention_mask"].bool()]
    assert_same_behavior({"logits": logits}, {"logits": theirs})
    assert_same_behavior({"logits": logits}, {"logits": shared_behavior(family)["logits_alone"]})


# From a base checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["1GB", SHARD], ids=["whole", "sharded"])
@pytest.mark.parametrize("family", SOME)
def test_from_base_by_path_equals_the_live_model(family: str, limit: str, tmp_path: Path) -> None:
    """Loading with a memory from the start, also tensors that the base renames or merges, gives the same model."""
    base = base_model(family)
    base.save_pretrained(tmp_path, max_shard_size=limit)
    loaded = MSAForCausalLM.from_base(tmp_path, **MEMORY)
    live = MSAForCausalLM.from_base(base, **MEMORY)
    assert type(loaded) is type(live)
    assert_same_weights(loaded, live)
    assert loaded.config == live.config
    assert loaded.generation_config.to_dict() == live.generation_config.to_dict()
    assert_same_behavior(behavior(loaded), behavior(live))


def capture(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands for attention; keeps queries and keys [1, heads, T, D] on the module."""
    module.captured = (query, key)
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register("capture_queries", capture)
AttentionMaskInterface.register("capture_queries", eager_mask)


def plain_projections(base: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention sees x W_Q and x W_K alone: no bias, no norm of queries and keys, no rotation."""
    base = copy.deepcopy(base)
    for module in base.modules():
        for name in ("q_norm", "k_norm"):
            if hasattr(module, name):
                setattr(module, name, nn.Identity())
        if hasattr(module, "attention_scaling"):
            module.attention_scaling = 1.0
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_routers_are_the_layer_s_own_projections(family: str) -> None:
    """Routers copied from q_proj and k_proj, also out of fused ones, give the queries and keys that attention gets."""
    base = plain_projections(base_model(family))
    model = MSAForCausalLM.from_base(copy.deepcopy(base), memory_layers=None, router_init="copy")
    inputs: dict[int, Tensor] = {}
    layers = {module.layer_idx: module for module in base.modules() if hasattr(module, "scaling")}
    for layer, module in layers.items():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.__setitem__(layer, kwargs.get("hidden_states", *args[:1])),
            with_kwargs=True,
        )
    base.set_attn_implementation("capture_queries")
    ids = random_ids(1, 6, seed=3)
    with torch.no_grad():
        base(ids, position_ids=torch.zeros_like(ids), use_cache=False)
        for layer, module in routers(model).items():
            query, key = (states.transpose(1, 2).flatten(2) for states in layers[layer].captured)
            torch.testing.assert_close(module.router_q_proj(inputs[layer]), query, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(module.router_k_proj(inputs[layer]), key, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["live", "path", "fresh"])
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox"])
def test_random_routers_come_from_the_initializer(family: str, source: str, tmp_path: Path) -> None:
    """`"random"` has the initializer's deviation, and resembles neither the projections nor another layer."""
    base = base_model(family, hidden_size=64, initializer_range=0.05)
    copied = routers(MSAForCausalLM.from_base(copy.deepcopy(base), router_init="copy"))
    torch.manual_seed(5)
    if source == "live":
        model = MSAForCausalLM.from_base(base, router_init="random")
    elif source == "path":
        base.save_pretrained(tmp_path)
        model = MSAForCausalLM.from_base(tmp_path, router_init="random")
    else:
        fields = base.config.to_dict()
        fields.pop("model_type")
        model = MSAForCausalLM(MSAConfig(base_model_type=family, **fields))
    drawn = []
    for layer, module in routers(model).items():
        for name in ("router_q_proj", "router_k_proj"):
            weight, other = getattr(module, name).weight.detach(), getattr(copied[layer], name).weight.detach()
            assert abs(torch.corrcoef(torch.stack([weight.flatten(), other.flatten()]))[0, 1]) < 0.1
            drawn.append(weight.flatten())
    values = torch.cat(drawn)
    # Four standard errors of the mean and the deviation of that many normal numbers.
    assert abs(values.mean()) < 4 * 0.05 / len(values) ** 0.5
    assert abs(values.std() / 0.05 - 1) < 4 / (2 * len(values)) ** 0.5
    assert len({round(item[0].item(), 9) for item in drawn}) == len(drawn)


def test_unknown_router_init_is_refused() -> None:
    """The message names the argument and what it may be."""
    with pytest.raises(ValueError, match=r"`router_init` must be 'copy' or 'random', got 'zeros'"):
        MSAForCausalLM.from_base(base_model("qwen3"), router_init="zeros")


# Tokenizers -----------------------------------------------------------------------------------------------------------

TEXT = "The memory holds 3 documents, é."


@functools.cache
def backend() -> Tokenizer:
    """A byte-level BPE tokenizer with a few merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>", "<s>", "</s>"]
    )
    tokenizer.train_from_iterator(["the memory holds a document"] * 3, trainer)
    return tokenizer


def make_tokenizer(kind: str) -> Any:
    """A tokenizer of a generic or of a concrete class."""
    if kind == "generic":
        return PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="</s>", pad_token="<pad>")
    model = json.loads(backend().to_str())["model"]
    concrete = {"Qwen2Tokenizer": Qwen2Tokenizer, "GPTNeoXTokenizer": GPTNeoXTokenizer}[kind]
    return concrete(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@pytest.mark.parametrize("kind", ["generic", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gpt_neox"])
def test_auto_tokenizer(family: str, kind: str, saved: Any, tmp_path: Path) -> None:
    """A tokenizer beside the model comes back as its own class, and reads and writes as before."""
    tokenizer = make_tokenizer(kind)
    tokenizer.save_pretrained(tmp_path)
    shutil.copyfile(saved(family) / "config.json", tmp_path / "config.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_auto_tokenizer_where_no_class_is_named(tmp_path: Path) -> None:
    """The class registered for `model_type` "msa" reads a bare tokenizer.json."""
    shared_model("qwen3").save_pretrained(tmp_path)
    backend().save(str(tmp_path / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is TOKENIZER_MAPPING[MSAConfig] is PreTrainedTokenizerFast
    assert loaded(TEXT)["input_ids"] == backend().encode(TEXT).ids


# Remote code ----------------------------------------------------------------------------------------------------------

REMOTE_SCRIPT = textwrap.dedent(
    """
    import importlib.abc, json, sys
    from pathlib import Path

    class Blocked(importlib.abc.MetaPathFinder):
        active = True
        def find_spec(self, name, path=None, target=None):
            if self.active and name.split(".")[0] == "msa_hf":
                raise ModuleNotFoundError("msa_hf is not installed here", name=name)

    blocked = Blocked()
    sys.meta_path.insert(0, blocked)
    root, source, families = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    behavior_source = (root / "behavior.py").read_text()

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    inputs = load_file(root / "prompt.safetensors")
    scope = {"torch": torch, "Any": object, "Tensor": torch.Tensor, "PROMPT": inputs}
    scope["DOCUMENTS"] = json.loads((root / "documents.json").read_text())
    exec(behavior_source, scope)
    behavior = scope["behavior"]
    report = {}

    def keep(family, name, model, bank=None):
        save_file(behavior(model, bank), root / family / f"{name}.safetensors")

    for family in families:
        saved = root / family / "model"
        config = AutoConfig.from_pretrained(saved, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
        backbone = AutoModel.from_pretrained(saved, trust_remote_code=True)
        report[family] = {
            "modules": [type(item).__module__ for item in (config, model, backbone)],
            "classes": [type(item).__name__ for item in (config, model, backbone)],
            "config": json.loads(config.to_json_string()),
            "parameters": sorted(model.state_dict()),
        }
        keep(family, "encoded_here", model)
        keep(family, "backbone", backbone)
        bank = model.load_memory(root / family / "bank")
        keep(family, "loaded_bank", model, bank)
        model.save_pretrained(root / family / "again")
        again = AutoModelForCausalLM.from_pretrained(root / family / "again", trust_remote_code=True)
        keep(family, "again", again, again.load_memory(root / family / "bank"))
        again.encode_documents(scope["DOCUMENTS"], show_progress=False).save_pretrained(root / family / "remote_bank")

    tokenizer = AutoTokenizer.from_pretrained(root / families[0] / "model", trust_remote_code=True)
    report["tokens"] = tokenizer(sys.stdin.read())["input_ids"]
    report["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "msa_hf")

    # The package appears in the same process, as where a notebook installs it late.
    blocked.active = False
    sys.path.insert(0, source)
    import msa_hf
    family = families[0]
    local = AutoModelForCausalLM.from_pretrained(root / family / "model")
    report["late"] = [type(local).__module__, isinstance(local, msa_hf.MSAForCausalLM)]
    keep(family, "late", local, local.load_memory(root / family / "remote_bank"))
    keep(family, "both_classes", model if len(families) == 1 else again, None)
    (root / "report.json").write_text(json.dumps(report))
    """
)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints and banks, and what a process without this package made of them."""
    root = tmp_path_factory.mktemp("remote")
    save_file(PROMPT, root / "prompt.safetensors")
    (root / "documents.json").write_text(json.dumps(DOCUMENTS))
    (root / "behavior.py").write_text(inspect.getsource(behavior))
    for family in REMOTE_FAMILIES:
        model = shared_model(family)
        model.save_pretrained(root / family / "model")
        model.encode_documents(DOCUMENTS, show_progress=False).save_pretrained(root / family / "bank")
    make_tokenizer("Qwen2Tokenizer").save_pretrained(root / REMOTE_FAMILIES[0] / "model")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment.update(HF_HOME=str(root / "home"), HF_MODULES_CACHE=str(root / "modules"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-I", "-c", REMOTE_SCRIPT, str(root), str(Path(msa_hf.__file__).parents[1])]
    done = subprocess.run(
        [*command, *REMOTE_FAMILIES], input=TEXT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "report.json").read_text())


@pytest.mark.parametrize("family", REMOTE_FAMILIES)
def test_remote_code_without_the_package(family: str, remote: Any) -> None:
    """Where the package is not installed, the code in the directory gives classes of its own and the same results."""
    root, report = remote
    assert report["imported"] == []
    assert all(name.startswith("transformers_modules.") for name in report[family]["modules"])
    model = shared_model(family)
    assert report[family]["classes"] == ["MSAConfig", type(model).__name__, f"MSA{type(model.base_model).__name__}"]
    assert report[family]["parameters"] == sorted(model.state_dict())
    written = json.loads((root / family / "model" / "config.json").read_text())
    assert {name: report[family]["config"][name] for name in written} == written
    assert_same_behavior(load_file(root / family / "encoded_here.safetensors"), shared_behavior(family))


@pytest.mark.parametrize("family", REMOTE_FAMILIES)
def test_remote_headless_model(family: str, remote: Any) -> None:
    """AutoModel with remote code is the backbone."""
    found = load_file(remote[0] / family / "backbone.safetensors")
    assert_same_behavior(found, {name: shared_behavior(family)[name] for name in found})


@pytest.mark.parametrize("family", REMOTE_FAMILIES)
def test_remote_code_reads_a_bank_made_by_the_package(family: str, remote: Any) -> None:
    """Saved here, loaded there: no encoding, same routing, logits and tokens."""
    assert_same_behavior(load_file(remote[0] / family / "loaded_bank.safetensors"), shared_behavior(family))


@pytest.mark.parametrize("family", REMOTE_FAMILIES)
def test_saving_a_remote_code_model_again(family: str, remote: Any) -> None:
    """The directory is as complete as the first: it loads there, and here, and holds the same files."""
    root, _ = remote
    assert_same_behavior(load_file(root / family / "again.safetensors"), shared_behavior(family))
    again = {path.name: path.read_bytes() for path in (root / family / "again").iterdir()}
    shared_model(family).save_pretrained(root / family / "here")
    here = {path.name: path.read_bytes() for path in (root / family / "here").iterdir()}
    assert again.keys() == here.keys()
    assert not [name for name in here if again[name] != here[name]]
    loaded = AutoModelForCausalLM.from_pretrained(root / family / "again")
    assert type(loaded) is type(shared_model(family))
    bank = loaded.load_memory(root / family / "remote_bank")
    assert_same_behavior(behavior(loaded, bank), shared_behavior(family))


def test_remote_tokenizer(remote: Any) -> None:
    """The tokenizer beside the model loads there as well."""
    assert remote[1]["tokens"] == make_tokenizer("Qwen2Tokenizer")(TEXT)["input_ids"]


def test_package_and_remote_code_in_one_process(remote: Any) -> None:
    """A package imported after remote code was used works beside it; banks pass from one to the other."""
    root, report = remote
    assert report["late"] == ["msa_hf.model.modeling_msa", True]
    assert_same_behavior(load_file(root / REMOTE_FAMILIES[0] / "late.safetensors"), shared_behavior("qwen3"))
    found = load_file(root / REMOTE_FAMILIES[0] / "both_classes.safetensors")
    assert_same_behavior(found, shared_behavior(REMOTE_FAMILIES[-1]))


@pytest.mark.parametrize("trust", [True, False])
def test_package_wins_over_remote_code(trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is imported its own classes load the directory, whether or not its code is trusted."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    shared_model("qwen3").save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").glob("*.py"):
        path.write_text("raise RuntimeError('the code in the directory ran')\n")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=trust)
    backbone = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=trust)
    assert type(config) is MSAConfig and type(model) is type(shared_model("qwen3"))
    assert isinstance(backbone, MSAModel)
    assert_same_behavior(behavior(model), shared_behavior("qwen3"))
