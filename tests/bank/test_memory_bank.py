"""The bank in memory: its parts agree, its documents are found, and what it was made with is told apart."""

import sys
import warnings
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from msa_hf.model.memory_msa import (
    BankOrigin,
    DenseLayer,
    Document,
    DocumentTable,
    MemoryBank,
    model_fingerprint,
    tokenizer_fingerprint,
)

CHUNK = 4


def make_origin(**changes: Any) -> BankOrigin:
    fields = {
        "model_fingerprint": "a" * 64,
        "tokenizer_fingerprint": "b" * 64,
        "base_model_type": "qwen3",
        "chunk_size": CHUNK,
        "memory_layers": (2, 3),
        "similarity": "cosine",
        "shared_router": False,
        "prefix_token_ids": (7, 8, 9),
    }
    return BankOrigin(**{**fields, **changes})


def make_parts(lengths: list[int], groups: int = 2, dim: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a bank whose documents have `lengths` tokens, filled with random numbers."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    chunks = [-(-length // CHUNK) for length in lengths]
    total = sum(chunks)
    rows = [
        Document(f"doc-{row}", None if row % 5 == 4 else f"text {row} é 中", {"n": row} if row % 2 else None, *counts)
        for row, counts in enumerate(zip(lengths, chunks, strict=True))
    ]
    return {
        "layers": {i: DenseLayer(random(total, groups * dim), random(total, 2, groups, dim)) for i in (2, 3)},
        "offsets": torch.tensor([0, *chunks]).cumsum(0),
        "prefix": {layer: (random(groups, 3, dim), random(groups, 3, dim)) for layer in range(4)},
        "documents": DocumentTable(rows),
        "origin": make_origin(),
    }


def make_bank(lengths: list[int], **options: Any) -> MemoryBank:
    return MemoryBank(**make_parts(lengths, **options))


def test_counts_and_layers() -> None:
    bank = make_bank([1, 4, 5, 17])
    assert (len(bank), bank.num_chunks, bank.num_tokens) == (4, 1 + 1 + 2 + 5, 27)
    memory = bank.layer(3)
    assert torch.equal(memory.keys, memory.pooled_kv[:, 0]) and torch.equal(memory.values, memory.pooled_kv[:, 1])
    # Fetching a document is one run: K and V of a chunk, then the next chunk.
    assert memory.pooled_kv[2:4].is_contiguous()
    with pytest.raises(KeyError, match=r"layer 1 is not a memory layer; those are \[2, 3\]"):
        bank.layer(1)
    size = 9 * (8 + 16) * 4 * 2 + 4 * 2 * 2 * 3 * 4 * 4
    assert repr(bank) == (
        f"MemoryBank(documents=4, tokens=27, chunks=9, layers=[2, 3], dtype=float32, device=cpu, bytes={size})"
    )


def test_empty_bank() -> None:
    bank = make_bank([])
    assert (len(bank), bank.num_chunks, bank.num_tokens, list(bank.documents)) == (0, 0, 0, [])


def test_to_returns_itself_or_converts_everything() -> None:
    bank = make_bank([3, 9])
    assert bank.to() is bank and bank.to("cpu") is bank and bank.to(dtype=torch.float32) is bank
    half = bank.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.documents is bank.documents
    assert torch.equal(half.layer(2).pooled_kv, bank.layer(2).pooled_kv.bfloat16())
    assert {part.dtype for pair in half.prefix.values() for part in pair} == {torch.bfloat16}
    assert bank.dtype == torch.float32, "the original must not change"
    assert bank.to("meta").device.type == "meta"


@pytest.mark.parametrize("as_arrow", [False, True])
def test_documents_are_a_sequence(as_arrow: bool) -> None:
    rows = list(make_bank([1, 4, 5, 8, 2, 13]).documents)
    table = DocumentTable(DocumentTable(rows).to_arrow() if as_arrow else rows)
    assert list(table) == rows and len(table) == 6
    assert table[0] == rows[0] and table[-1] == rows[-1] and table[1:5:2] == rows[1:5:2] and table[4:99] == rows[4:]
    assert rows[4].text is None and rows[1].metadata == {"n": 1}
    with pytest.raises(IndexError):
        table[6]
    assert [table.position(row.key) for row in rows] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyError, match="doc-6"):
        table.position("doc-6")
    assert table.counts("tokens").tolist() == [1, 4, 5, 8, 2, 13]
    assert table.counts("chunks").tolist() == [1, 1, 2, 2, 1, 4]


