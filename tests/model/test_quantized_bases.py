"""Bases whose weights are not plain numbers: quantized layers, and GGUF files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf import MSAForCausalLM

IDS = torch.tensor([[5, 6, 7, 8]])
MEMORY: dict[str, Any] = {"chunk_size": 3, "top_k": 2}
ROUTERS = ("router_q_proj", "router_k_proj")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def answers(model: Any) -> Tensor:
    """Logits with a memory that the model made, and a generation, so that all of it runs."""
    bank = model.encode_documents([[5, 6, 7, 8], [9, 10]], show_progress=False)
    assert model.generate(IDS, memory=bank, max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    with torch.no_grad():
        found = model(IDS, memory=bank)
    assert set(found.routing) == set(model.config.memory_layers) and bool(found.logits.isfinite().all())
    return found.logits


def assert_copied(model: Any, tolerance: float) -> None:
    """Routers are plain, in the model's dtype, and near the projections of the plain base."""
    plain = base_model("qwen3", **WIDE).state_dict()
    for layer in model.config.memory_layers:
        attention = model.model.layers[layer].self_attn
        for router, projection in zip(ROUTERS, ("q_proj", "k_proj"), strict=True):
            weight = getattr(attention, router).weight
            assert type(weight) is nn.Parameter and weight.dtype == model.dtype
            expected = plain[f"model.layers.{layer}.self_attn.{projection}.weight"]
            assert (weight.float() - expected).abs().max() < tolerance * expected.abs().max()


class RowsOfBytes(nn.Module):
    """A linear layer that keeps whole numbers and a scale per row, as packages that quantize do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter(
            (linear.weight.detach() / self.scale).round().clamp(-127, 127).to(torch.int8), requires_grad=False
        )

    def forward(self, states: Tensor) -> Tensor:
        weight = self.weight.to(states.dtype) * self.scale.to(states.dtype)
        return nn.functional.linear(states, weight, self.bias)


def in_bytes(model: Any) -> Any:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, RowsOfBytes(child))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "phi3", "gpt_neox"])
def test_routers_start_from_quantized_projections(family: str, dtype: torch.dtype) -> None:
    """Also where query, key and value are one matrix; a layer's own bias is not part of it."""
    plain = MSAForCausalLM.from_base(base_model(family).to(dtype), **MEMORY)
    model = MSAForCausalLM.from_base(in_bytes(base_model(family).to(dtype)), **MEMORY)
    expected = dict(plain.named_parameters())
    routers = {name: weight for name, weight in model.named_parameters() if "router" in name}
    assert routers
    for name, weight in routers.items():
        assert weight.dtype == dtype and weight.requires_grad
        assert (weight - expected[name]).abs().max() < 0.02 * expected[name].abs().max()
    answers(model)


def test_bitsandbytes(tmp_path: Path) -> None:
    """8 and 4 bits, of a checkpoint and a live model: routers are copied and stay plain, saved and loaded again too."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base_model("qwen3", **WIDE).save_pretrained(tmp_path / "base")
    for bits, tolerance in ((8, 0.02), (4, 0.3)):
        options = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
        model = MSAForCausalLM.from_base(tmp_path / "base", dtype=torch.bfloat16, **options, **MEMORY)
        live = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, **options)
        live = MSAForCausalLM.from_base(live, **MEMORY)
        model.save_pretrained(tmp_path / f"{bits}")
        saved = MSAForCausalLM.from_pretrained(tmp_path / f"{bits}", dtype=torch.bfloat16)
        for item in (model, live, saved):
            assert_copied(item, tolerance)
        logits = [answers(item) for item in (model, live, saved)]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_torchao(tmp_path: Path) -> None:
    """Whole-number weights that are a kind of tensor."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    base_model("qwen3", **WIDE).save_pretrained(tmp_path / "base")
    options = {"quantization_config": TorchAoConfig(quantization.Int8WeightOnlyConfig())}
    model = MSAForCausalLM.from_base(tmp_path / "base", **options, **MEMORY)
    live = base_model("qwen3", **WIDE)
    quantization.quantize_(live, quantization.Int8WeightOnlyConfig())
    live = MSAForCausalLM.from_base(live, **MEMORY)
    model.save_pretrained(tmp_path / "msa")
    saved = MSAForCausalLM.from_pretrained(tmp_path / "msa")
    for item in (model, live, saved):
        assert_copied(item, 0.02)
    assert torch.equal(answers(model), answers(saved))
    answers(live)


# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path) -> None:
    """A tiny Llama, its matrices in 8 bits."""
    gguf = pytest.importorskip("gguf")
    fields = {"intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=128, hidden_size=32, tie_word_embeddings=False, **fields)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(4)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(128)
    writer.add_token_list([f"t{number}" for number in range(128)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items():
        data = weight.numpy()
        if data.ndim == 2:
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), gguf.quants.quantize(data, kind), raw_dtype=kind
            )
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    """A memory for a model in a GGUF file, by path and live; what is saved is a plain checkpoint."""
    write_gguf(tmp_path / "tiny.gguf")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    with torch.no_grad():
        expected = base(IDS).logits
    model = MSAForCausalLM.from_base(tmp_path, gguf_file="tiny.gguf", memory_layers=[1, 3], **MEMORY)
    live = MSAForCausalLM.from_base(base, memory_layers=[1, 3], **MEMORY)
    for number, item in enumerate((model, live)):
        with torch.no_grad():
            assert torch.equal(item(IDS).logits, expected)
        item.save_pretrained(tmp_path / str(number))
        assert "quantization_config" not in json.loads((tmp_path / str(number) / "config.json").read_text())
        saved = MSAForCausalLM.from_pretrained(tmp_path / str(number))
        assert saved.config.memory_layers == [1, 3] and torch.equal(answers(saved), answers(item))
        bank = item.encode_documents([[5, 6, 7], [8]], show_progress=False)
        with torch.no_grad():
            assert torch.equal(saved(IDS, memory=bank).logits, item(IDS, memory=bank).logits)
    plain = model.to_base()
    plain.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, expected)


@pytest.mark.parametrize("load", [MSAForCausalLM.from_base, MSAForCausalLM.from_pretrained])
def test_a_gguf_file_in_the_place_of_a_directory(load: Any, tmp_path: Path) -> None:
    """The error says how to name it."""
    with pytest.raises(ValueError, match=r"is a GGUF file; pass its directory"):
        load(tmp_path / "tiny.gguf")
    if load == MSAForCausalLM.from_pretrained:
        with pytest.raises(ValueError, match=r"load it with from_base\(..., gguf_file=...\)"):
            load(tmp_path, gguf_file="tiny.gguf")
