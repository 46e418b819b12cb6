"""The adapter of SmolLM2: complete, of the base's shapes, small, and with a protocol that a tokenizer can follow."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from scripted import byte_tokenizer

from msa_hf.generation import PromptProtocol
from msa_hf.retrieval import FusionWeights, fuse

CARD = Path(__file__).parents[2] / "model_cards" / "msa-hf-smollm2-135m"
HIDDEN, KEYS, MIDDLE, LAYERS, RANK, MEMORY_LAYERS = 576, 192, 1536, 30, 28, [14, 19, 24]
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with safe_open(CARD / "adapter_model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118
        return {
            name.removeprefix("base_model.model.model.layers."): tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


def test_every_layer_has_its_updates_and_the_memory_layers_their_routers(shapes: dict[str, tuple[int, ...]]) -> None:
    expected = {}
    for layer in MEMORY_LAYERS:
        router = f"{layer}.self_attn.router"
        expected[f"{router}_q_proj.weight"] = (HIDDEN, HIDDEN)
        expected[f"{router}_k_proj.weight"] = (KEYS, HIDDEN)
        expected[f"{router}_score_bias.weight"] = (1,)
    for layer in range(LAYERS):
        for name, (out, into) in LINEAR.items():
            expected[f"{layer}.{name}.lora_A.weight"] = (RANK, into)
            expected[f"{layer}.{name}.lora_B.weight"] = (out, RANK)
    assert shapes == expected
    configuration = json.loads((CARD / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    memory = json.loads((CARD / "memory.json").read_text())
    assert memory["memory_layers"] == MEMORY_LAYERS and memory["routers_trained"]
    assert sum(path.stat().st_size for path in CARD.rglob("*")) < 20e6


def test_its_protocol_routes_by_the_line_break_behind_the_question() -> None:
    protocol, tokenizer = PromptProtocol.from_pretrained(CARD), byte_tokenizer(("<|im_end|>",))
    ids, routes = PromptProtocol.join(protocol.transcript(tokenizer, "Who came?"))
    assert tokenizer.decode(ids) == "Who came?\n" and all(routes)
    assert tokenizer.decode(protocol.encode(tokenizer, protocol.document, id=3, text="Ann came.")) == "Ann came."
    segments = protocol.transcript(tokenizer, "Who came?", [[(3, "Ann came.")]], answer="Ann")
    text = tokenizer.decode(PromptProtocol.join(segments)[0])
    assert text == "Who came?\n[70003]\n[70003]\nAnn came.\n---\nQuestion: Who came?\nAnswer: Ann<|im_end|>"


@pytest.mark.parametrize(
    ("folder", "ways"), [("", {"router", "lexical"}), ("with-minilm", {"router", "lexical", "dense"})]
)
def test_its_fusion_weights_put_these_ways_together(folder: str, ways: set[str]) -> None:
    weights = FusionWeights.from_pretrained(CARD / folder)
    assert set(weights.ways) == ways and weights.method == "learned weights"
    lists = {way: [(place, 10.0 - place) for place in range(5)] for way in ways}
    assert [place for place, _ in fuse(lists, weights, "Who came?")] == [0, 1, 2, 3, 4]
