"""What the protocols say, byte for byte and token for token, and how documents keep their ids."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from scripted import COMPACT, PUBLISHED, TEXTS, bank_of, byte_tokenizer, memory_model

from msa_hf import MemoryBank
from msa_hf.generation import DocumentIds, PromptProtocol
from msa_hf.generation import protocol as protocol_module

QUESTION = "Where is the {quarry}?"
both = pytest.mark.parametrize("protocol", [PUBLISHED, COMPACT], ids=["published", "compact"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def whole(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with special tokens in it, taken as one piece."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(segments: Any) -> list[int]:
    return [token for segment in segments for token in segment.input_ids]


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_the_published_protocol_byte_for_byte(tokenizer) -> None:
    """Document, prompt, ids, block, restated question and answer of the published checkpoints, as typed by hand."""
    rounds = [[(17, "A reef."), (4, "An {odd} one.")], [(12, "More.")]]
    expected = (
        "\nPlease answer the question based on the above historical document information\n\nWhere is the {quarry}?"
        "\nPlease return all documents related to the question\n<|im_end|>\n<|im_start|>"
        "[17][4]<|object_ref_end|>[17]. A reef.\n[4]. An {odd} one.\n<|object_ref_end|>"
        "[12]<|object_ref_end|>[12]. More.\n<|object_ref_end|>"
        "<End-of-Retrieve><|im_start|>The user's question is: Where is the {quarry}?\n<|object_ref_end|>"
        "The answer to the question is: Here.<|im_end|>"
    )
    segments = PUBLISHED.transcript(tokenizer, QUESTION, rounds, answer="Here.")
    assert tokenizer.decode(joined(segments)) == expected
    # Pieces that the model reads in one go are tokenized in one go.
    assert joined(segments)[: -len(segments[-1].input_ids)] == whole(
        tokenizer, expected[: expected.index("The answer")]
    )
    row = PUBLISHED.document_row(17, "A reef.", tokenizer)
    assert row["input_ids"] == whole(tokenizer, "<|im_start|>[17]. A reef.[17]<|im_end|>")
    assert PUBLISHED.prefix_token_ids(tokenizer) == whole(tokenizer, "<|im_start|>user\n")


def test_the_compact_protocol(tokenizer) -> None:
    segments = COMPACT.transcript(tokenizer, QUESTION, [[(17, "A reef."), (4, "One.")]], answer="Here.")
    assert joined(segments) == whole(
        tokenizer,
        "Where is the {quarry}?<|ids|>[17][4]<|docs|>[17] A reef.\n[4] One.\n<|ids|><|answer|>Where is the {quarry}?\n"
        "Here.<|end|>",
    )
    row = COMPACT.document_row(17, "A reef.", tokenizer)
    assert row["input_ids"] == whole(tokenizer, "[17] A reef.\n[17]")


@both
def test_which_tokens_route_and_which_the_model_writes(protocol, tokenizer) -> None:
    """The prompt's routing pieces and the last block route; ids, end of retrieval and answer are the model's."""
    segments = protocol.transcript(tokenizer, QUESTION, [[(1, "First.")], [(2, "Second.")]], answer="Here.")
    ids, routes = protocol.join(segments)
    assert ids == joined(segments)
    routing = tokenizer.decode([token for token, route in zip(ids, routes, strict=True) if route])
    question = next(text for text, routes in protocol.prompt if routes).format(question=QUESTION)
    assert routing == question + protocol.block_text([(2, "Second.")])
    written = "".join(tokenizer.decode(list(segment.input_ids)) for segment in segments if segment.generated)
    first, second = (f"[{number}]{protocol.ids_end}" for number in (1, 2))
    answer = f"{protocol.answer_opening}Here.{protocol.answer_end}"
    assert written == first + second + protocol.retrieval_end + answer


@both
def test_texts_never_become_special_tokens(protocol, tokenizer) -> None:
    """A document or a question that spells a marker adds none: what the protocol's own words bring is all there is."""
    hostile = "".join(protocol.special_tokens) + protocol.retrieval_end
    segments = protocol.transcript(tokenizer, hostile, [[(1, hostile)]], answer=hostile)
    harmless = protocol.transcript(tokenizer, "x", [[(1, "x")]], answer="x")
    special = set(tokenizer.convert_tokens_to_ids(list(protocol.special_tokens)))
    for one, other in zip(segments, harmless, strict=True):
        assert [t for t in one.input_ids if t in special] == [t for t in other.input_ids if t in special]
    wrapped = protocol.document_row(1, hostile, tokenizer)["input_ids"]
    assert [t for t in wrapped if t in special] == [
        t for t in protocol.document_row(1, "x", tokenizer)["input_ids"] if t in special
    ]
    assert hostile in tokenizer.decode(wrapped)


