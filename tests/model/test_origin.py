"""What a bank was made with: all that changes its states makes it another one, and nothing else does."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from families import FAMILIES, base_model
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from setups import Setup, batch_of, build, setup
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.model import fingerprint_msa, inference_msa, origin_msa
from msa_hf.model.cache_msa import MSACache
from msa_hf.model.compat_msa import CACHE
from msa_hf.model.fingerprint_msa import model_fingerprint
from msa_hf.model.origin_msa import FIRST_FIELDS, BankOrigin, default_fields, state_configuration
from msa_hf.model.weights_msa import WeightsRecord, weight_differences
from msa_hf.training import peft_config

QUESTION = batch_of([[4, 5, 6, 7]])


def ask(model: Any, bank: Any) -> Any:
    with torch.no_grad():
        return model(**QUESTION, memory=bank)


def refusal(model: Any, bank: Any) -> str:
    """What a model says to a bank that it refuses, in both ways of asking."""
    with pytest.raises(ValueError, match="This bank was not made with this model") as caught:
        ask(model, bank)
    with pytest.raises(ValueError, match="This bank was not made with this model"):
        model.generate(QUESTION["input_ids"], memory=bank, max_new_tokens=1)
    lines = str(caught.value).split("\n")
    assert "encode the documents again" in lines[-1]
    return "\n".join(line.removeprefix("  - ") for line in lines[1:-1])


def encode(model: Any, made: Setup) -> MemoryBank:
    return model.encode_documents(made.documents, show_progress=False)


def stored(bank: MemoryBank, directory: Path) -> MemoryBank:
    """The bank as it comes back from a directory."""
    bank.save_pretrained(directory)
    return MemoryBank.from_pretrained(directory)


def saved(made: Setup, directory: Path) -> Callable[..., Any]:
    """Loads the model of `made` with other options."""
    made.model.save_pretrained(directory)
    return lambda **options: MSAForCausalLM.from_pretrained(directory, attn_implementation="eager", **options)


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


# --- configuration ----------------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, str, Any]] = [
    ("qwen3", "rope_parameters.rope_theta", 5.0),
    ("qwen3", "rms_norm_eps", 0.1),
    ("qwen3", "hidden_act", "gelu"),
    ("gemma2", "query_pre_attn_scalar", 2),
    ("gemma2", "attn_logit_softcapping", 2.0),
    ("gemma2", "sliding_window", 3),
    ("granite", "embedding_multiplier", 7.0),
    ("granite", "attention_multiplier", 0.1),
    ("qwen3_moe", "num_experts_per_tok", 1),
    ("gemma3_text", "rope_parameters.full_attention.rope_theta", 7.0),
]
HARMLESS: dict[str, Any] = {
    "attention_dropout": 0.5,
    "use_cache": False,
    "pad_token_id": 5,
    "eos_token_id": [3, 4],
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "architectures": ["Other"],
    "_name_or_path": "somewhere/else",
    "logits_scaling": 3.0,
}


def changed(config: Any, path: str, value: Any) -> Any:
    """A copy of a configuration with another value of one field, given by its dotted name."""
    made = copy.deepcopy(config)
    first, *rest = path.split(".")
    if not rest:
        setattr(made, first, value)
        return made
    inner = getattr(made, first)
    for name in rest[:-1]:
        inner = inner[name]
    inner[rest[-1]] = value
    return made


@pytest.mark.parametrize("family, path, value", CHANGES, ids=[f"{family} {path}" for family, path, _ in CHANGES])
def test_a_field_that_changes_states_refuses(family: str, path: str, value: Any, tmp_path: Path) -> None:
    """And the states do differ, so that the refusal is deserved."""
    made = setup(family)
    load = saved(made, tmp_path / "model")
    assert made.bank.origin.differences(load().memory_origin()) == []
    other = load(config=changed(made.model.config, path, value))
    bank = encode(other, made)
    layer = max(made.bank.layers)
    assert not torch.allclose(bank.layer(layer).pooled_kv, made.bank.layer(layer).pooled_kv, atol=1e-4)
    assert refusal(made.model, stored(bank, tmp_path / "bank")).startswith(f"configuration: {path} was ")
    assert f"configuration: {path} was " in refusal(other, made.bank)


def test_a_field_that_nobody_knows_refuses() -> None:
    made = setup()
    other = copy.deepcopy(made.model)
    other.config.state_scale = 3
    assert (
        refusal(other, made.bank) == "configuration: state_scale was not set when the bank was made, the model's is 3"
    )
    other.config.state_scale = None
    ask(other, made.bank)


class AlwaysEqual:
    """A setting that is like any other of its kind, as the ways to quantize of transformers are."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AlwaysEqual)


