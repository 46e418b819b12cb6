"""A plain model and an adapter become one checkpoint that the command line takes."""

import json
from pathlib import Path

import pytest
import torch
from families import base_model
from peft import PeftModel, get_peft_model
from scripted import byte_tokenizer

from msa_hf import MSAForCausalLM
from msa_hf.generation import COMPACT, PromptProtocol
from msa_hf.retrieval import FusionWeights
from msa_hf.training import peft_config
from msa_hf.training.adapter_memory import save_adapter_memory

ROOT = Path(__file__).parents[2]
FIELDS = {"memory_layers": [2], "query_reduction": "last", "score_bias": True, "chunk_size": 4}


@pytest.mark.parametrize("retrofit", [False, True], ids=["plain", "with-memory"])
def test_the_checkpoint_routes_and_speaks_as_base_and_adapter_do(
    retrofit: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import merge_adapter

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    tokenizer = byte_tokenizer()
    base_model("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    if retrofit:
        MSAForCausalLM.from_base(str(base), **{**FIELDS, "top_k": 3}).save_pretrained(base)
    make = MSAForCausalLM.from_pretrained if retrofit else MSAForCausalLM.from_base
    model = make(str(base), **FIELDS, top_k=16)  # the default, and not what the base with a memory has
    tuned = get_peft_model(model, peft_config(model, r=2, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in tuned.named_parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight) * 0.1)
            assert "lora" in name or "router" in name
    tuned.save_pretrained(adapter)
    with pytest.raises(SystemExit, match=r"has no memory\.json: write the fields"):
        merge_adapter.merge(str(base), adapter, out, torch.float32)
    model.config.routers_trained = True  # by whoever trained it
    save_adapter_memory(model.config, adapter)
    assert json.loads((adapter / "memory.json").read_text()).items() >= FIELDS.items()
    merge_adapter.merge(str(base), adapter, out, torch.float32)
    assert not {"memory_protocol.json", "fusion.json"} & {path.name for path in out.iterdir()}
    COMPACT.save_pretrained(adapter)
    (weights := FusionWeights(("router", "lexical"))).save_pretrained(adapter)
    merge_adapter.merge(str(base), adapter, out, torch.float32)
    merged = MSAForCausalLM.from_pretrained(out).eval()
    assert PromptProtocol.from_pretrained(out) == COMPACT and FusionWeights.from_pretrained(out) == weights
    assert merged.config.query_reduction == "last" and merged.config.top_k == 16
    assert merged.config.routers_trained is True
    apart = PeftModel.from_pretrained(make(str(base), **FIELDS, top_k=16), adapter).eval()
    texts = ["Ann came.", "Bo left early."]
    ids = torch.tensor([tokenizer("Who came?", add_special_tokens=False)["input_ids"]])
    found = []
    for asked in (merged, apart):
        bank = asked.encode_documents(texts, tokenizer, show_progress=False)
        with torch.no_grad():
            output = asked(input_ids=ids, memory=bank, output_document_scores=True)
        found.append((output.logits, output.routing[2].document_scores))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_fields_of_the_card_are_those_that_it_shows() -> None:
    card = ROOT / "model_cards" / "msa-hf-smollm2-135m"
    fields = json.loads((card / "memory.json").read_text())
    text = (card / "README.md").read_text()
    for name, value in fields.items():
        assert f"{name}={json.dumps(value).replace('true', 'True')}".replace('"', "'") in text.replace('"', "'")
