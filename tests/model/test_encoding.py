"""Encoding takes documents of any kind, as they come, and gives the same bank however they are batched."""

import functools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from families import FAMILIES, base_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from msa_hf import MemoryBank, MSAForCausalLM

CHUNK = 4
VOCABULARY = 512


@functools.cache
def model_of(family: str = "qwen3", positions: int = 256) -> Any:
    """A tiny model with a memory; tests leave it as they found it."""
    base = base_model(family, vocab_size=VOCABULARY, max_position_embeddings=positions)
    return MSAForCausalLM.from_base(base, chunk_size=CHUNK, top_k=2, prefix_token_ids=[3, 4]).eval()


@functools.cache
def byte_tokenizer() -> Any:
    """Byte-level BPE: every text has tokens, an emoji has several, decoding gives the text back."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the memory of a document and the question"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@functools.cache
def word_tokenizer() -> Any:
    """One token per word; white space has none."""
    words = {word: number for number, word in enumerate(["[UNK]", *(f"w{number}" for number in range(300))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def encode(documents: Iterable[Any], tokenizer: Any = None, model: Any = None, **options: Any) -> MemoryBank:
    """`encode_documents` of the tiny model, silent."""
    options.setdefault("show_progress", False)
    return (model or model_of()).encode_documents(documents, tokenizer, **options)


def random_documents(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Token ids of documents with these lengths."""
    numbers = random.Random(seed)
    return [[numbers.randrange(5, VOCABULARY) for _ in range(length)] for length in lengths]


def edge_lengths(count: int, seed: int) -> list[int]:
    """Random lengths around the edges of chunks: 1, and multiples of the chunk size with one more or less."""
    numbers = random.Random(seed)
    return [1, 1] + [max(1, CHUNK * numbers.randrange(0, 10) + numbers.choice([-1, 0, 1])) for _ in range(count - 2)]


def memory_of(bank: MemoryBank, number: int) -> dict[int, torch.Tensor]:
    """Layer -> everything the bank holds of document `number`, as [chunks, numbers]."""
    rows = slice(int(bank.offsets[number]), int(bank.offsets[number + 1]))
    return {
        layer: torch.cat([memory.routing_keys[rows], memory.pooled_kv[rows].flatten(1)], dim=1)
        for layer, memory in bank.layers.items()
    }