def test_a_configuration_that_changes_after_the_bank_was_accepted() -> None:
    """Within its fields too, and where what is equal says other things."""
    made = setup()
    model = copy.deepcopy(made.model)
    ask(model, made.bank)
    theta = model.config.rope_parameters["rope_theta"]
    model.config.rope_parameters["rope_theta"] = 5.0
    assert "rope_parameters.rope_theta" in refusal(model, made.bank)
    model.config.rope_parameters["rope_theta"] = theta
    ask(model, made.bank)
    model.config.memory_layers.pop()
    assert "memory_layers" in refusal(model, made.bank)
    model = copy.deepcopy(made.model)
    model.config.way = AlwaysEqual("one")
    bank = encode(model, made)
    ask(model, bank)
    model.config.way.text = "another"
    assert "configuration: way was 'one'" in refusal(model, bank)


def test_fields_without_a_part_in_the_states_do_not_refuse() -> None:
    made = setup("granite")
    for name, value in HARMLESS.items():
        other = copy.deepcopy(made.model)
        setattr(other.config, name, value)
        assert made.bank.origin.differences(other.memory_origin()) == [], name


@pytest.mark.parametrize("kind, counts", [("default", False), ("linear", False), ("dynamic", True), ("yarn", True)])
def test_the_limit_of_positions_counts_where_the_positions_look_at_it(kind: str, counts: bool) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **({} if kind == "default" else {"factor": 2.0})}
    configs = [
        AutoConfig.for_model("llama", max_position_embeddings=limit, rope_parameters=dict(rope)) for limit in (64, 128)
    ]
    short, long = map(state_configuration, configs)
    assert ("max_position_embeddings" in short) == counts and (short != long) == counts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_the_same(family: str, tmp_path: Path) -> None:
    """From its checkpoint, in another dtype, and made of the plain checkpoint again."""
    base = base_model(family)
    base.save_pretrained(tmp_path / "base")
    model = MSAForCausalLM.from_base(base, chunk_size=4)
    model.save_pretrained(tmp_path / "model")
    origin = BankOrigin.from_dict(json.loads(json.dumps(model.memory_origin().to_dict())))
    assert origin.configuration and origin.weights
    assert origin.differences(MSAForCausalLM.from_pretrained(tmp_path / "model").memory_origin()) == []
    half = MSAForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert half.dtype == torch.float16 and origin.differences(half.memory_origin()) == []
    assert half.memory_origin().differences(model.memory_origin()) == []
    assert origin.differences(MSAForCausalLM.from_base(tmp_path / "base", chunk_size=4).memory_origin()) == []


def test_fields_of_another_transformers() -> None:
    """A field that only one of two versions knows counts unless it has that version's default."""
    origin = setup().model.memory_origin()
    assert origin.configuration is not None and origin.configuration_defaults is not None
    assert "rms_norm_eps" in origin.configuration_defaults and "hidden_size" not in origin.configuration_defaults

    def with_fields(defaults: tuple[str, ...] = (), drop: str = "", **more: Any) -> BankOrigin:
        record = origin.to_dict()
        record["configuration"] = {**record["configuration"], **more}
        record["configuration"].pop(drop, None)
        record["configuration_defaults"] = [*record["configuration_defaults"], *defaults]
        return BankOrigin.from_dict(record)

    newer = with_fields(defaults=("gate_limit",), gate_limit=7.0)
    assert newer.differences(origin) == origin.differences(newer) == []
    other = with_fields(gate_limit=5.0)
    assert other.differences(origin) == [
        "configuration: gate_limit was 5.0 when the bank was made, the model's is not set"
    ]
    older = with_fields(drop="rms_norm_eps")  # which the transformers at hand completes
    assert older.differences(origin) == [] == origin.differences(older)
    assert default_fields("unknown", {"a": 1}) == ()