@pytest.mark.parametrize("as_arrow", [False, True])
def test_duplicate_keys_are_named(as_arrow: bool) -> None:
    rows = [Document(key, None, None, 1, 1) for key in ("x", "same", "y", "same")]
    renamed = [Document(f"{row}", None, None, 1, 1) for row in range(4)]
    documents: Any = rows
    if as_arrow:
        arrow = DocumentTable(renamed).to_arrow()
        documents = arrow.set_column(0, arrow.schema.field(0), [[row.key for row in rows]])
    with pytest.raises(ValueError, match="2 documents have the key 'same'"):
        DocumentTable(documents)


def test_contradicting_parts_are_named() -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            MemoryBank(**{**parts, **changes})

    parts = make_parts([1, 5])
    layers, prefix, good = parts["layers"], parts["prefix"], parts["layers"][2]
    refused("3 int64 numbers on the CPU", offsets=torch.tensor([0, 3]))
    refused("3 int64 numbers on the CPU", offsets=torch.tensor([0, 1, 3], dtype=torch.int32))
    refused("ascend from 0, by 1 or more", offsets=torch.tensor([0, 3, 3]))
    refused("ascend from 0, by 1 or more", offsets=torch.tensor([1, 2, 3]))
    refused("`chunks` differ", offsets=torch.tensor([0, 2, 3]))
    refused(r"`layers` are \[2\], the origin's are \[2, 3\]", layers={2: good})
    for broken in (
        DenseLayer(good.routing_keys[:-1], good.pooled_kv),
        DenseLayer(good.routing_keys[:, :-1], good.pooled_kv),
        DenseLayer(good.routing_keys, good.pooled_kv[:-1]),
        DenseLayer(good.routing_keys, good.pooled_kv[:, :1]),
        DenseLayer(good.routing_keys, good.pooled_kv.flatten(2)),
    ):
        refused("Layer 2: for 3 chunks", layers={**layers, 2: broken})
    refused(r"`prefix` lacks the memory layers \[3\]", prefix={layer: prefix[layer] for layer in (0, 1, 2)})
    keys, values = prefix[1]
    refused(r"`prefix` of layer 1: keys and values must be \[G, 3, D\]", prefix={**prefix, 1: (keys, values[:1])})
    refused(r"`prefix` of layer 1", prefix={**prefix, 1: (keys[:, :2], values[:, :2])})
    refused("share one dtype", prefix={**prefix, 1: (keys.half(), values.half())})
    refused("share one dtype", layers={**layers, 3: layers[3].to("meta")})
    whole = {layer: memory.to(dtype=torch.int8) for layer, memory in layers.items()}
    refused(
        "floating-point", layers=whole, prefix={i: (k.to(torch.int8), v.to(torch.int8)) for i, (k, v) in prefix.items()}
    )
    # A dropped last, partial chunk.
    refused(
        "'b' has 5 tokens and 1 chunks",
        offsets=torch.tensor([0, 2, 3]),
        documents=DocumentTable([Document("a", None, None, 8, 2), Document("b", None, None, 5, 1)]),
    )


def test_a_bank_without_prefix() -> None:
    parts = make_parts([2])
    bank = MemoryBank(**{**parts, "prefix": {}, "origin": make_origin(prefix_token_ids=())})
    assert bank.prefix == {} and bank.to(dtype=torch.float16).dtype == torch.float16


def test_metadata_that_is_not_json_names_the_document() -> None:
    for metadata in ({"x": {1, 2}}, {"x": float("nan")}):
        with pytest.raises(ValueError, match="Document 'odd': its metadata cannot be written as JSON"):
            DocumentTable([Document("odd", None, metadata, 1, 1)]).to_arrow()


def test_a_missing_pyarrow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = make_bank([3]).documents
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        documents.to_arrow()


# --- origin -----------------------------------------------------------------------------------------------------------


def test_all_differences_are_listed_at_once() -> None:
    ours = make_origin(chunk_size=64)
    theirs = make_origin(chunk_size=32, memory_layers=(1, 2), shared_router=True, similarity="dot")
    with pytest.raises(ValueError) as caught:
        make_bank([1]).check(theirs)
    assert "memory_layers: the bank has [2, 3], the model [1, 2]" in str(caught.value)
    assert ours.differences(theirs) == [
        "chunk_size: the bank has 64, the model 32",
        "memory_layers: the bank has [2, 3], the model [1, 2]",
        "similarity: the bank has cosine, the model dot",
        "shared_router: the bank has False, the model True",
    ]
    assert all(line in str(caught.value) for line in ours.differences(theirs)[1:])
    assert "encode the documents again" in str(caught.value)
    assert make_origin().differences(make_origin()) == []
    make_bank([1]).check(make_origin())


def test_an_unknown_tokenizer_is_not_compared() -> None:
    known, other, unknown = (make_origin(tokenizer_fingerprint=value) for value in ("b", "c", None))
    assert known.differences(unknown) == [] and unknown.differences(known) == []
    assert known.differences(other) == ["tokenizer_fingerprint: the bank has b, the model c"]