def assert_same_memory(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> None:
    """1e-5 of the largest number of each layer."""
    assert ours.keys() == theirs.keys()
    for layer, expected in theirs.items():
        torch.testing.assert_close(ours[layer], expected, atol=1e-5 * expected.abs().max().item(), rtol=0.0)


def assert_same_bank(ours: MemoryBank, theirs: MemoryBank) -> None:
    """The same documents' memory in the same order; keys, texts and metadata may differ."""
    assert len(ours) == len(theirs)
    for number in range(len(theirs)):
        assert_same_memory(memory_of(ours, number), memory_of(theirs, number))


# Kinds of documents ---------------------------------------------------------------------------------------------------

IDS = random_documents([3, 1, 9, 4])


def consumed_once(documents: Iterable[Any]) -> Iterator[Any]:
    yield from documents


KINDS: dict[str, Any] = {
    "lists": IDS,
    "tuple of tuples": tuple(tuple(ids) for ids in IDS),
    "tensors": [torch.tensor(ids) for ids in IDS],
    "int32 tensors": [torch.tensor(ids, dtype=torch.int32) for ids in IDS],
    "arrays": [np.array(ids) for ids in IDS],
    "lists of numpy integers": [[np.int64(token) for token in ids] for ids in IDS],
    "mappings": [{"input_ids": ids} for ids in IDS],
    "tokenizer output": [{"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids))} for ids in IDS],
}


@pytest.mark.parametrize("kind", [*KINDS, "generator", "dataset"])
def test_every_kind_of_token_ids(kind: str) -> None:
    """The same ids give the same bank, whatever holds them; documents are named by their number."""
    if kind == "generator":
        documents: Any = consumed_once(IDS)
    elif kind == "dataset":
        documents = datasets.Dataset.from_dict({"input_ids": IDS})
    else:
        documents = KINDS[kind]
    bank = encode(documents)
    assert_same_bank(bank, encode(IDS))
    assert [document.key for document in bank.documents] == ["0", "1", "2", "3"]
    assert [(item.text, item.metadata) for item in bank.documents] == [(None, None)] * 4
    assert [(item.tokens, item.chunks) for item in bank.documents] == [(3, 1), (1, 1), (9, 3), (4, 1)]


TEXTS = ["the memory", "é 中 \U0001f600", " of  a document\n"]


@pytest.mark.parametrize("kind", ["list", "generator", "mappings", "dataset"])
def test_every_kind_of_text(kind: str) -> None:
    """Texts are tokenized without special tokens, and kept to the letter."""
    documents: Any = {
        "list": TEXTS,
        "generator": consumed_once(TEXTS),
        "mappings": [{"text": text} for text in TEXTS],
        "dataset": datasets.Dataset.from_dict({"text": TEXTS}),
    }[kind]
    bank = encode(documents, byte_tokenizer())
    assert [document.text for document in bank.documents] == TEXTS
    assert_same_bank(bank, encode([byte_tokenizer()(text)["input_ids"] for text in TEXTS]))
    assert bank.origin.tokenizer_fingerprint is not None


def test_columns_of_a_dataset() -> None:
    """Key and text columns are found by name; all others become metadata."""
    rows = {"name": ["a", "b"], "body": TEXTS[:2], "year": [1999, None], "tags": [["x", "y"], []]}
    bank = encode(datasets.Dataset.from_dict(rows), byte_tokenizer(), text_column="body", key_column="name")
    assert [(item.key, item.text) for item in bank.documents] == [("a", TEXTS[0]), ("b", TEXTS[1])]
    assert bank.documents[0].metadata == {"year": 1999, "tags": ["x", "y"]}
    assert bank.documents[1].metadata == {"year": None, "tags": []}
    assert_same_bank(bank, encode(TEXTS[:2], byte_tokenizer()))


def test_streamed_dataset() -> None:
    """An iterable dataset has no length and needs none."""
    stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    assert_same_bank(encode(stream, byte_tokenizer()), encode(TEXTS, byte_tokenizer()))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"metadata": None}, None),
        ({"metadata": {"a": 1}}, {"a": 1}),
        ({"metadata": "a note"}, {"metadata": "a note"}),
        ({"metadata": {"a": 1}, "b": 2}, {"metadata": {"a": 1}, "b": 2}),
        ({"part": 7}, {"part": 7}),
    ],
)
def test_metadata(fields: dict[str, Any], expected: Any) -> None:
    """Everything else is metadata; a column of that name alone is taken for the whole."""
    bank = encode([{"input_ids": [5, 6], **fields}, {"key": 12, "input_ids": [7] * 300, **fields}], too_long="split")
    assert [document.metadata for document in bank.documents] == [expected] * 3
    assert [document.key for document in bank.documents] == ["0", "12#0", "12#1"]


def test_given_ids_win_over_the_text() -> None:
    """Where both are there the ids are encoded and the text is kept, with or without a tokenizer."""
    documents = [{"text": "the memory", "input_ids": ids} for ids in IDS]
    for tokenizer in (None, byte_tokenizer()):
        bank = encode(documents, tokenizer)
        assert_same_bank(bank, encode(IDS))
        assert {document.text for document in bank.documents} == {"the memory"}