def test_every_configuration_of_a_decoder_gives_json() -> None:
    for kind in ("llama", "deepseek_v3", "gemma3n_text", "zamba2", "gpt2", "falcon", "qwen3_next"):
        fields = state_configuration(CONFIG_MAPPING[kind]())
        assert json.loads(json.dumps(fields, allow_nan=False)) == fields


# --- dtype ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_is_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """In both directions, and from bf16 to fp16; a change is seen in it, and named with the dtypes."""
    made = setup()
    load = saved(made, tmp_path / "model")
    model = load(dtype=dtype)
    ask(model, stored(made.bank, tmp_path / "bank"))
    bank = stored(encode(model, made), tmp_path / "bank")
    for other in (made.model, load(dtype=torch.bfloat16), load(dtype=torch.float16)):
        ask(other, bank)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    said = refusal(model, made.bank)
    assert said.startswith("model_fingerprint: the bank has ")
    assert "1 of 50 parameters have other values, the first is layers.1.self_attn.v_proj.weight" in said
    assert f"the bank was made in float32, the model is in {str(dtype).removeprefix('torch.')}" in said


def test_values_that_a_record_does_not_keep_count() -> None:
    """The fingerprint looks at more of them, and decides wherever dtypes let it."""
    made = setup()
    weight = made.model.model.layers[0].mlp.up_proj.weight
    step = weight.numel() // 64
    with torch.no_grad():
        weight.flatten()[3 * step] += 1.0
    assert "some weights have other values" in refusal(made.model, made.bank)


