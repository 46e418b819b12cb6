"""Routers of further memory layers begin as the nearest linear map to what trained ones make."""

import json
import re
from pathlib import Path

import pytest
import torch
from families import base_model
from small_corpus import notes, tokenizer_of_notes

from msa_hf import MSAForCausalLM
from msa_hf.training.contrastive import TokenRows
from msa_hf.training.router_inputs import router_inputs
from msa_hf.training.unlabeled import reading_protocol
from msa_hf.training.widening import fit_routers

PAGE = Path(__file__).parents[2] / "docs" / "finetuning.md"


def sample(count: int) -> list[TokenRows]:
    return [TokenRows(torch.randint(3, 128, (40, 12)), torch.randint(5, 13, (40,))) for _ in range(count)]


def widened() -> MSAForCausalLM:
    """Memory layers 1 and 2, whose routers have nothing in common, though both layers read the same."""
    torch.manual_seed(0)
    model = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[1, 2], chunk_size=4, score_bias=True)
    below, above = model.model.layers[1], model.model.layers[2]
    with torch.no_grad():
        below.self_attn.o_proj.weight.zero_()
        below.mlp.down_proj.weight.zero_()
        above.input_layernorm.weight.copy_(below.input_layernorm.weight)
        for module in (above.self_attn.router_q_proj, above.self_attn.router_k_proj):
            torch.nn.init.normal_(module.weight)
        for parameter in above.self_attn.router_score_bias.parameters():
            parameter.fill_(0.375)
    return model


def test_a_layer_that_reads_the_same_gets_the_same_routers() -> None:
    model = widened()
    fit_routers(model, {1: 2}, sample(8), sample(8), ridge=1e-9)
    new, old = model.model.layers[1].self_attn, model.model.layers[2].self_attn
    for name in ("router_q_proj", "router_k_proj"):
        torch.testing.assert_close(new.get_submodule(name).weight, old.get_submodule(name).weight, atol=2e-3, rtol=0)
    assert new.router_score_bias.weight.item() == 0.375


@pytest.mark.parametrize("reduction", ["last", "mean"])
def test_keys_are_fitted_to_all_tokens_and_queries_to_those_that_route(reduction: str) -> None:
    """The model is 32 wide: 20 tokens are made right, and say nothing of others."""
    model = widened()
    model.config.query_reduction = reduction
    rows = TokenRows(torch.randint(3, 128, (6, 9)), torch.tensor([3, 5, 4, 2, 3, 3]))
    fit_routers(model, {1: 2}, [rows], [rows], ridge=1e-9)
    new, old = model.model.layers[1].self_attn, model.model.layers[2].self_attn
    states = router_inputs(model, rows, lambda states: states)[1]
    last = torch.zeros_like(rows.mask)
    last[torch.arange(6), rows.lengths - 1] = True
    for name, right in (("router_k_proj", rows.mask), ("router_q_proj", last if reduction == "last" else rows.mask)):
        difference = (new.get_submodule(name)(states) - old.get_submodule(name)(states)).norm(dim=-1)
        assert difference[right].max() < 0.01
        assert difference[~right].min() > 0.1


def test_what_cannot_be_fitted_is_refused() -> None:
    model = widened()
    with pytest.raises(ValueError, match=r"names \[3\], but memory layers are \[1, 2\]"):
        fit_routers(model, {3: 2}, sample(1), sample(1))
    with pytest.raises(ValueError, match="no rows"):
        fit_routers(model, {1: 2}, sample(1), [])
    with pytest.raises(ValueError, match=r"\[1, 2\] cannot be set and be an example"):
        fit_routers(model, {1: 2, 2: 1}, sample(1), sample(1))
    shared = MSAForCausalLM.from_base(base_model("llama"), memory_layers=[1, 2], shared_router=True)
    with pytest.raises(ValueError, match="shared_router"):
        fit_routers(shared, {1: 2}, sample(1), sample(1))


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = base_model("llama", vocab_size=300, num_hidden_layers=22)
    trained = MSAForCausalLM.from_base(base, memory_layers=[18], chunk_size=4)
    with torch.no_grad():
        trained.model.layers[18].self_attn.router_k_proj.weight.normal_()
    for part in (trained, tokenizer := tokenizer_of_notes(), reading_protocol(tokenizer)):
        part.save_pretrained("my-msa")
    rows = [{"text": text, "question": text.splitlines()[0]} for text in notes().values()]
    for name in ("docs.jsonl", "questions.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*fit_routers.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, PAGE.name, "exec"), {})
    model = MSAForCausalLM.from_pretrained("my-wider-msa")
    assert model.config.memory_layers == [15, 18, 21]
    states = router_inputs(model, TokenRows(torch.arange(3, 9)[None], torch.tensor([6])), lambda states: states)
    keys = {layer: model.model.layers[layer].self_attn.router_k_proj(states[layer]) for layer in states}
    for layer in (15, 21):
        assert torch.cosine_similarity(keys[layer], keys[18], dim=-1).min() > 0.7