@both
def test_many_are_encoded_as_one_is(tokenizer, protocol) -> None:
    """Also where texts spell markers, of the protocol or of the tokenizer, and where they are empty."""
    marker = protocol.special_tokens[-1]
    texts = ["one", "", f"two {marker} three", marker.upper(), "four [7]", f"{marker}{marker}", "five"]
    rows = [{"id": 10**number, "text": text} for number, text in enumerate(texts)]
    alone = [protocol.encode(tokenizer, protocol.document, **row) for row in rows]
    assert protocol.encode_each(tokenizer, protocol.document, rows) == alone
    assert len(set(map(tuple, alone))) == len(rows)
    assert protocol.encode_each(tokenizer, protocol.document, []) == []


@both
def test_a_tokenizer_without_the_markers_is_refused(protocol) -> None:
    poor = byte_tokenizer(special=protocol.special_tokens[:-1])
    with pytest.raises(ValueError, match=r"no token .*special_tokens"):
        protocol.check_tokenizer(poor)
    protocol.check_tokenizer(byte_tokenizer(special=protocol.special_tokens))


# What the model writes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, ids, marker",
    [
        ("[4][17]<|object_ref_end|>", [4, 17], "<|object_ref_end|>"),
        ("[4] and [ 17 ], I think<|object_ref_end|>[5]", [4, 17], "<|object_ref_end|>"),
        ("[4][17][1", [4, 17], None),
        ("<End-of-Retrieve>", [], "<End-of-Retrieve>"),
        ("[3]<End-of-Retrieve>[4]<|object_ref_end|>", [3], "<End-of-Retrieve>"),
        ("[0][007][][x][-3][4", [0, 7], None),
        (f"[{'9' * 18}][{'9' * 5000}]<|object_ref_end|>", [10**18 - 1], "<|object_ref_end|>"),
        ("[²][4]", [4], None),
        ("", [], None),
    ],
)
def test_reading_ids(text, ids, marker) -> None:
    """Complete ids before the first marker, and that marker; whatever else is written is passed over."""
    assert PUBLISHED.named_ids(text) == (ids, marker)


def test_reading_ids_of_another_format() -> None:
    """The words around the number are the format's, taken literally."""
    other = dataclasses.replace(PUBLISHED, id_format="(doc {id:04d}.)")
    assert other.named_ids("(doc 0012.)(doc 7.)[3](doc 4x)<|object_ref_end|>")[0] == [12, 7]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer to the question is: Paris.<|im_end|>rest", "Paris."),
        ("The answer to the question is:Paris", "Paris"),
        ("Paris, not: The answer to the question is: Rome", "Paris, not: The answer to the question is: Rome"),
        ("", ""),
    ],
)
def test_reading_answers(text, answer) -> None:
    assert PUBLISHED.answer_text(text) == answer


