"""The PEFT preset: what it adapts, what it refuses, and adapters through training, saving and merging."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, base_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PeftModel,
    PeftType,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from setups import assert_same, differ, setup
from steps import Step, assert_same_gradients, gradients, step
from torch import Tensor, nn

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.model.retrofit_msa import ROUTER_MODULES, attention_layers
from msa_hf.training import peft_config

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FEW = [("qwen3", "sdpa"), ("phi3", "eager"), ("gpt_neox", "sdpa"), ("gpt_oss", "eager")]


def adapted(
    family: str = "qwen3", attention: str = "sdpa", options: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    """A tiny model with adapters that change something from the start, in training mode."""
    model = setup(family, attention, **{"score_bias": True, **(options or {})}).model
    torch.manual_seed(0)
    return get_peft_model(model, peft_config(model, **{"r": 4, "init_lora_weights": False, **kwargs})).train()


def names_of(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


def train_a_little(model: Any, made: Step) -> None:
    """Two steps of plain gradient descent."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**made.pool()).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits_with_memory(model: Any, made: Step, bank: MemoryBank | None = None) -> Tensor:
    """Logits of the questions with the step's documents as a memory."""
    model.eval()
    bank = bank or model.encode_documents(made.documents, show_progress=False)
    batch = {name: made.pool()[name] for name in ("input_ids", "attention_mask", "routing_mask")}
    return model(**batch, memory=bank).logits[batch["attention_mask"].bool()]


# What is adapted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_lie_on_the_attention_projections_and_routers_are_trained_whole(family) -> None:
    """Of every family all projections of all attention layers, fused ones too, and nothing else; trainable are the
    adapters, the routers and the score biases."""
    model = MSAForCausalLM.from_base(base_model(family), score_bias=True)
    projections = {
        f"base_model.model.{name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name.startswith(f"{prefix}.") for prefix in attention_names(model))
        and not any(router in name for router in ROUTER_MODULES)
    }
    memory_layers = model.config.memory_layers
    wrapped = get_peft_model(model, peft_config(model))
    assert projections and names_of(wrapped, LoraLayer) & {*projections} == projections
    assert {name for name in names_of(wrapped, LoraLayer) if "lora_" not in name} == projections
    saved = names_of(wrapped, ModulesToSaveWrapper)
    assert len(saved) == 3 * len(memory_layers)
    assert {name.rpartition(".")[2] for name in saved} == set(ROUTER_MODULES)
    for name, weight in wrapped.named_parameters():
        whole = "modules_to_save.default" in name and any(router in name for router in ROUTER_MODULES)
        assert weight.requires_grad == (".lora_" in name or whole), name


def attention_names(model: nn.Module) -> list[str]:
    layers = set(attention_layers(model).values())
    return [name for name, module in model.named_modules() if module in layers]


def test_names_that_would_match_elsewhere_are_made_longer() -> None:
    """A projection of the same name outside attention is left alone."""
    model = MSAForCausalLM.from_base(base_model("qwen3"))
    model.model.layers[0].mlp.q_proj = nn.Linear(4, 4)
    config = peft_config(model)
    assert config.target_modules == {f"self_attn.{name}_proj" for name in "qkvo"}
    wrapped = get_peft_model(model, config)
    assert not any("mlp" in name for name in names_of(wrapped, LoraLayer))
    assert len(names_of(wrapped, LoraLayer)) == 16


def test_fields_are_passed_on() -> None:
    """Rank, scale and any other field; more modules to save come on top of the routers."""
    model = setup().model
    config = peft_config(model, r=3, lora_alpha=5, lora_dropout=0.5, modules_to_save=["lm_head"], use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.5, True)
    assert config.task_type == "CAUSAL_LM"
    assert config.modules_to_save == ["lm_head", "router_k_proj", "router_q_proj"]
    assert (peft_config(model).r, peft_config(model).lora_alpha) == (16, 32)


def test_routers_may_stay_as_they_are() -> None:
    """`train_routers=False` trains adapters alone; a shared router has no projections to train."""
    frozen = adapted(train_routers=False)
    assert all("lora_" in name for name, weight in frozen.named_parameters() if weight.requires_grad)
    assert not names_of(frozen, ModulesToSaveWrapper)
    shared = setup(shared_router=True).model
    assert peft_config(shared).modules_to_save is None
    biased = setup(shared_router=True, score_bias=True).model
    assert peft_config(biased).modules_to_save == ["router_score_bias"]