def test_origin_round_trip_and_validation() -> None:
    origin = make_origin()
    record = origin.to_dict()
    assert record["memory_layers"] == [2, 3] and BankOrigin.from_dict(record) == origin
    assert make_origin(memory_layers=[2, 3]) == origin, "lists and tuples are the same"
    with pytest.raises(ValueError, match="unknown field of the origin: colour"):
        BankOrigin.from_dict({**record, "colour": 1})
    with pytest.raises(ValueError, match="missing field of the origin: similarity"):
        BankOrigin.from_dict({name: value for name, value in record.items() if name != "similarity"})
    for name, wrong in {
        "model_fingerprint": 3,
        "tokenizer_fingerprint": 3,
        "base_model_type": None,
        "chunk_size": 0,
        "memory_layers": [3, 2],
        "similarity": ["cosine"],
        "shared_router": 1,
        "prefix_token_ids": [1, -1],
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            BankOrigin.from_dict({**record, name: wrong})
    for layers in ("23", [True], [2.0], [], [2, 2]):
        with pytest.raises(ValueError, match="`memory_layers` must be"):
            BankOrigin.from_dict({**record, "memory_layers": layers})


# --- fingerprints -----------------------------------------------------------------------------------------------------


def tiny_model(tied: bool = False, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config)


def test_fingerprint_survives_saving_and_dtype(tmp_path: Any) -> None:
    model = tiny_model().bfloat16()
    expected = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert next(loaded.parameters()).dtype == dtype
        assert model_fingerprint(loaded) == expected
    assert model_fingerprint(tiny_model()) == expected, "float32 weights rounded to bf16 are the bf16 weights"
    assert model_fingerprint(tiny_model(seed=1)) != expected


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.1.self_attn.k_proj", "model.layers.0.mlp.up_proj"]
)
def test_fingerprint_changes_with_the_weights(name: str) -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight.flatten()[0] += 1
    after = model_fingerprint(model)
    assert after != before
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert model_fingerprint(model) not in (before, after)


def test_fingerprint_leaves_out_only_an_untied_head() -> None:
    untied, tied = tiny_model(), tiny_model(tied=True)
    before = model_fingerprint(untied), model_fingerprint(tied)
    with torch.no_grad():
        untied.lm_head.weight += 1
        tied.lm_head.weight += 1
    assert model_fingerprint(untied) == before[0] and model_fingerprint(tied) != before[1]


def test_fingerprint_counts_names_and_shapes_but_not_the_order_of_registration() -> None:
    class Plain(torch.nn.Module):
        base_model_prefix = "model"

        def __init__(self, **weights: torch.Tensor) -> None:
            super().__init__()
            for name, weight in weights.items():
                self.register_parameter(name, torch.nn.Parameter(weight))

        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Identity()

        def get_output_embeddings(self) -> None:
            return None

    ones, range_ = torch.ones(6), torch.arange(200.0)
    before = model_fingerprint(Plain(a=ones, b=range_))
    assert model_fingerprint(Plain(b=range_, a=ones)) == before
    assert model_fingerprint(Plain(a=range_, b=ones)) != before
    assert model_fingerprint(Plain(a=ones, c=range_)) != before
    assert model_fingerprint(Plain(a=ones.view(2, 3), b=range_)) != before
    # The sample spans the whole parameter: the value at 63 / 64 of it counts.
    late = range_.clone()
    late[63 * (200 // 64)] = -1
    assert model_fingerprint(Plain(a=ones, b=late)) != before


def test_fingerprint_of_offloaded_weights_warns_once() -> None:
    with torch.device("meta"):
        model = tiny_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fingerprint = model_fingerprint(model)
    assert [str(warning.message)[:40] for warning in caught] == ["24 parameters lie on the meta device (of"]
    assert len(fingerprint) == 64 and fingerprint != model_fingerprint(tiny_model())


def tiny_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[0], pad_token=words[0])


def test_tokenizer_fingerprint() -> None:
    tokenizer = tiny_tokenizer(["?", "a", "b"])
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a b a", "b"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() != tiny_tokenizer(["?", "a", "b"]).backend_tokenizer.to_str()
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer(["?", "a", "b"]))
    assert tokenizer_fingerprint(tiny_tokenizer(["?", "b", "a"])) != before
    assert tokenizer_fingerprint(None) is None


def test_fingerprint_of_a_slow_tokenizer_is_its_vocabulary() -> None:
    class Slow:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    first = tokenizer_fingerprint(Slow({"a": 0, "b": 1}))
    assert first == tokenizer_fingerprint(Slow({"b": 1, "a": 0})) != tokenizer_fingerprint(Slow({"a": 1, "b": 0}))