# Validity and storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"document": "{text}"}, "`document`"),
        ({"block_item": "{id} {text} {url}"}, "`block_item`"),
        ({"prompt": (("Answer.", True),)}, "`prompt`"),
        ({"prompt": (("{question}", False),)}, "routes"),
        ({"id_format": "#{id}"}, "`id_format`"),
        ({"id_format": "{id}0"}, "`id_format`"),
        ({"ids_end": ""}, "`ids_end`"),
        ({"retrieval_end": "<|object_ref_end|>!"}, "told apart"),
    ],
)
def test_a_protocol_that_cannot_work_is_refused(changes, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(PUBLISHED, **changes)


@both
def test_saving_and_loading(protocol, tmp_path) -> None:
    protocol.save_pretrained(tmp_path / "model")
    assert PromptProtocol.from_pretrained(tmp_path / "model") == protocol


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda record: record | {"colour": "red"}, "unknown field.*colour"),
        (lambda record: {name: value for name, value in record.items() if name != "ids_end"}, "missing field.*ids_end"),
        (lambda record: record | {"version": 2}, "version is 2"),
        (lambda record: [record], "memory_protocol.json"),
    ],
)
def test_a_damaged_file_is_refused(damage, problem, tmp_path) -> None:
    """With its name and what is wrong."""
    PUBLISHED.save_pretrained(tmp_path)
    file = tmp_path / "memory_protocol.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=problem):
        PromptProtocol.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_protocol(tmp_path) -> None:
    with pytest.raises(OSError, match=r"memory_protocol\.json"):
        PromptProtocol.from_pretrained(tmp_path)


# Documents and their ids ----------------------------------------------------------------------------------------------


def test_rows_of_a_corpus(tokenizer) -> None:
    """Texts and mappings, numbered from `first_id`, wrapped, with keys and metadata kept."""
    corpus = ["One.", {"text": "Two.", "key": "b", "year": 2}, {"text": "Three.", "metadata": {"year": 3}}]
    rows = list(PUBLISHED.encode_corpus(corpus, tokenizer, first_id=5))
    assert [row["metadata"] for row in rows] == [{"id": 5}, {"year": 2, "id": 6}, {"year": 3, "id": 7}]
    assert [(row["key"], row["text"]) for row in rows] == [("5", "One."), ("b", "Two."), ("7", "Three.")]
    assert rows[1]["input_ids"] == whole(tokenizer, "<|im_start|>[6]. Two.[6]<|im_end|>")


def test_texts_of_a_corpus_are_tokenized_together(tokenizer, monkeypatch) -> None:
    """In calls of several texts, which a tokenizer spreads over cores; no further ahead than a block."""
    read, calls = 0, []
    whole = protocol_module.tokenize_texts

    def texts():
        nonlocal read
        for read in range(1, 201):
            yield f"Text {read}. " * (1 if read < 100 else 3000)

    def tokenize_texts(tokenizer, texts, **options):
        calls.append(len(texts))
        return whole(tokenizer, texts, **options)

    monkeypatch.setattr(protocol_module, "tokenize_texts", tokenize_texts)
    rows = COMPACT.encode_corpus(texts(), tokenizer)
    first = next(rows)
    assert read == 64 and calls == [64]
    for number, row in enumerate([first, *(next(rows) for _ in range(79))]):
        assert row == COMPACT.document_row(number, f"Text {number + 1}. ", tokenizer)
    assert 100 < read < 104  # 65,536 characters
    assert next(iter(COMPACT.encode_corpus(texts(), tokenizer, max_tokens=100))) == first and read == 1


@pytest.mark.parametrize("document", ["", "  \n", {"text": None}, {"title": "x"}, {"input_ids": [1]}])
def test_a_document_without_text_is_refused(document, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"Document 1 .* has no text"):
        list(PUBLISHED.encode_corpus(["One.", document], tokenizer))


def test_an_id_of_the_users_own_is_not_overwritten(tokenizer) -> None:
    with pytest.raises(ValueError, match="id='a7'"):
        list(PUBLISHED.encode_corpus([{"text": "One.", "id": "a7"}], tokenizer))
    row = next(PUBLISHED.encode_corpus([{"text": "One.", "id": "a7"}], tokenizer, key_column="id"))
    assert row["key"] == "a7" and row["metadata"] == {"id": 0}


