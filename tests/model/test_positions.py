"""Positions do not depend on company: on what else is in a batch, what ran before, or other threads."""

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, FAMILIES, base_model
from setups import batch_of, tokens
from torch import Tensor

from msa_hf import MemoryBank, MSAConfig, MSAForCausalLM, MSAModel
from msa_hf.model.positions_msa import equivalent_length, position_limit

# Beyond 32 tokens other frequencies are due, by LongRoPE's threshold or because the base knows no more positions.
SHORT, LONG = tokens(20, 30, seed=5), tokens(100, seed=6)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


def per_layer_type(full: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": DEFAULT}}


# Family, overrides of its configuration, and of the memory's.
SWITCHING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, {}),
    "longrope-short": ("phi3", {"rope_parameters": LONGROPE}, {"rope_length": 32}),
    "longrope-llama": ("llama", {"rope_parameters": {**LONGROPE, "factor": 8.0}}, {}),
    "longrope-mscale": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4}, "num_local_experts": 2},
        {},
    ),
    "longrope-per-type": ("gemma3_text", per_layer_type({**LONGROPE, "factor": 8.0}), {}),
    "dynamic": ("qwen3", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}, {}),
    "dynamic-not-grown": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 128},
        {"rope_length": 128},
    ),
    "dynamic-per-type": (
        "gemma3_text",
        {**per_layer_type(DYNAMIC), "max_position_embeddings": 32},
        {"rope_length": 40},
    ),
}
STEADY: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("qwen3", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "proportional": (
        "qwen3",
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "per-type": ("gemma3_text", per_layer_type({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
}
CASES = {**SWITCHING, **{name: (family, base, {}) for name, (family, base) in STEADY.items()}}
each = pytest.mark.parametrize("case", CASES)
each_switching = pytest.mark.parametrize("case", SWITCHING)


def plain(case: str) -> Any:
    family, overrides, _ = CASES[case]
    FAMILIES.setdefault("phimoe", {"num_key_value_heads": 2, "sliding_window": None})
    return base_model(family, scale=0.3, **{"hidden_size": COMMON["hidden_size"], **overrides})


def made(case: str, base: Any = None, **fields: Any) -> Any:
    fields = {"chunk_size": 4, "top_k": 2, "prefix_token_ids": [5, 6], **CASES[case][2], **fields}
    return MSAForCausalLM.from_base(plain(case) if base is None else base, **fields)


def encode(model: Any, *documents: list[int]) -> MemoryBank:
    return model.encode_documents(list(documents), batch_tokens=2048, show_progress=False)


def contents(bank: MemoryBank, document: int = 0) -> dict[int, Tensor]:
    start, end = bank.offsets[document : document + 2].tolist()
    return {
        layer: torch.cat([memory.pooled_kv[start:end].flatten(1), memory.routing_keys[start:end]], dim=1)
        for layer, memory in bank.layers.items()
    }


def assert_same(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> None:
    for layer, found in ours.items():
        torch.testing.assert_close(found, theirs[layer], atol=2e-5, rtol=1e-4)


def fits(model: Any, document: list[int]) -> bool:
    limit = position_limit(model.config)
    return limit is None or len(document) <= limit


def neighbor(model: Any) -> list[int]:
    """The longest document that the model takes, up to 100 tokens."""
    return LONG[0][: min(100, position_limit(model.config) or 100)]


def last_logits(model: Any, questions: list[list[int]], bank: MemoryBank, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch_of(questions), memory=bank, **options).logits[:, -1]


@each
def test_a_document_is_the_same_beside_a_long_one(case: str) -> None:
    model = made(case)
    alone = contents(encode(model, SHORT[0]))
    assert_same(contents(encode(model, SHORT[0], neighbor(model))), alone)
    assert_same(contents(encode(model, neighbor(model), SHORT[0]), 1), alone)


@each
def test_a_question_is_the_same_beside_a_long_one(case: str) -> None:
    model = made(case)
    bank = encode(model, *SHORT)
    room = (position_limit(model.config) or 128) - model.config.first_position
    long, short = LONG[0][: min(90, room)], SHORT[0][:9]
    alone = last_logits(model, [short], bank)
    torch.testing.assert_close(last_logits(model, [short, long], bank)[:1], alone, atol=1e-4, rtol=1e-4)
    answers = [
        model.generate(**batch_of(rows), memory=bank, max_new_tokens=5, min_new_tokens=5, do_sample=False)[
            0, -5:
        ].tolist()
        for rows in ([short], [short, long[: len(long) - 6]])
    ]
    assert answers[0] == answers[1]


@each_switching
def test_decoding_across_the_switch(case: str) -> None:
    """With a cache, without one, and in a prefill of all tokens: the same logits, beyond 32 tokens too; and with the
    cache every token goes through the model once."""
    model = made(case)
    bank = encode(model, *SHORT)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: fed.append(ids[0].numel()))
    question = SHORT[1][:20]
    count = min(24, (position_limit(model.config) or 128) - model.config.first_position - len(question))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    inputs = torch.tensor([question])
    cached = model.generate(inputs, memory=bank, **options)
    assert fed == [len(question)] + [1] * (count - 1)
    whole = model.generate(inputs, memory=bank, use_cache=False, **options)
    assert cached.sequences.tolist() == whole.sequences.tolist()
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)
    routes = torch.zeros_like(cached.sequences, dtype=torch.bool)
    routes[:, : len(question)] = True
    with torch.no_grad():
        again = model(cached.sequences, memory=bank, routing_mask=routes).logits[0, len(question) - 1 : -1]
    torch.testing.assert_close(torch.cat(cached.logits), again, atol=1e-4, rtol=1e-4)


@each_switching
def test_training_on_a_pool(case: str) -> None:
    """What a question makes of a document, and the document's gradient, do not depend on the rest of the pool."""
    model = made(case)
    question = torch.tensor([SHORT[1][:10]])

    def step(*documents: list[int]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        output = model(question, documents=list(documents), labels=question.where(torch.arange(10) > 5, -100),
                       force_documents=torch.tensor([[0]]))  # fmt: skip
        output.loss.backward()
        layer = model.config.memory_layers[-1]
        weight = next(
            w for n, w in model.named_parameters() if f"layers.{layer}.mlp" in n or f"layers.{layer}.block" in n
        )
        return output.logits.detach(), weight.grad.clone()

    for ours, alone in zip(step(SHORT[0], neighbor(model)), step(SHORT[0]), strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-4, rtol=1e-3)


@each_switching
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_training_computes_what_inference_does(case: str, checkpointing: bool) -> None:
    model = made(case)
    question = torch.tensor([SHORT[1][:10]])
    bank = encode(model, *SHORT)
    with torch.no_grad():
        wanted = model(question, memory=bank).logits
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        model.train()
    found = model(question, documents=SHORT, labels=question.where(torch.arange(10) > 9, -100),
                  routing_mask=torch.ones_like(question, dtype=torch.bool))  # fmt: skip
    if found.loss is not None:
        found.loss.backward()
    torch.testing.assert_close(found.logits, wanted, atol=1e-4, rtol=1e-4)


@each_switching
def test_nothing_that_ran_before_counts(case: str) -> None:
    """Neither a long run of the base, which keeps what it changed to, nor of the memory; and the base is the base."""
    base = plain(case)
    model = made(case, copy.deepcopy(base))
    bank = encode(model, *SHORT)
    inputs, long = torch.tensor([SHORT[0][:9]]), torch.tensor(tokens(140, seed=7))
    with torch.no_grad():
        wanted = model(inputs, memory=bank).logits
        encode(model, neighbor(model))
        torch.testing.assert_close(model(inputs).logits, base(inputs).logits, atol=0, rtol=0)
        model(long)
        torch.testing.assert_close(model(inputs, memory=bank).logits, wanted, atol=0, rtol=0)
    assert_same(contents(encode(model, *SHORT)), contents(bank))
    with torch.no_grad():
        base(long)  # before it gets a memory
    assert_same(contents(encode(made(case, base), *SHORT)), contents(bank))


@contextlib.contextmanager
def busy(model: Any) -> Iterator[None]:
    """A model whose base other threads run on texts of all lengths."""
    stop = threading.Event()

    def run(length: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                model(torch.tensor(tokens(length, seed=length)))

    threads = [threading.Thread(target=run, args=(length,)) for length in (8, 140)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("case", ["longrope", "dynamic"])
def test_other_threads_do_not_count(case: str) -> None:
    model = made(case)
    bank = encode(model, *SHORT)
    wanted = last_logits(model, [SHORT[0]], bank)
    with busy(model):
        for _ in range(15):
            assert_same(contents(encode(model, *SHORT)), contents(bank))
            torch.testing.assert_close(last_logits(model, [SHORT[0]], bank), wanted, atol=1e-5, rtol=1e-4)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_one_choice_per_bank(tmp_path: Path) -> None:
    """It is part of the origin, where it makes a difference."""
    base = plain("longrope")
    long, longer, short, shorter = (
        made("longrope", copy.deepcopy(base), rope_length=length) for length in (None, 200, 32, 31)
    )
    assert long.config.rope_length == 256 and short.config.rope_length == 32
    bank = encode(long, *SHORT)
    assert bank.origin.rope_length == 256
    bank.save_pretrained(tmp_path)
    for other in (short, shorter):
        with pytest.raises(ValueError, match=r"rope_length: the bank has 256, the model 32 .*`rope_length`"):
            other.load_memory(tmp_path)
        with pytest.raises(ValueError, match="rope_length"):
            other(torch.tensor([[3, 4]]), memory=bank)
    longer.load_memory(tmp_path)
    shorter(torch.tensor([[3, 4]]), memory=encode(short, *SHORT))
    differ = [float((contents(bank)[2] - contents(encode(model, *SHORT))[2]).abs().max()) for model in (longer, short)]
    assert differ[0] < 1e-5 < 1e-2 < differ[1], "else it would make no difference"


def test_a_bank_that_does_not_say(tmp_path: Path) -> None:
    """Banks of earlier versions: refused where their documents depended on one another, read where not."""
    for case, readable in (("longrope", False), ("yarn", True)):
        model = made(case)
        bank = encode(model, *SHORT)
        bank.origin = replace(bank.origin, rope_length=None, configuration=None)
        bank.save_pretrained(tmp_path / case)
        if readable:
            model.load_memory(tmp_path / case)
        else:
            with pytest.raises(ValueError, match=r"rope_length: .*encode them again"):
                model.load_memory(tmp_path / case)


def test_a_bank_of_other_bases_says_nothing(tmp_path: Path) -> None:
    """So that earlier versions, for which it is right, go on reading it."""
    encode(made("default"), *SHORT).save_pretrained(tmp_path)
    assert "rope_length" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("case", "length", "equivalent"),
    [
        ("longrope", None, 256),
        ("longrope", 33, 256),
        ("longrope", 32, 32),
        ("longrope", 7, 32),
        ("dynamic", None, 128),
        ("dynamic", 500, 500),
        ("dynamic", 32, 32),
        ("dynamic", 5, 32),
        ("dynamic", 33, 33),
        ("longrope-per-type", 20, 32),
        ("longrope-per-type", 200, 256),
        ("default", None, None),
    ],
)
def test_equivalent_lengths(case: str, length: int | None, equivalent: int | None) -> None:
    model = made(case, **({} if length is None else {"rope_length": length}))
    assert equivalent_length(model.config) == equivalent


def test_texts_beyond_the_choice_are_refused() -> None:
    model = made("longrope-short")
    bank = encode(model, *SHORT)
    with pytest.raises(ValueError, match="limit of 32"):
        encode(model, LONG[0])
    parts = model.encode_documents(LONG, too_long="split", show_progress=False)
    assert len(parts) == 4
    for run in (
        lambda: model(torch.tensor([LONG[0][:29]]), memory=bank),  # the first stands at 4
        lambda: model.generate(torch.tensor([LONG[0][:26]]), memory=bank, max_new_tokens=10, min_new_tokens=10),
        lambda: model(torch.tensor([LONG[0][:29]]), documents=SHORT),
    ):
        with pytest.raises(ValueError, match=r"position 32, .*up to 32 tokens.*`rope_length`"):
            run()
    model(torch.tensor([LONG[0][:28]]), memory=bank)
    model.generate(torch.tensor([LONG[0][:40]]), max_new_tokens=2)  # the base alone is as it was


def test_beyond_the_reach_of_the_scheme() -> None:
    """Nothing is refused that no choice would make better, and nothing depends on company or on the cache."""
    base = base_model("qwen3", scale=0.3, rope_parameters={**DYNAMIC, "factor": 2.0}, max_position_embeddings=32)
    model = made("dynamic", base)
    assert model.config.rope_length == 64
    bank = encode(model, *SHORT)
    alone = last_logits(model, [SHORT[0]], bank)
    together = last_logits(model, [SHORT[0], LONG[0]], bank)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    inputs, options = torch.tensor([SHORT[0]]), {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False}
    cached = model.generate(inputs, memory=bank, **options)
    assert cached.tolist() == model.generate(inputs, memory=bank, use_cache=False, **options).tolist()


def test_a_choice_that_is_none() -> None:
    for value in (0, True, 1.5, "long"):
        with pytest.raises(ValueError, match="`rope_length` must be an integer"):
            made("longrope", rope_length=value)
    with pytest.raises(ValueError, match="`rope_length` is 64, but positions of this base"):
        made("yarn", rope_length=64)


def test_a_base_that_computes_positions_by_itself_is_refused() -> None:
    base = plain("dynamic")
    base.model.layers[1].own_rotary = base.model.rotary_emb
    with pytest.raises(ValueError, match=r"dynamic.*its layers compute them by themselves.*rope_type"):
        made("dynamic", base)
    base = plain("dynamic")
    del base.model.rotary_emb.rope_type
    with pytest.raises(ValueError, match=r"dynamic.*no rotary embedding of transformers"):
        made("dynamic", base)
    assert type(base).__name__ == "Qwen3ForCausalLM" and "forward" not in vars(base.model.rotary_emb)


@each_switching
def test_saving_and_taking_off(case: str, tmp_path: Path) -> None:
    base = plain(case)
    model = made(case, copy.deepcopy(base))
    bank = encode(model, *SHORT)
    wanted = last_logits(model, [SHORT[0]], bank)
    model.save_pretrained(tmp_path)
    loaded = MSAForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_length == model.config.rope_length
    torch.testing.assert_close(last_logits(loaded, [SHORT[0]], bank), wanted)
    assert_same(contents(encode(copy.deepcopy(model), *SHORT)), contents(bank))
    headless = MSAModel.from_pretrained(tmp_path)
    assert_same(contents(encode(headless, *SHORT)), contents(bank))
    rotary = model.model.rotary_emb
    assert "forward" in vars(rotary)
    model.to_base()
    assert "forward" not in vars(rotary) and not hasattr(model.config, "rope_length")
    assert MSAConfig.from_pretrained(tmp_path).base_config().to_dict().get("rope_length") is None