@pytest.mark.parametrize(
    "targets, adapted_names",
    [
        (["q_proj"], {"q_proj"}),
        (("v_proj", "up_proj"), {"v_proj", "up_proj"}),
        (r".*\.layers\.3\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["embed_tokens"], {"embed_tokens"}),
    ],
    ids=["one", "two", "expression", "all-linear", "embedding"],
)
def test_targets_match_what_they_name(targets, adapted_names) -> None:
    """`q_proj` is not `router_q_proj`, and `all-linear` takes neither routers nor the head."""
    wrapped = adapted(target_modules=targets)
    found = {name for name in names_of(wrapped, LoraLayer) if "lora_" not in name}
    assert {name.rpartition(".")[2] for name in found} == adapted_names
    assert not any("router" in name for name in found)
    if isinstance(targets, str) and "3" in targets:
        assert all(".layers.3." in name for name in found)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target_modules": ["q_proj", "c_attn", "query"]}, r"\['c_attn', 'query'\], which match nothing.*'q_proj'"),
        ({"target_modules": ["proj"]}, r"\['proj'\], which match nothing"),
        ({"target_modules": ["self_attn"]}, r"\['self_attn'\], which match nothing"),
        ({"target_modules": ["router_q_proj", "q_proj"]}, r"\['router_q_proj'\]: routers are trained whole"),
        ({"target_modules": r".*\.c_attn"}, r"matches nothing; there are \[.*'q_proj'"),
        ({"target_modules": r".*_proj"}, "also matches the routers"),
        ({"modules_to_save": ["lm_head", "score"]}, r"`modules_to_save` names \['score'\].*'lm_head'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_names_that_match_nothing_are_refused(kwargs, message) -> None:
    """Every one of them, with the names that there are."""
    with pytest.raises(ValueError, match=message):
        peft_config(setup(score_bias=True).model, **kwargs)


def test_models_that_cannot_be_adapted_are_refused() -> None:
    """One without a memory, and one that has adapters."""
    with pytest.raises(ValueError, match=r"has no memory.*from_base"):
        peft_config(base_model("qwen3"))
    with pytest.raises(ValueError, match="adapters already"):
        peft_config(adapted())


def test_a_missing_peft_is_named(monkeypatch) -> None:
    """Only where it is needed, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install msa-hf\[train\]"):
        peft_config(setup().model)


def test_importing_the_preset_imports_no_peft() -> None:
    """Neither the package nor its training side needs the extra before it is used."""
    code = "import sys; sys.modules['peft'] = None; import msa_hf, msa_hf.training"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pool", "packed"])
@pytest.mark.parametrize("family, attention", FEW)
def test_adapters_and_routers_learn_and_the_rest_stays(family, attention, form) -> None:
    """Every adapter and every router gets a gradient, no frozen weight does, and after two steps only they moved."""
    model, made = adapted(family, attention), step()
    found = gradients(model, model(**made.form(form)).loss)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert found.keys() == trainable
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train_a_little(model, made)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == trainable


def test_the_language_loss_reaches_adapters_but_no_router() -> None:
    """Without score bias a router inside modules_to_save learns from the auxiliary loss alone."""
    model, made = adapted(options={"score_bias": False}), step()
    language, auxiliary = (gradients(model, getattr(model(**made.pool()), name)) for name in ("lm_loss", "aux_loss"))
    routers = {name for name, weight in model.named_parameters() if "router_" in name and weight.requires_grad}
    assert routers and not any(name in language and bool(language[name].any()) for name in routers)
    assert all(bool(auxiliary[name].any()) for name in routers)
    assert all(bool(gradient.any()) for name, gradient in language.items() if "lora_" in name)


@pytest.mark.parametrize("form", ["pool", "packed"])
@pytest.mark.parametrize("family, attention", FEW)
def test_gradient_checkpointing_changes_no_gradient(family, attention, form) -> None:
    """Of adapters and routers, though all inputs of the layers are frozen."""
    model, batch = adapted(family, attention), step().form(form)
    plain = gradients(model, model(**batch).loss)
    base = model.get_base_model()
    (getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable)()
    assert_same_gradients(gradients(model, model(**batch).loss), plain, tolerance=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    """As without adapters."""
    model, batch = adapted(), step().pool()
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        model(**batch)


# Inference, saving, merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, attention", FEW)
def test_an_adapter_saves_and_loads_onto_a_fresh_base(family, attention, tmp_path) -> None:
    """The same logits with a memory, routers included, and the loaded model reads the bank that the first one saved."""
    made = step()
    trained = adapted(family, attention)
    train_a_little(trained, made)
    expected = logits_with_memory(trained, made)
    trained.save_pretrained(tmp_path / "adapter")
    trained.encode_documents(made.documents, show_progress=False).save_pretrained(tmp_path / "bank")

    fresh = setup(family, attention, score_bias=True).model
    assert differ(logits_with_memory(fresh, made), expected) > 1e-2
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits_with_memory(loaded, made), expected)
    bank = loaded.load_memory(tmp_path / "bank")
    assert torch.equal(logits_with_memory(loaded, made, bank), expected)


def test_an_adapter_saves_where_the_base_was_a_plain_checkpoint(tmp_path) -> None:
    """PEFT reads the configuration at the base's path, which is that of a model without a memory."""
    base_model("qwen3").save_pretrained(tmp_path / "base")
    model = MSAForCausalLM.from_base(tmp_path / "base", top_k=2, chunk_size=3)
    made = step()
    wrapped = get_peft_model(model, peft_config(model, r=4, init_lora_weights=False))
    expected = logits_with_memory(wrapped, made)
    wrapped.save_pretrained(tmp_path / "adapter")
    saved = {path.name for path in Path(tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
    fresh = MSAForCausalLM.from_base(tmp_path / "base", top_k=2, chunk_size=3)
    assert torch.equal(logits_with_memory(PeftModel.from_pretrained(fresh, tmp_path / "adapter"), made), expected)


@pytest.mark.parametrize("family, attention", FEW)
def test_merging_keeps_the_logits(family, attention, tmp_path) -> None:
    """Merged and unloaded it is a model with a memory again, of the trained routers, that saves and loads as one."""
    made = step()
    model = adapted(family, attention)
    train_a_little(model, made)
    expected = logits_with_memory(model, made)
    routers = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if "router_" in name and weight.requires_grad
    }
    merged = model.merge_and_unload()
    assert isinstance(merged, MSAForCausalLM)
    assert not names_of(merged, LoraLayer) and not names_of(merged, ModulesToSaveWrapper)
    parameters = dict(merged.named_parameters())
    assert routers and all(torch.equal(parameters[name], weight) for name, weight in routers.items())
    # A merged weight rounds otherwise than its two parts, and the score bias magnifies that by 1 / tau.
    assert_same(logits_with_memory(merged, made), expected, tolerance=5e-5)
    merged.save_pretrained(tmp_path)
    loaded = MSAForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert torch.equal(logits_with_memory(loaded, made), logits_with_memory(merged, made))


def test_encoding_and_generating_through_the_adapter() -> None:
    """`PeftModel` hands both on, with the adapter at work; disabled, it is the base with its own routers."""
    made = step()
    model = adapted()
    train_a_little(model, made)
    model.eval()
    base = setup(documents=made.documents, score_bias=True)
    bank = model.encode_documents(made.documents, show_progress=False)
    assert differ(bank.layer(3).pooled_kv, base.bank.layer(3).pooled_kv) > 1e-2
    batch = {name: made.pool("left")[name] for name in ("input_ids", "attention_mask", "routing_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(**batch, memory=bank, **options)
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(merged.generate(**batch, memory=bank, **options), generated)
    assert not torch.equal(base.model.generate(**batch, memory=base.bank, **options), generated)


def test_a_disabled_adapter_is_the_base() -> None:
    """Within `disable_adapter()` adapters and trained routers alike stand aside."""
    made = step()
    model = adapted()
    train_a_little(model, made)
    base = setup(documents=made.documents, score_bias=True)
    with model.disable_adapter():
        ours = logits_with_memory(model, made)
    assert_same(ours, logits_with_memory(base.model, made, base.bank))
    assert differ(logits_with_memory(model, made), ours) > 1e-2


# PEFT's own defaults --------------------------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM"),
    "lora of no task": lambda: LoraConfig(),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "adalora": lambda: AdaLoraConfig(task_type="CAUSAL_LM", total_step=3),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM"),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM"),
    "osf": lambda: OSFConfig(task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("method", METHODS)
def test_targets_by_default_are_the_bases(method) -> None:
    """Of every method PEFT chooses what it chooses on the base, family after family; the routers stay as they are."""
    for family in ("llama", "gpt_neox", "llama"):
        try:
            expected = adapters_of(get_peft_model(base_model(family), METHODS[method]()))
        except ValueError as error:  # what PEFT does not know on the base it does not know here
            with pytest.raises(ValueError, match=str(error)[:40]):
                get_peft_model(MSAForCausalLM.from_base(base_model(family)), METHODS[method]())
            continue
        ours = get_peft_model(MSAForCausalLM.from_base(base_model(family)), METHODS[method]())
        assert expected and adapters_of(ours) == expected


def adapters_of(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_a_family_that_peft_does_not_know_stays_unknown() -> None:
    """Also right after one that it knows."""
    get_peft_model(setup("llama").model, LoraConfig())
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(setup("phi3", "eager").model, LoraConfig())


# Other methods --------------------------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "ia3": {},
    "adalora": {"total_step": 3},
    "vera": {"r": 4},
    "oft": {"oft_block_size": 8},
    "loha": {"r": 4},
    "ln_tuning": {},
    "lora": {"r": 4, "use_dora": True},
}
FEEDFORWARD = {"qwen3": "down_proj", "phi3": "down_proj", "gpt_neox": "dense_4h_to_h"}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("family, attention", FEW[1:2])
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_train_beside_whole_routers(method, family, attention, tmp_path) -> None:
    """All that is trainable, routers included, gets a gradient; saved, it loads onto a fresh model."""
    made, options = step(), OTHERS[method]
    if method == "ln_tuning" and family == "phi3":
        options = {"target_modules": ["input_layernorm"]}  # of which PEFT has no choice
    if method == "ln_tuning" and family == "gpt_neox":
        options = {"target_modules": ["input_layernorm"]}
    base = setup(family, attention, score_bias=True).model
    config = peft_config(base, method=method, **options)
    torch.manual_seed(0)
    model = get_peft_model(base, config).train()
    found = gradients(model, model(**made.pool()).loss)
    assert {name for name in found if "router_" in name} == {
        name for name, weight in model.named_parameters() if "router_" in name and weight.requires_grad
    }
    assert sum("router_" in name for name in found) == 6
    assert found.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    if method == "ia3":
        assert FEEDFORWARD[family] in config.feedforward_modules
        assert config.feedforward_modules < config.target_modules
    train_a_little(model, made)
    expected = logits_with_memory(model, made)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(setup(family, attention, score_bias=True).model, tmp_path)
    assert torch.equal(logits_with_memory(loaded, made), expected)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "lorra"}, r"'lorra'; this PEFT has \[.*'lora'"),
        ({"method": "ia3", "r": 4}, "IA3Config has no `r`"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 4}, "train_routers=False"),
        pytest.param(
            {"method": "supertuning"},
            "train_routers=False",
            marks=pytest.mark.skipif(not hasattr(PeftType, "SUPERTUNING"), reason="PEFT has it from 0.21 on"),
        ),
        ({"method": "trainable_tokens"}, "train_routers=False"),
        ({"method": "prefix_tuning", "target_modules": ["q_proj"]}, "leave `target_modules` out"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_what_a_method_cannot_do_is_refused(kwargs, message) -> None:
    """Instead of leaving routers untrained."""
    with pytest.raises(ValueError, match=message):
        peft_config(setup().model, **kwargs)


def test_prompts_without_routers_and_classes_in_place_of_names() -> None:
    """Both make PEFT's own configuration."""
    config = peft_config(setup().model, method="prompt_tuning", train_routers=False, num_virtual_tokens=4)
    assert (config.num_virtual_tokens, config.task_type, config.modules_to_save) == (4, "CAUSAL_LM", None)
    config = peft_config(setup().model, method=IA3Config, train_routers=False)
    assert config.target_modules == {"k_proj", "v_proj", "down_proj"}


# Repeated layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spans, order, memory_layers",
    [
        ([(0, 3), (1, 4)], [0, 1, 2, 1, 2, 3], [2, 4, 5]),
        ([(0, 3)], [0, 1, 2], [2]),
    ],
)
def test_layers_that_peft_repeats_remember(spans, order, memory_layers, tmp_path) -> None:
    """Copies of memory layers are memory layers: bank, logits and losses are those of a model made of these layers."""
    made, batch = setup("llama", "sdpa", score_bias=True), step()
    reference = setup(
        "llama",
        "sdpa",
        documents=made.documents,
        score_bias=True,
        base={"num_hidden_layers": len(order)},
        memory_layers=memory_layers,
    ).model
    for layer, source in zip(reference.model.layers, order, strict=True):
        layer.load_state_dict(made.model.model.layers[source].state_dict())
    rest = {name: weight for name, weight in made.model.state_dict().items() if ".layers." not in name}
    reference.load_state_dict(rest, strict=False)

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layer_replication=spans)
    model = get_peft_model(made.model, config).eval()
    bank, expected = (which.encode_documents(made.documents, show_progress=False) for which in (model, reference))
    assert list(bank.layers) == memory_layers == model.config.memory_layers
    assert_same(logits_with_memory(model, batch, bank), logits_with_memory(reference, batch, expected))
    reference.config.aux_layers = model.config.aux_layers
    with torch.no_grad():
        ours, theirs = (which(**batch.packed()) for which in (model, reference))
    assert_same(ours.aux_loss, theirs.aux_loss)
    assert_same(ours.lm_loss, theirs.lm_loss)
    found = gradients(model.train(), model(**batch.pool()).loss)
    assert sum(bool(gradient.any()) for name, gradient in found.items() if "lora_B" in name) == len(order)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(setup("llama", "sdpa", score_bias=True).model, tmp_path)
    assert torch.equal(logits_with_memory(loaded, batch), logits_with_memory(model, batch))


def test_repeating_no_memory_layer_is_refused() -> None:
    """With the reason, when the model is to remember."""
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[(0, 2)])
    model = get_peft_model(setup("llama").model, config)
    with pytest.raises(ValueError, match="keep one of `memory_layers`"):
        model.encode_documents([[3, 4]], show_progress=False)
