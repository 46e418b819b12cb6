"""A model whose weights lie elsewhere than where it computes answers as the one whose weights are all there."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from setups import Setup, batch_of, setup, tokens

from msa_hf import MSAForCausalLM

accelerate = pytest.importorskip("accelerate")

EXACTLY: dict[str, Any] = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
LAYERS = [f"model.layers.{layer}" for layer in range(4)]
ELSEWHERE = {
    "everything": ["model.embed_tokens", *LAYERS, "model.norm", "lm_head"],
    "embedding": ["model.embed_tokens"],
    "memory layers": LAYERS[2:],
}


def places_of(how: str) -> dict[str, str]:
    """A device map."""
    parts = [*ELSEWHERE["everything"], "model.rotary_emb"]
    return {part: "disk" if part in ELSEWHERE[how] else "cpu" for part in parts}


def offloaded(made: Setup, how: str, folder: Path) -> Any:
    """`made.model` by one of accelerate's ways; the weights named in `ELSEWHERE` on the disk."""
    model = copy.deepcopy(made.model)
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    model.save_pretrained(folder / "saved")
    places = dict.fromkeys([*ELSEWHERE["everything"], "model.rotary_emb"], "cpu") | dict.fromkeys(
        ELSEWHERE[how], "disk"
    )
    return MSAForCausalLM.from_pretrained(
        folder / "saved", device_map=places, offload_folder=str(folder / "off"), attn_implementation="sdpa"
    )


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", *ELSEWHERE])
def test_encoding_and_generating(how: str, tmp_path: Path) -> None:
    """The bank it makes, that of the whole model, turns, beams and several samples."""
    made = setup("qwen3", "sdpa")
    model = offloaded(made, how, tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    own = model.encode_documents(made.documents, show_progress=False)
    for layer, memory in own.layers.items():
        assert torch.equal(memory.pooled_kv, made.bank.layers[layer].pooled_kv)
    batch = batch_of(tokens(9, 5, seed=3))
    for bank in (own, made.bank):
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            expected = made.model.generate(**batch, memory=made.bank, **options, **EXACTLY)
            assert torch.equal(model.generate(**batch, memory=bank, **options, **EXACTLY), expected)
    weights = [weight.is_meta for weight in model.parameters()]
    assert any(weights)  # and they went back


@pytest.mark.parametrize("how", ["cpu_offload", "memory layers"])
def test_drafting(how: str, tmp_path: Path) -> None:
    """Transformers drafts where the first weights are: it works where the embedding is there, else is refused."""
    made = setup("qwen3", "sdpa")
    model = offloaded(made, how, tmp_path)
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": made.base}):
        if how == "cpu_offload":
            with pytest.raises(ValueError, match=r"those of the model are offloaded\. Keep its embedding"):
                model.generate(prompt, memory=made.bank, **options, **EXACTLY)
        else:
            expected = made.model.generate(prompt, memory=made.bank, **EXACTLY)
            assert torch.equal(model.generate(prompt, memory=made.bank, **options, **EXACTLY), expected)
    if how == "cpu_offload":
        with pytest.raises(ValueError, match="those of the assistant are offloaded"):
            made.model.generate(prompt, memory=made.bank, assistant_model=model, **EXACTLY)


@pytest.mark.parametrize("router_init", ["copy", "random"])
def test_new_routers_of_offloaded_layers_are_refused(router_init: str, tmp_path: Path) -> None:
    """There is no file that they could be read from; the way out is named, and works."""
    made = setup("qwen3", "sdpa")
    made.base.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"chunk_size": 3, "top_k": 2, "router_init": router_init}
    placed = {"device_map": places_of("memory layers"), "offload_folder": str(tmp_path / "off")}
    with pytest.raises(ValueError, match=r"Routers of layers \[2, 3\] are new, but these layers are offloaded"):
        MSAForCausalLM.from_base(tmp_path / "base", **placed, **options)
    whole = MSAForCausalLM.from_base(tmp_path / "base", **options)
    whole.save_pretrained(tmp_path / "msa")
    model = MSAForCausalLM.from_pretrained(tmp_path / "msa", **placed)
    bank = whole.encode_documents(made.documents, show_progress=False)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids, memory=bank).logits, whole(ids, memory=bank).logits)
    # Where other layers are offloaded, routers are made as ever.
    placed = {"device_map": places_of("embedding"), "offload_folder": str(tmp_path / "off2")}
    model = MSAForCausalLM.from_base(tmp_path / "base", **placed, **{**options, "router_init": "copy"})
    attention = model.model.layers[3].self_attn
    assert torch.equal(attention.router_q_proj.weight, attention.q_proj.weight)