def test_weights_of_mixed_dtypes(tmp_path: Path) -> None:
    """Each parameter is compared in the dtype that it has."""
    made = setup()
    mixed = saved(made, tmp_path)(dtype=torch.float16)
    mixed.model.norm.float()
    for layer in mixed.model.layers:
        layer.input_layernorm.float()
    assert set(mixed.memory_origin().weights.dtypes) == {"float16", "float32"}
    assert made.bank.origin.differences(mixed.memory_origin()) == []
    assert mixed.memory_origin().differences(made.model.memory_origin()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_cast_that_rounds_positions_is_said(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast rounds the frequencies of positions, loading in a dtype does not; other frequencies are another model."""
    made = setup(family)
    load = saved(made, tmp_path)
    warned: list[str] = []
    monkeypatch.setattr(origin_msa.logger, "warning_once", warned.append)
    ask(load(dtype=dtype), made.bank)
    assert not warned
    cast = load().to(dtype)
    ask(cast, made.bank)
    assert len(warned) == 1 and "rounded the frequencies" in warned[0]
    bank = encode(cast, made)
    ask(load().to(dtype), bank)
    assert len(warned) == 1
    ask(load(dtype=dtype), bank)
    assert len(warned) == 2
    for name, buffer in made.model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(1.02)
    assert refusal(made.model, bank).startswith("positions: the rotary frequencies have other values")


# --- weights that change ----------------------------------------------------------------------------------------------


def step_of_an_optimizer(model: Any) -> None:
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def assign(model: Any) -> None:
    weights = {name: weight * 1.1 for name, weight in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def past_the_counters(model: Any) -> None:
    model.model.layers[2].self_attn.k_proj.weight.data.mul_(1.1)


def replace_module(model: Any) -> None:
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)


@pytest.mark.parametrize("change", [step_of_an_optimizer, assign, past_the_counters, replace_module])
def test_weights_that_change_after_the_bank_was_accepted(change: Callable[[Any], None]) -> None:
    made = setup()
    ask(made.model, made.bank)
    before = copy.deepcopy(made.model.state_dict())
    change(made.model)
    assert "parameters have other values" in refusal(made.model, made.bank)
    made.model.load_state_dict(before)
    ask(made.model, made.bank)


def test_router_keys_count_and_what_only_asks_does_not(tmp_path: Path) -> None:
    """Router queries may be trained on with the bank at hand, in any dtype; documents are encoded without them."""
    made = setup(score_bias=True)
    bank = stored(made.bank, tmp_path / "bank")
    before = ask(made.model, bank)
    with torch.no_grad():
        made.model.lm_head.weight.add_(1.0)
        made.model.model.layers[2].self_attn.router_score_bias.weight.add_(1.0)
        made.model.model.layers[3].self_attn.router_q_proj.weight.normal_()
    assert not torch.equal(ask(made.model, bank).routing[3].scores, before.routing[3].scores)
    load = saved(made, tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ask(load(dtype=dtype), bank)
    again = encode(made.model, made)
    for layer, memory in made.bank.layers.items():
        assert torch.equal(memory.routing_keys, again.layers[layer].routing_keys)
        assert torch.equal(memory.pooled_kv, again.layers[layer].pooled_kv)
    with torch.no_grad():
        made.model.model.layers[2].self_attn.router_k_proj.weight.add_(1.0)
    assert "layers.2.self_attn.router_k_proj.weight" in refusal(made.model, made.bank)


def test_a_step_of_training_keeps_its_bank() -> None:
    """Keys and values are constants there and the weights move; whoever evaluates with that bank hears of it."""
    made = setup()
    model = made.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**QUESTION, labels=QUESTION["input_ids"], memory=made.bank).loss.backward()
        optimizer.step()
    refusal(model.eval(), made.bank)
    other = setup(base={"scale": 0.2})
    with pytest.raises(ValueError, match="not made with this model"):
        other.model.train()(**QUESTION, memory=made.bank)


def test_saved_buffers_count() -> None:
    """As the correction biases of a mixture's router, or the numbers of a quantized layer that are no parameters."""
    made = setup()
    for model in (made.model, twin := copy.deepcopy(made.model)):
        model.model.layers[0].mlp.register_buffer("correction", torch.ones(4))
    bank = encode(made.model, made)
    ask(twin, bank)
    twin.model.layers[0].mlp.correction.mul_(2.0)
    assert refusal(twin, bank).startswith("buffers: what the model saves besides its parameters")


def test_weights_are_read_once_per_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking again, switching an adapter and back, and more banks read no weight again; decoding looks at none."""
    reads, looks = [], []
    read, state = fingerprint_msa._read, fingerprint_msa._state
    monkeypatch.setattr(fingerprint_msa, "_read", lambda model: reads.append(1) or read(model))
    monkeypatch.setattr(fingerprint_msa, "_state", lambda model: looks.append(1) or state(model))
    made = build()
    for _ in range(2):
        ask(made.model, made.bank)
        encode(made.model, made)
    assert len(reads) == 1
    looks.clear()
    made.model.generate(QUESTION["input_ids"], memory=made.bank, max_new_tokens=9, eos_token_id=None)
    assert len(looks) == 1 and len(reads) == 1
    adapted = get_peft_model(made.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for _ in range(3):
        encode(made.model, made)
        with adapted.disable_adapter():
            ask(adapted, made.bank)
    assert len(reads) == 3


def test_a_model_that_changed_is_refused_behind_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device works while the host looks: nothing comes out, and the cache is as new."""
    monkeypatch.setattr(inference_msa, "works_beside_the_host", lambda device: True)
    made = setup()
    ask(made.model, made.bank)
    expected = ask(made.model, made.bank).logits
    weight = made.model.model.layers[0].mlp.up_proj.weight
    cache = MSACache(config=made.model.config)
    with torch.no_grad():
        weight.mul_(2.0)
        assert refusal(made.model, made.bank)
        with pytest.raises(ValueError):
            made.model(**QUESTION, memory=made.bank, **{CACHE: cache})
        assert cache.get_seq_length() == 0 and not cache.contexts
        weight.div_(2.0)
        assert torch.equal(made.model(**QUESTION, memory=made.bank, **{CACHE: cache}).logits, expected)


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(made: Setup, *names: str, **options: Any) -> Any:
    """The model with trained adapters, the first of them active."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False, **options}
    model = get_peft_model(made.model, LoraConfig(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**options))
    model.set_adapter(names[0])
    return model.eval()


def scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(factor)


def test_the_adapter_that_is_active_counts(tmp_path: Path) -> None:
    made = setup()
    model = adapted(made, "a", "b")
    assert refusal(model, made.bank) == "adapters: adapter 'a' is active, the bank was made with no adapter"
    of_a = stored(encode(model, made), tmp_path)
    ask(model, of_a)
    model.set_adapter("b")
    assert refusal(model, of_a) == "adapters: adapter 'b' is active, the bank was made with 'a'"
    with model.disable_adapter():
        assert refusal(model, of_a) == "adapters: no adapter is active, the bank was made with adapter 'a'"
    assert refusal(setup().model, of_a) == "adapters: no adapter is active, the bank was made with adapter 'a'"
    model.base_model.set_adapter(["a", "b"])
    assert refusal(model, of_a) == "adapters: adapters 'a' and 'b' are active, the bank was made with 'a'"
    model.set_adapter("a")
    ask(model, of_a)


def test_adapters_that_are_not_active_do_not_count(tmp_path: Path) -> None:
    """Loaded and switched off, or next to the active one; nor does one that was never trained, or scaled to nothing."""
    made = setup()
    plain = setup()
    model = adapted(made, "a", "b")
    with model.disable_adapter():
        off = stored(encode(model, made), tmp_path / "off")
        ask(model, made.bank)
    ask(plain.model, off)
    with model.disable_adapter():
        ask(model, made.model.load_memory(tmp_path / "off"))
    of_a = stored(encode(model, made), tmp_path / "a")
    ask(adapted(setup(), "other name"), of_a)
    fresh = adapted(setup(), "new", init_lora_weights=True)
    ask(fresh, made.bank)
    scale(model, 0.0)
    ask(model, made.bank)


def test_an_adapter_with_other_weights_or_another_scaling() -> None:
    made = setup()
    model = adapted(made, "a")
    bank = encode(model, made)
    scale(model, 2.0)
    said = refusal(model, bank)
    assert said == "adapters: adapter 'a' is active, but 'a' is scaled by 8, when the bank was made by 4"
    scale(model, 0.5)
    ask(model, bank)
    with torch.no_grad():
        made.model.model.layers[1].self_attn.q_proj.lora_B["a"].weight.add_(0.1)
    said = refusal(model, bank)
    assert said == "adapters: adapter 'a' is active, but 'a' has other weights than when the bank was made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_adapter_is_the_same_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Merged, unloaded, switched off while merged: what weights and adapters come to counts, not how it is held."""
    made = setup()
    made.model.to(dtype)
    plain = encode(made.model, made)
    model = adapted(made, "a", "b")
    of_a = stored(encode(model, made), tmp_path)
    model.set_adapter("b")
    of_b = encode(model, made)
    model.set_adapter("a")
    model.merge_adapter(["a"])
    ask(model, of_a)
    merged = encode(model, made)
    for bank in (plain, of_b):
        assert "parameters have other values" in refusal(model, bank)
    model.unmerge_adapter()
    ask(model, merged)
    if dtype == torch.float32:  # in bf16 the weights lose something each time
        model.merge_adapter(["a"])
        with model.disable_adapter():
            ask(model, plain)
        ask(model, of_a)
    unloaded = model.merge_and_unload()
    ask(unloaded, of_a)
    if dtype == torch.float32:
        ask(unloaded, merged)
    assert "parameters have other values" in refusal(unloaded, plain)
    refusal(unloaded, of_b)


def test_routers_that_an_adapter_replaces() -> None:
    """`modules_to_save` puts whole modules in the place of others; the score biases among them do not count."""
    made = setup(score_bias=True)
    model = get_peft_model(made.model, peft_config(made.model, r=2)).eval()
    ask(model, made.bank)  # nothing was trained yet
    routers = made.model.model.layers[2].self_attn.router_k_proj.modules_to_save["default"]
    with torch.no_grad():
        routers.weight.add_(0.1)
        made.model.model.layers[2].self_attn.router_score_bias.modules_to_save["default"].weight.add_(1.0)
    bank = encode(model, made)
    assert refusal(model, made.bank) == "adapters: adapter 'default' is active, the bank was made with no adapter"
    with model.disable_adapter():
        ask(model, made.bank)
    with torch.no_grad():
        made.model.model.layers[2].self_attn.router_score_bias.modules_to_save["default"].weight.add_(1.0)
        made.model.model.layers[2].self_attn.router_q_proj.modules_to_save["default"].weight.add_(1.0)
    ask(model, bank)
    ask(model.merge_and_unload(), bank)


METHODS: dict[str, Any] = {
    "DoRA": LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "bias": LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False),
    "embedding": LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
    "VeRA": VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4, 5]),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_other_methods(method: str) -> None:
    """They count where they are active, whatever they do to a layer."""
    made = setup()
    model = get_peft_model(made.model, METHODS[method], adapter_name="x").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".x" in name:
                weight.add_(0.3)
    assert refusal(model, made.bank) == "adapters: adapter 'x' is active, the bank was made with no adapter"
    bank = encode(model, made)
    assert not torch.allclose(bank.layer(3).pooled_kv, made.bank.layer(3).pooled_kv, atol=1e-4)
    ask(model, bank)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if ".x" in name).add_(0.3)
    assert "'x' has other weights" in refusal(model, bank)
    with model.disable_adapter():
        ask(model, made.bank)