@both
@pytest.mark.parametrize("room", [30, 41, 64])
def test_long_documents_are_cut_into_documents(protocol, room, tokenizer) -> None:
    """Every part fits, has an id of its own, and together they are the text."""
    text = "\n\n".join(" ".join(TEXTS[place : place + 3]) for place in range(0, 9, 3))
    rows = list(protocol.encode_corpus(["Short.", text, "Last."], tokenizer, first_id=98, max_tokens=room))
    parts = rows[1:-1]
    assert max(len(row["input_ids"]) for row in rows) <= room
    assert "".join(row["text"] for row in parts) == text and len(parts) > 3
    assert [row["metadata"]["id"] for row in rows] == list(range(98, 98 + len(rows)))
    assert [row["key"] for row in parts] == [f"99#{part}" for part in range(len(parts))]
    for row in rows:
        assert row["input_ids"] == protocol.document_row(row["metadata"]["id"], row["text"], tokenizer)["input_ids"]


def test_ids_live_in_the_bank(tokenizer, tmp_path) -> None:
    """What `encode_corpus` numbered is found in the saved and loaded bank, beside the plain text."""
    model = memory_model(tokenizer, PUBLISHED)
    bank = bank_of(model, tokenizer, PUBLISHED, TEXTS[:4], first_id=100)
    bank.save_pretrained(tmp_path)
    loaded = MemoryBank.from_pretrained(tmp_path)
    assert [DocumentIds(loaded).position_of(id) for id in (100, 103, 0)] == [0, 3, None]
    assert DocumentIds(loaded).next_id() == 104
    assert loaded.documents[2].text == TEXTS[2]
    wrapped = whole(tokenizer, f"<|im_start|>[102]. {TEXTS[2]}[102]<|im_end|>")
    assert loaded.documents[2].tokens == len(wrapped)


def test_an_id_can_be_written_with_no_characters() -> None:
    """Where routers choose, no id need be read from the memory; it stays among the metadata. Conversions count."""
    tokenizer = byte_tokenizer()
    plain = dataclasses.replace(COMPACT, document="{text}{id!s:.0}")
    row = plain.document_row(7, "Ann came.", tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "Ann came." and row["metadata"] == {"id": 7}
    assert PromptProtocol.from_dict(plain.to_dict()) == plain
    assert tokenizer.decode(COMPACT.encode(tokenizer, "{id!r:>4}", id=7)) == "   7"


@pytest.mark.parametrize(
    ("field", "template", "said"),
    [
        ("id_format", "[{id:999999999}]", "widths above 64"),
        ("id_format", "[{id:>" + "9" * 5000 + "}]", "widths above 64"),
        ("id_format", "[{id:.999999999f}]", "widths above 64"),
        ("block_item", "[{id:{text}}] {text}", "another field gives"),
        ("block_item", "[{id}] {text:65}", "widths above 64"),
        ("document", "{id:q} {text}", "Unknown format code"),
        ("document", "{id} " + "{text}" * 100, "101 fields"),
        ("restated", "{question:x<1000000000}", "widths above 64"),
        ("prompt", (("{question:1000000000}", True),), "widths above 64"),
        ("document", "{id!x} {text}", "conversion"),
    ],
)
def test_templates_that_make_much_of_little_are_refused(
    field: str, template: Any, said: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(COMPACT, **{field: template})
    COMPACT.save_pretrained(tmp_path)
    path = tmp_path / "memory_protocol.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: template}))
    with pytest.raises(ValueError, match=f"(?s)memory_protocol.json.*{said}"):
        PromptProtocol.from_pretrained(tmp_path)


def test_small_formats_are_taken(tokenizer: Any) -> None:
    padded = dataclasses.replace(COMPACT, id_format="[{id:04}]", document="{id!s:.0}{text}")
    assert tokenizer.decode(list(padded.ids_segment(tokenizer, [7]).input_ids)).startswith("[0007]")
    assert padded.document_row(7, "words", tokenizer)["input_ids"] == whole(tokenizer, "words")