def test_special_tokens_on_request() -> None:
    """`add_special_tokens` adds what the tokenizer adds."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, bos_token="<bos>")
    from tokenizers.processors import TemplateProcessing

    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", number)]
    )
    plain = tokenizer("the memory", add_special_tokens=False)["input_ids"]
    assert_same_bank(encode(["the memory"], tokenizer), encode([plain]))
    assert_same_bank(encode(["the memory"], tokenizer, add_special_tokens=True), encode([[number, *plain]]))
    split = encode(["the memory of a document"] * 1, tokenizer, add_special_tokens=True, too_long="split", max_length=6)
    assert "".join(document.text or "" for document in split.documents) == "the memory of a document"
    for number_of, document in enumerate(split.documents):
        expected = tokenizer(document.text)["input_ids"]
        assert expected[0] == number and len(expected) == document.tokens <= 6
        assert_same_memory(memory_of(split, number_of), memory_of(encode([expected]), 0))


# Independence of batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_any_order_and_batch_size_agree(family: str) -> None:
    """A document's memory is that of the document alone, in its place, whatever was encoded with it."""
    model, seed = model_of(family), list(FAMILIES).index(family)
    documents = random_documents(edge_lengths(14, seed), seed)
    alone = [memory_of(encode([ids], model=model), 0) for ids in documents]
    numbers = random.Random(seed)
    for batch_tokens in (1, numbers.randrange(2, 40), 100_000):
        order = numbers.sample(range(len(documents)), len(documents))
        rows = [{"key": f"d{number}", "input_ids": documents[number]} for number in order]
        bank = encode(rows, model=model, batch_tokens=batch_tokens)
        assert [document.key for document in bank.documents] == [row["key"] for row in rows]
        assert bank.offsets.diff().tolist() == [-(-len(documents[number]) // CHUNK) for number in order]
        for place, number in enumerate(order):
            assert_same_memory(memory_of(bank, place), alone[number])


def test_batches_hold_what_was_asked_for() -> None:
    """No batch has more than `batch_tokens` tokens, padding included, and none is much smaller without need."""
    model, shapes = model_of(), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        documents = random_documents(edge_lengths(60, seed=3))
        encode(documents, model=model, batch_tokens=100)
    finally:
        hook.remove()
    shapes = shapes[1:]  # the prefix
    assert sum(rows for rows, _ in shapes) == 60
    assert all(rows * length <= 100 for rows, length in shapes)
    assert len(shapes) <= 2 * sum(map(len, documents)) / 100, "batches are well filled"


def test_bank_takes_dtype_and_device() -> None:
    """A model in bfloat16 makes a bank in bfloat16, near the one in float32; `bank_device` says where it lies."""
    model = MSAForCausalLM.from_base(base_model("llama"), chunk_size=CHUNK).eval()
    expected = encode([[5, 6, 7, 8, 9]], model=model)
    bank = encode([[5, 6, 7, 8, 9]], model=model.to(torch.bfloat16), bank_device="cpu")
    assert bank.dtype == torch.bfloat16 and bank.device == torch.device("cpu")
    for layer, memory in bank.layers.items():
        other = expected.layer(layer).pooled_kv
        torch.testing.assert_close(memory.pooled_kv.float(), other, atol=0.05 * other.abs().max().item(), rtol=0.0)


def test_encoding_takes_no_gradient() -> None:
    """The bank is data: it requires no gradient, and the model gets none."""
    model = model_of()
    with torch.enable_grad():
        bank = encode(IDS, model=model)
    assert not any(
        memory.pooled_kv.requires_grad or memory.routing_keys.requires_grad for memory in bank.layers.values()
    )
    assert all(parameter.grad is None for parameter in model.parameters())


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["default", "earliest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computation_stops_after_the_last_memory_layer(family: str, last: str) -> None:
    """Behind its keys, values and router keys nothing runs: no output projection, MLP, later layer, norm or head."""
    layers_with_memory = None if last == "default" else [1]
    base = base_model(family, vocab_size=VOCABULARY)
    model = MSAForCausalLM.from_base(base, chunk_size=CHUNK, memory_layers=layers_with_memory)
    ran: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.__setitem__(name, ran.get(name, 0) + 1))
    model.encode_documents(IDS, show_progress=False)

    layers = f"{model.base_model_prefix}.layers"
    stop = model.config.memory_layers[-1]
    done = {number: {name for name in ran if name.startswith(f"{layers}.{number}.")} for number in range(4)}
    outputs = ("o_proj", "dense", "out_proj")
    for number in range(stop):
        assert any(".mlp" in name for name in done[number]) and any(name.endswith(outputs) for name in done[number])
    assert done[stop], "the layer's projections run"
    assert any(name.endswith("router_k_proj") for name in done[stop])
    forbidden = (*outputs, "router_q_proj")
    assert not [name for name in done[stop] if ".mlp" in name or name.endswith(forbidden)]
    assert not any(done[number] for number in range(stop + 1, 4))
    rest = {name for name in ran if not name.startswith(layers)}
    assert not [name for name in rest if "norm" in name or "head" in name or "embed_out" in name]


# Progress -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Shown unless switched off; it counts documents, split ones once."""
    encode([*IDS, [5] * 300], too_long="split", show_progress=shown)
    text = capsys.readouterr().err
    assert ("Encoding documents" in text and "5/5" in text) if shown else text == ""


def test_progress_bar_without_a_length(capsys: pytest.CaptureFixture[str]) -> None:
    """The documents of a generator are counted as they come."""
    encode(consumed_once(IDS), show_progress=True)
    assert "4doc" in capsys.readouterr().err


# Too long -------------------------------------------------------------------------------------------------------------


def test_too_long_raises_by_default() -> None:
    """The limit is the model's positions; the error names document, length, limit and the way out."""
    model = model_of(positions=32)
    assert encode([[5] * 32], model=model).documents[0].tokens == 32
    with pytest.raises(ValueError, match=r"Document 1 \(key 'long'\) has 33 tokens, above the limit of 32.*'split'"):
        encode([[5], {"key": "long", "input_ids": [5] * 33}], model=model)


@pytest.mark.parametrize(("max_length", "limit"), [(10, 10), (32, 32), (1000, 32)])
def test_max_length_only_lowers_the_limit(max_length: int, limit: int) -> None:
    """`max_length` may ask for less than the model's positions, not for more."""
    model = model_of(positions=32)
    encode([[5] * limit], model=model, max_length=max_length)
    with pytest.raises(ValueError, match=f"above the limit of {limit}"):
        encode([[5] * (limit + 1)], model=model, max_length=max_length)


@pytest.mark.parametrize("limit", [1, 3, CHUNK, 11, 12, 13, 40])
def test_ids_are_split_between_chunks(limit: int) -> None:
    """Pieces end with a chunk, so none but the last holds a partial one; together they are the document."""
    ids = random_documents([40])[0]
    bank = encode([{"key": "a", "input_ids": ids}, {"key": "b", "input_ids": [5]}], too_long="split", max_length=limit)
    if limit == 40:
        assert [document.key for document in bank.documents] == ["a", "b"]
        return
    size = limit if limit < CHUNK else limit // CHUNK * CHUNK
    pieces = [ids[start : start + size] for start in range(0, 40, size)]
    assert [document.key for document in bank.documents] == [*(f"a#{part}" for part in range(len(pieces))), "b"]
    assert [document.tokens for document in bank.documents] == [*map(len, pieces), 1]
    assert_same_bank(bank, encode([*pieces, [5]]))


def test_split_ids_with_a_text() -> None:
    """Given ids are split as such, not tokenized anew; a tokenizer gives the pieces their text."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("the memory of a document", add_special_tokens=False)["input_ids"][::-1]
    for with_tokenizer in (tokenizer, None):
        bank = encode([{"text": "other", "input_ids": ids}], with_tokenizer, too_long="split", max_length=CHUNK)
        pieces = [ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
        assert_same_bank(bank, encode(pieces))
        texts = [tokenizer.decode(piece) if with_tokenizer else None for piece in pieces]
        assert [document.text for document in bank.documents] == texts


CUTS: dict[str, tuple[str, int, list[str]]] = {
    # A paragraph goes before a line that ends later, a line before a sentence, a sentence before a word.
    "paragraph": ("w1 w2 w3 w4 w5 w6 w7\n\nw8\nw9. w10 w11", 9, ["w1 w2 w3 w4 w5 w6 w7\n\n", "w8\nw9. w10 w11"]),
    "line": ("w1 w2 w3 w4 w5 w6\nw7. w8 w9 w10", 7, ["w1 w2 w3 w4 w5 w6\n", "w7. w8 w9 w10"]),
    "sentence": ("w1 w2 w3 w4 w5. w6 w7 w8", 6, ["w1 w2 w3 w4 w5. ", "w6 w7 w8"]),
    "word": ("w1 w2 w3 w4 w5 w6 w7", 3, ["w1 w2 w3 ", "w4 w5 w6 ", "w7"]),
    "no_boundary_in_the_last_quarter": ("w1.\n\nw2 w3 w4 w5 w6", 5, ["w1.\n\nw2 w3 w4 w5 ", "w6"]),
    "leading_space": ("   \n w1 w2 w3", 2, ["   \n w1 w2 ", "w3"]),
    "trailing_space": ("w1 w2 w3 \n\n  ", 2, ["w1 w2 ", "w3 \n\n  "]),
}


@pytest.mark.parametrize("kind", CUTS)
def test_texts_are_cut_at_the_best_boundary(kind: str) -> None:
    """The best boundary in the last quarter of what fits; white space stays with the piece before it."""
    text, limit, expected = CUTS[kind]
    bank = encode([{"key": "a", "text": text}], word_tokenizer(), too_long="split", max_length=limit)
    assert [document.text for document in bank.documents] == expected
    assert [document.key for document in bank.documents] == [f"a#{part}" for part in range(len(expected))]


ALPHABET = [
    "the",
    "memory",
    "\n\n",
    "\n",
    ". ",
    "! ",
    " ",
    "  ",
    "\t",
    "é",
    "中文。",
    "\U0001f600",
    "\U0001f469‍\U0001f680",
    "x" * 30,
    "?",
]


@pytest.mark.parametrize("seed", range(12))
def test_split_texts_are_whole_and_fit(seed: int) -> None:
    """Any text, also with characters of many tokens: the pieces together are the text, each is within the limit."""
    numbers = random.Random(seed)
    tokenizer = byte_tokenizer()
    texts = ["".join(numbers.choices(ALPHABET, k=numbers.randrange(40, 120))) for _ in range(3)]
    limit = numbers.randrange(8, 40)
    bank = encode(texts, tokenizer, too_long="split", max_length=limit)
    for number, text in enumerate(texts):
        pieces = [document for document in bank.documents if document.key.split("#")[0] == str(number)]
        assert "".join(piece.text or "" for piece in pieces) == text
        assert all(1 <= piece.tokens <= limit for piece in pieces)
        for piece in pieces:
            assert len(tokenizer(piece.text, add_special_tokens=False)["input_ids"]) == piece.tokens
        total = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert len(pieces) <= 2 * total / limit + 2, "pieces are not needlessly small"


def test_splitting_is_linear_in_the_text() -> None:
    """A long text is tokenized a few times in all, not once per piece."""
    tokenizer, characters = byte_tokenizer(), 0

    class Counting:
        is_fast = True
        backend_tokenizer = tokenizer.backend_tokenizer
        decode = tokenizer.decode

        def __call__(self, text: str, **options: Any) -> Any:
            nonlocal characters
            characters += len(text)
            return tokenizer(text, **options)

    text = "the memory of a document. " * 400
    bank = encode([text], Counting(), too_long="split", max_length=64)
    assert len(bank) > 30 and "".join(document.text or "" for document in bank.documents) == text
    assert characters < 4 * len(text)


@pytest.mark.parametrize("text", ["\U0001f600", "the \U0001f600 memory", "中"])
def test_a_limit_below_one_character(text: str) -> None:
    """A character of several tokens cannot be split; the error names document and limit."""
    with pytest.raises(ValueError, match=r"Document 1 \(key '1'\) cannot be split: a limit of 1 tokens is too small"):
        encode(["t", text], byte_tokenizer(), too_long="split", max_length=1)


# Bad input ------------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[Any], type[Exception], str]] = {
    "none": ([], ValueError, r"`documents` is empty: a bank needs at least one document"),
    "empty_ids": ([[5], []], ValueError, r"Document 1 \(key '1'\) is empty; leave it out"),
    "empty_tensor": ([torch.zeros(0, dtype=torch.long)], ValueError, r"Document 0 \(key '0'\) is empty"),
    "empty_text": ([{"key": "k", "text": ""}], ValueError, r"Document 0 \(key 'k'\) is empty"),
    "duplicate_key": (
        [{"key": "a", "input_ids": [5]}, {"key": "a", "input_ids": [6]}],
        ValueError,
        r"Document 1 has the key 'a', which an earlier document has",
    ),
    "key_equal_to_a_number": ([{"key": "1", "input_ids": [5]}, [6]], ValueError, r"Document 1 has the key '1'"),
    "key_equal_to_a_part": (
        [{"key": "a#1", "input_ids": [5]}, {"key": "a", "input_ids": [6] * 300}],
        ValueError,
        r"Document 1 has the key 'a#1'",
    ),
    "number": ([[5], 7], TypeError, r"Document 1 is a int; a document is text, token ids or a mapping"),
    "nothing": ([None], TypeError, r"Document 0 is a NoneType"),
    "bytes": ([b"abc"], TypeError, r"Document 0 is a bytes"),
    "set": ([{5, 6}], TypeError, r"Document 0 is a set"),
    "floats": ([[5], [1.5, 2.0]], TypeError, r"Document 1: token ids must be a flat list of integers"),
    "float_tensor": ([torch.ones(3)], TypeError, r"Document 0: token ids must be a flat list"),
    "booleans": ([[True, False]], TypeError, r"Document 0: token ids must be a flat list"),
    "nested": ([[[5, 6]]], TypeError, r"Document 0: token ids must be a flat list"),
    "ragged": ([[[5, 6], [7]]], TypeError, r"Document 0: token ids must be a flat list"),
    "words": ([["w1", "w2"]], TypeError, r"Document 0: token ids must be a flat list"),
    "scalar_tensor": ([torch.tensor(5)], TypeError, r"Document 0: token ids must be a flat list"),
    "text_ids": ([{"input_ids": "5 6"}], TypeError, r"Document 0: token ids must be a flat list"),
    "negative": ([[5], [5, -1]], ValueError, r"Document 1 \(key '1'\) has token ids from -1 to 5.*0 to 511"),
    "beyond_the_vocabulary": ([[5, 512]], ValueError, r"Document 0 .*from 5 to 512, but the model knows 0 to 511"),
    "no_text": (
        [{"title": "x", "id": 3}],
        ValueError,
        r"Document 0 has neither 'text' nor 'input_ids'.*\['id', 'title'\]",
    ),
    "number_as_text": ([{"text": 7}], TypeError, r"Document 0: 'text' is a int, not text"),
    "metadata": (
        [{"input_ids": [5], "when": object()}],
        ValueError,
        r"Document 0: its metadata cannot be written as JSON.*object",
    ),
    "metadata_nan": ([[5], {"input_ids": [5], "x": float("nan")}], ValueError, r"Document 1: its metadata cannot"),
    "too_long": ([[5] * 300], ValueError, r"Document 0 \(key '0'\) has 300 tokens"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_documents_are_named(kind: str) -> None:
    """The error names the document and the cause, comes also from a generator, and leaves the model as it was."""
    documents, error, message = BAD[kind]
    options = {"too_long": "split"} if kind == "key_equal_to_a_part" else {}
    model = model_of()
    before = encode(IDS, model=model)
    for source in (documents, consumed_once(documents)):
        with pytest.raises(error, match=message):
            encode(source, byte_tokenizer(), model=model, **options)
    assert_same_bank(encode(IDS, model=model), before)


@pytest.mark.parametrize(
    ("documents", "kind"), [("one text", "str"), (b"bytes", "bytes"), ({"text": ["a"]}, "dict")], ids=str
)
def test_one_document_instead_of_many(documents: Any, kind: str) -> None:
    """A single text is not taken for a list of letters."""
    with pytest.raises(TypeError, match=f"`documents` must be an iterable of documents, got one {kind}"):
        encode(documents, byte_tokenizer())


def test_text_without_a_tokenizer() -> None:
    """The error says which document is text and what is missing."""
    with pytest.raises(ValueError, match=r"Document 1 is text; pass the `tokenizer`"):
        encode([[5], "a text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "cut"}, r"`too_long` must be 'error' or 'split', got 'cut'"),
        ({"batch_tokens": 0}, r"`batch_tokens` must be at least 1, got 0"),
        ({"max_length": 0}, r"`max_length` must be at least 1, got 0"),
        ({"max_length": -3}, r"`max_length` must be at least 1, got -3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    """Options are checked before anything is read."""

    def documents() -> Iterator[list[int]]:
        raise AssertionError("a document was read")
        yield [5]

    with pytest.raises(ValueError, match=message):
        encode(documents(), **options)


def test_one_token_documents() -> None:
    """The shortest documents: one chunk, the mean of one token."""
    bank = encode([[5], [6], [5]])
    assert [(document.tokens, document.chunks) for document in bank.documents] == [(1, 1)] * 3
    first, second, third = (memory_of(bank, number) for number in range(3))
    assert_same_memory(first, third)
    layer = min(first)
    assert (first[layer] - second[layer]).abs().max() > 0.1


def test_nan_weights_name_document_and_layer() -> None:
    """A NaN that one document's tokens meet is reported with that document, and no bank is made of it."""
    model = MSAForCausalLM.from_base(base_model("qwen3"), chunk_size=CHUNK).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    assert len(encode([[5, 6], [7]], model=model)) == 2
    documents = [{"key": "good", "input_ids": [5, 6]}, {"key": "bad", "input_ids": [7] * 9 + [9]}]
    with pytest.raises(ValueError, match=r"Document 'bad' has NaN or infinite states in layer 2"):
        encode(documents, model=model)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = 0.0
        model.model.layers[3].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"Document 'good' has NaN or infinite states in layer 3"):
        encode(documents, model=model)


class Broken(Exception):
    """Raised by a user's generator."""


def failing() -> Iterator[list[int]]:
    yield [5]
    raise Broken("the source went away")


def test_errors_of_the_source_pass_through() -> None:
    """What a generator raises reaches the caller unchanged."""
    with pytest.raises(Broken, match="the source went away"):
        encode(failing())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("documents", [IDS, [[5], []], "failing"], ids=["good", "bad", "failing"])
def test_training_mode_is_restored(training: bool, documents: Any) -> None:
    """Every module is in the mode it was in before, also after an error; meanwhile dropout is off."""
    base = base_model("llama", attention_dropout=0.5)
    model = MSAForCausalLM.from_base(base, chunk_size=CHUNK).train(training)
    model.model.layers[0].train(not training)
    before = [module.training for module in model.modules()]
    try:
        bank = encode(failing() if documents == "failing" else documents, model=model)
        assert_same_bank(encode(documents, model=model.eval()), bank)
        model.train(training).model.layers[0].train(not training)
    except (ValueError, Broken):
        pass
    assert [module.training for module in model.modules()] == before


def test_a_bank_is_usable_at_once() -> None:
    """The model that made a bank attends to it without a further check, and finds each document by itself."""
    model = model_of()
    bank = encode(random_documents([9, 9, 9]), model=model)
    with torch.no_grad():
        output = model(torch.tensor([random_documents([9, 9, 9])[1]]), memory=bank)
    assert sorted(output.routing) == model.config.memory_layers


def test_many_short_documents_share_few_batches() -> None:
    """Thousands of one-token documents cost a run per batch, not one each."""
    model, runs = model_of(), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[0]))
    try:
        bank = encode([[5 + number % 100] for number in range(3000)], model=model, batch_tokens=1000)
    finally:
        hook.remove()
    assert len(bank) == bank.num_chunks == 3000
    assert runs == [1, 1000, 1000, 1000], "the prefix, then full batches"