def test_an_adapter_of_the_head_does_not_count() -> None:
    made = setup()
    ask(adapted(made, "a", target_modules=["lm_head"]), made.bank)


# --- offloaded --------------------------------------------------------------------------------------------------------


def half_on_disk(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    places = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    places.update({name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")})
    return load(device_map=places, offload_folder=folder, **options)


def all_in_memory(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    return accelerate.cpu_offload(load(**options), execution_device=torch.device("cpu"), offload_buffers=True)


def all_on_disk(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    return accelerate.disk_offload(load(**options), folder, execution_device=torch.device("cpu"))


def with_hooks_of_ones_own(load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    model = all_on_disk(load, folder, **options)
    add_hook_to_module(model.model.layers[0].mlp.up_proj, ModelHook(), append=True)
    return model


@pytest.mark.parametrize("place", [half_on_disk, all_in_memory, all_on_disk, with_hooks_of_ones_own])
def test_offloaded_weights_are_the_same_model(place: Callable[..., Any], tmp_path: Path) -> None:
    """In every dtype, and without a warning; what was read for it is let go of again."""
    made = setup()
    load = saved(made, tmp_path / "model")
    for number, dtype in enumerate((torch.float32, torch.float16)):
        model = place(load, tmp_path / str(number), dtype=dtype)
        away = sum(weight.is_meta for weight in model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert away and made.bank.origin.differences(model.memory_origin()) == []
        assert sum(weight.is_meta for weight in model.parameters()) == away
        ask(model, made.bank)
        ask(made.model, encode(model, made))


def test_other_offloaded_weights_are_another_model(tmp_path: Path) -> None:
    made = setup()
    with torch.no_grad():
        made.model.model.layers[1].self_attn.v_proj.weight.mul_(1.1)
    model = half_on_disk(saved(made, tmp_path / "model"), tmp_path)
    assert "the first is layers.1.self_attn.v_proj.weight" in refusal(model, made.bank)


# --- quantized --------------------------------------------------------------------------------------------------------


class Blocks(Tensor):
    """A weight kept as whole numbers and a scale per row, as libraries of quantization write them."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor, rounded: str = "no") -> "Blocks":
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype)  # type: ignore[attr-defined]

    def __init__(self, numbers: Tensor, scales: Tensor, rounded: str = "no") -> None:
        self.numbers, self.scales, self.rounded = numbers, scales, rounded

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scales"], {"rounded": self.rounded}

    @classmethod
    def of(cls, weight: Tensor, rounded: str = "no") -> "Blocks":
        scales = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scales).round().to(torch.int8), scales, rounded)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scales, args[0].rounded)
        plain = [item.numbers * item.scales if isinstance(item, cls) else item for item in args]
        return function(*plain, **(kwargs or {}))


def in_blocks(made: Setup, factor: float = 1.0, rounded: str = "no") -> Any:
    model = copy.deepcopy(made.model)
    for layer in model.model.layers:
        blocks = Blocks.of(layer.mlp.up_proj.weight * factor, rounded)
        layer.mlp.up_proj.weight = nn.Parameter(blocks, requires_grad=False)
    return model


def test_quantized_weights_have_a_fingerprint() -> None:
    """Of numbers, scales, and what else a weight says of itself; plain weights are another model."""
    made = setup()
    model = in_blocks(made)
    said = refusal(model, made.bank)
    assert "the weights that made the bank were not quantized, the model's are quantized (Blocks)" in said
    bank = encode(model, made)
    ask(in_blocks(made), bank)
    for other in (in_blocks(made, factor=2.0), in_blocks(made, rounded="dynamic")):
        assert "some weights have other values" in refusal(other, bank)
    refusal(made.model, bank)


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    made = setup()
    configs = [quantization.Int8WeightOnlyConfig(), quantization.Int8DynamicActivationInt8WeightConfig()]
    banks = []
    for config in configs:
        models = [copy.deepcopy(made.model) for _ in range(2)]
        for model in models:
            quantization.quantize_(model, config)
        assert "the model's are quantized (Int8Tensor)" in refusal(models[0], made.bank)
        banks.append(encode(models[0], made))
        ask(models[1], banks[-1])
    refusal(models[0], banks[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """Also where the numbers were put into another order by being used."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    made = setup(base={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    load = saved(made, tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    model, fresh = load(**options), load(**options)
    assert "the model's are quantized (" in refusal(model, made.bank)
    bank = encode(model, made)
    for other in (model, fresh, model):
        logits = ask(other, bank).logits
    assert torch.equal(ask(model, bank).logits, logits)


# --- banks of other versions ------------------------------------------------------------------------------------------


def as_of_old(directory: Path, fingerprint: str | None = None) -> None:
    """Take out of a manifest what earlier versions did not write."""
    from msa_hf.model.bank_format_msa import manifest_checksum

    manifest = manifest_of(directory)
    del manifest["made_with"]
    if fingerprint is not None:
        manifest["origin"]["model_fingerprint"] = fingerprint
    manifest["checksum"] = manifest_checksum(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_earlier_readers_find_what_they_know(tmp_path: Path) -> None:
    """They compare `origin`, whose fields and fingerprint are as ever, and ignore what lies beside it."""
    made = setup()
    made.bank.save_pretrained(tmp_path / "whole")
    with made.model.open_memory(tmp_path / "open") as bank:
        bank.add([{"key": "a", "input_ids": [4, 5]}])
    for name in ("whole", "open"):
        manifest = manifest_of(tmp_path / name)
        assert manifest["origin"].keys() == set(FIRST_FIELDS) and manifest["reader_features"] == []
        assert manifest["origin"]["model_fingerprint"] == fingerprint_of_old(made.model)
        assert set(manifest["made_with"]) == {"configuration", "configuration_defaults", "weights"}
        assert MemoryBank.from_pretrained(tmp_path / name).origin.to_dict() == made.bank.origin.to_dict()


def fingerprint_of_old(model: Any) -> str:
    """The fingerprint of version 0.1.0, written down once more."""
    import hashlib

    head = {id(weight) for weight in model.get_output_embeddings().parameters()}
    head -= {id(weight) for weight in model.get_input_embeddings().parameters()}
    named = sorted(
        (name.removeprefix("model."), weight.detach())
        for name, weight in model.named_parameters()
        if id(weight) not in head and ".router_score_bias." not in name
    )
    digest = hashlib.sha256("".join(f"{name} {tuple(weight.shape)}\n" for name, weight in named).encode())
    for _, weight in named:
        sample = weight.flatten()[:: max(weight.numel() // 64, 1)][:64]
        digest.update(sample.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def test_banks_of_earlier_versions_open(tmp_path: Path) -> None:
    """By their fingerprint alone, by the model with adapters switched off too."""
    made = setup()
    made.bank.save_pretrained(tmp_path)
    as_of_old(tmp_path)
    old = made.model.load_memory(tmp_path)
    assert old.origin.weights is None and old.origin.configuration is None
    ask(made.model, old)
    other = copy.deepcopy(made.model)
    other.config.rms_norm_eps = 0.1
    ask(other, old)  # as ever: it does not say
    model = adapted(made, "a")
    said = refusal(model, old)
    assert said.startswith("model_fingerprint: the bank has ") and said.endswith("active in the model: adapter 'a'")
    with model.disable_adapter():
        ask(model, old)
    half = setup().model.half()
    assert "load it in float32 or bfloat16" in refusal(half, old)
    with model.disable_adapter(), made.model.open_memory(tmp_path) as bank:
        bank.add([{"key": "new", "input_ids": [4, 5]}])
    assert "made_with" not in manifest_of(tmp_path), "nobody knows what its first documents were made with"


def test_a_bank_that_an_earlier_version_made_with_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the fingerprint of all that was loaded, which says nothing of what was active: taken, with a warning."""
    made = setup()
    model = adapted(made, "a")
    encode(model, made).save_pretrained(tmp_path)
    as_of_old(tmp_path, fingerprint_of_old(made.model))
    warned: list[str] = []
    monkeypatch.setattr(origin_msa.logger, "warning_once", warned.append)
    ask(model, made.model.load_memory(tmp_path))
    assert warned and "did not note which of the loaded adapters were active" in warned[0]
    refusal(setup().model, MemoryBank.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "path, value, said",
    [
        (["made_with"], 3, "`made_with` must be an object"),
        (["made_with", "configuration"], [], "`configuration` must be an object or null"),
        (["made_with", "configuration_defaults"], "a", "`configuration_defaults` must be a list of strings"),
        (["made_with", "weights"], 3, "`weights` must be an object"),
        (["made_with", "weights", "fingerprint"], None, "`weights.fingerprint` must be a string"),
        (["made_with", "weights", "frequencies"], 3, "`weights.frequencies` must be a string"),
        (["made_with", "weights", "values"], "?", "`weights.values` is not base64"),
        (["made_with", "weights", "values"], "AAA=", "`weights.values` must hold whole float32 numbers"),
        (["made_with", "weights", "dtypes"], [1], "`weights.dtypes` must be a list of str"),
        (["made_with", "weights", "adapters"], [{"name": 1}], "`weights.name` must be a string"),
        (["origin", "color"], 1, "unknown field of the origin: color"),
    ],
)
def test_a_manifest_that_says_it_wrongly(path: list[str], value: Any, said: str, tmp_path: Path) -> None:
    from msa_hf.model.bank_format_msa import BankFormatError, manifest_checksum

    made = setup()
    made.bank.save_pretrained(tmp_path)
    manifest = manifest_of(tmp_path)
    inner = manifest
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    manifest["checksum"] = manifest_checksum(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BankFormatError) as caught:
        MemoryBank.from_pretrained(tmp_path)
    assert said in str(caught.value)


def test_fields_that_a_later_version_adds_are_ignored(tmp_path: Path) -> None:
    from msa_hf.model.bank_format_msa import manifest_checksum

    made = setup()
    made.bank.save_pretrained(tmp_path)
    manifest = manifest_of(tmp_path)
    manifest["made_with"]["weather"] = "fair"
    manifest["made_with"]["weights"]["color"] = "red"
    manifest["checksum"] = manifest_checksum(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    ask(made.model, made.model.load_memory(tmp_path))


def test_numbers_of_values_that_do_not_fit_are_unequal() -> None:
    """A record may come from a damaged or malicious manifest; it is another model then, not an error."""
    weights = setup().model.memory_origin().weights
    assert weights is not None
    half = {**weights.to_dict(), "fingerprint": "0" * 64, "states": "0" * 64, "dtypes": ["float16"]}
    assert weight_differences(WeightsRecord.from_dict(half), weights) == []
    for change in ({"values": ""}, {"values": "AAAAAA=="}, {"dtypes": ["float16"] * 3}, {"dtypes": []}):
        odd = WeightsRecord.from_dict({**half, **change})
        assert [line[:17] for line in weight_differences(odd, weights)] == ["model_fingerprint"], change


# --- banks that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_a_bank_takes_no_documents_of_another_model(where: str, tmp_path: Path) -> None:
    """Switching an adapter after a bank was opened must not mix states in it; nor are its snapshots read."""
    made = setup()
    model = adapted(made, "a", "b")
    with made.model.open_memory(tmp_path if where == "directory" else None) as bank:
        bank.add([{"key": "one", "input_ids": [4, 5, 6]}])
        model.set_adapter("b")
        with pytest.raises(ValueError, match="adapters: adapter 'b' is active, the bank was made with 'a'"):
            bank.add([{"key": "two", "input_ids": [4, 5, 6]}])
        assert len(bank) == 1
        refusal(model, bank.snapshot())
        model.set_adapter("a")
        bank.add([{"key": "two", "input_ids": [4, 5, 6]}])
        ask(model, bank.snapshot())


def test_fingerprints_of_models_with_adapters() -> None:
    made = setup()
    plain = model_fingerprint(made.model)
    model = adapted(made, "a", "b")
    of_a = model_fingerprint(made.model)
    model.set_adapter("b")
    assert len({plain, of_a, model_fingerprint(made.model)}) == 3
    with model.disable_adapter():
        assert model_fingerprint(made.model) == plain
