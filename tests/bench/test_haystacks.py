"""Haystacks are nested, sentences lie where they were put, and a bank is what encoding its texts would make."""

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_hf.bench import asking
from msa_hf.bench.asking import Ask, holds, index_words, put
from msa_hf.bench.banks import HaystackBanks
from msa_hf.bench.haystack import Haystack, HaystackTooSmall, Insert, Plant, generated_texts
from msa_hf.bench.style import insert_in_style
from msa_hf.generation import PromptProtocol
from msa_hf.model.splitting_msa import split_text
from msa_hf.model.tokenizing_msa import tokenize
from msa_hf.synthetic.sentences import insert_sentence

Tiny = tuple[Any, Any, PromptProtocol]
NEEDLE = "The Jethefux Crossing is held at Krikutust Heights."


@pytest.fixture(scope="module")
def haystack(tiny: Tiny) -> Haystack:
    return Haystack(generated_texts(), tiny[1], 1800)


def test_small_haystacks_are_the_beginning_of_large_ones(tiny: Tiny, haystack: Haystack) -> None:
    small = Haystack(generated_texts(), tiny[1], 1000)
    assert haystack.texts[: len(small)] == small.texts and haystack.documents(1000) == len(small)
    assert haystack.tokens(len(small) - 1) < 1000 <= haystack.tokens(len(small))
    counted = sum(len(tiny[1](text, add_special_tokens=False)["input_ids"]) for text in haystack.texts)
    assert haystack.tokens(len(haystack)) == counted
    with pytest.raises(HaystackTooSmall, match=r"have \d\d tokens, but 1,000"):
        Haystack(["One text of enough words that it counts as a document of its own, and no more."], tiny[1], 1000)


def test_long_texts_are_cut_and_nothing_is_lost(tiny: Tiny) -> None:
    text = " ".join(f"Sentence number {number} is here." for number in range(200))
    made = Haystack([text], tiny[1], 1500, document_tokens=50, least_tokens=1)
    assert text.startswith(" ".join(made.texts)) and sum(item[-1] == "." for item in made.texts) > 20


def test_threads_cut_as_one_does(tiny: Tiny) -> None:
    """Texts of all lengths, in order, each in the pieces that it has by itself."""
    pick = random.Random(0)
    texts = [
        "\n".join(" ".join(pick.choices(["elm", "oak.", "a reef", " pine "], k=pick.randint(1, 60))) for _ in range(3))
        for _ in range(90)
    ]
    expected = []
    for text in texts:
        pieces = [piece for piece, _ in split_text(tiny[1], text, 40)]
        pieces = pieces if len(pieces) == 1 else [piece.strip() for piece in pieces if piece.strip()]
        expected += [(piece, len(tokenize(tiny[1], piece))) for piece in pieces]
    haystack = Haystack(texts, tiny[1], None, 40, least_tokens=1)
    assert haystack.texts == [piece for piece, count in expected if count]
    assert [haystack.tokens(number + 1) for number in range(len(haystack))] == list(
        itertools.accumulate(count for _, count in expected if count)
    )


@pytest.mark.parametrize("text", ["One. Two! Three? Four", "# Head\n\nOne line\nTwo\n", "no end at all", "One."])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.5, 1.0])
def test_a_sentence_goes_between_others(text: str, place: float) -> None:
    found = insert_sentence(text, "NEW.", place)
    before, _, after = found.partition("NEW.")
    assert (before + after).replace(" ", "").replace("\n", "") == text.replace(" ", "").replace("\n", "")
    assert found.split("NEW.")[0][-1:] in ("", " ", "\n")
    assert (place > 0 or not before) and (place < 1 or not after.strip())


@pytest.mark.parametrize(
    "sentences",
    [
        ["鲸鱼是最大的动物。", "它们吃什么？", "浮游生物！", "它们生活在深海中。"],
        ["यह एक वाक्य है।", "दूसरा यहाँ है।", "तीसरा भी।", "चौथा अंत में।"],
        ["هل هذا سؤال؟", "نعم هو كذلك۔", "وهذا آخر؟", "انتهى۔"],
        ["One is here.", "Two is 3.5 long!", "Is that three?", "Four it is."],
    ],
)
@pytest.mark.parametrize("insert", [insert_sentence, insert_in_style])
def test_places_in_a_text_are_kept_in_any_script(sentences: list[str], insert: Insert) -> None:
    text = (" " if sentences[0][-1] in ".।؟" else "").join(sentences)
    for place, before in ((0.0, 0), (0.3, 1), (0.75, 3), (1.0, 4)):
        head, _, rest = insert(text, "NEW.", place).partition("NEW.")
        assert (head.split(), rest.split()) == (
            (" " if " " in text else "").join(sentences[:before]).split(),
            (" " if " " in text else "").join(sentences[before:]).split(),
        ), (place, head)


def test_plants_lie_at_their_depths_each_in_a_document_of_its_own(haystack: Haystack) -> None:
    plants = [Plant(f"S{number}.", depth) for number, depth in enumerate([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])]
    places = haystack.place(20, plants)
    assert len(set(places)) == 6 and set(places[:2]) == {0, 1} and set(places[4:]) == {18, 19}
    assert abs(haystack.tokens(places[2]) / haystack.tokens(20) - 0.5) < 0.1
    planted = haystack.planted(places, plants)
    assert all(plant.sentence in planted[place] for place, plant in zip(places, plants, strict=True))
    with pytest.raises(HaystackTooSmall, match="6 sentences do not go into 5 documents"):
        haystack.place(5, plants)


def test_a_bank_of_a_part_with_others_in_it_is_what_encoding_these_texts_makes(tiny: Tiny, haystack: Haystack) -> None:
    model, tokenizer, protocol = tiny
    banks = HaystackBanks.encode(model, tokenizer, protocol, haystack)
    before = {layer: memory.pooled_kv.clone() for layer, memory in banks.whole.layers.items()}
    planted = {0: NEEDLE, 7: haystack.texts[7] + " " + NEEDLE * 4, 11: "Short."}
    found = banks.bank(12, planted)
    texts = [planted.get(number, text) for number, text in enumerate(haystack.texts[:12])]
    plain = model.encode_documents(list(protocol.encode_corpus(texts, tokenizer)), tokenizer, show_progress=False)
    assert [item.text for item in found.documents] == texts
    assert list(found.documents) == list(plain.documents) and torch.equal(found.offsets, plain.offsets)
    for layer, memory in plain.layers.items():
        torch.testing.assert_close(found.layers[layer].pooled_kv, memory.pooled_kv)
        torch.testing.assert_close(found.layers[layer].routing_keys, memory.routing_keys)
    assert all(torch.equal(banks.whole.layers[layer].pooled_kv, kept) for layer, kept in before.items())
    assert [item.text for item in banks.bank(12, {}).documents] == haystack.texts[:12]
    with pytest.raises(ValueError, match="do not fit"):
        banks.bank(5, planted)
    # By words: what is planted is found, neither what it replaced nor what is left out.
    index_words(found, {"max_rounds": 1})
    assert not found.indexes
    pytest.importorskip("tantivy")
    index_words(found, {"select": "hybrid"})
    words = found.indexes["lexical"]
    gone = set(words.terms(haystack.texts[11])).difference(*map(words.terms, texts))
    assert gone and not words.best(" ".join(gone), 99) and [row for row, _ in words.best("Short", 99)] == [11]
    assert {row for row, _ in words.best(" ".join(haystack.texts), 99)} == set(range(11))


def test_what_broke_is_told(tiny: Tiny, haystack: Haystack) -> None:
    model, tokenizer, protocol = tiny
    lines = {3: NEEDLE, 9: "Krikutust Heights is known for its roses.", 12: "zxq wvu 99 !!"}
    bank = HaystackBanks.encode(model, tokenizer, protocol, haystack).bank(len(haystack), lines)
    asked = [
        Ask("What is the venue of the Jethefux Crossing known for?", ("roses",), ((3,), (9,))),
        Ask("What is the wvu of the zxq?", ("99",), ((12,),)),
        Ask("What is Krikutust Heights known for?", ("nothing that stands there",), ()),
    ]
    one, two, three = next(put(model, tokenizer, bank, protocol, asked, max_new_tokens=12))
    assert one.right and (one.read[:2], one.broke, one.rungs) == ((3, 9), "", {})
    assert not two.right and two.broke == "reader" and set(two.rungs) == {"forced_gold", "gold_text"}
    assert not three.right and three.broke == "invented" and three.rungs == {}
    # One round cannot find both documents: forced, they answer.
    (cut,) = next(put(model, tokenizer, bank, protocol, asked[:1], max_rounds=1, max_new_tokens=12))
    assert not cut.right and cut.broke == "routing" and holds(cut.rungs["forced_gold"], "roses")


def test_every_rung_is_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that is right from a chosen rung on: by itself, over forced documents, from texts alone, or never."""
    asked = [
        (Ask("by itself", ("yes",), ((1,),)), (1,), ""),
        (Ask("forced", ("yes",), ((1,), (2,))), (1, 7), "routing"),
        (Ask("forced", ("yes",), ((1,), (2,))), (7, 2, 1), "distractors"),
        (Ask("texts", ("yes",), ((1,),)), (1,), "memory"),
        (Ask("never", ("yes",), ((1,),)), (), "reader"),
        (Ask("never", ("not known",), ()), (), "invented"),
        (Ask("never", ("not known",), ((1,),)), (), "reader"),  # a twin whose first documents are there
    ]
    reads = iter([read for _, read, _ in asked])
    forcings: list[Any] = []

    class Asker:
        def ask(self, questions: list[str], batch_size: int) -> list[Any]:
            return [
                SimpleNamespace(
                    text="yes" if question == "by itself" else "no",
                    documents=[SimpleNamespace(position=place) for place in next(reads)],
                )
                for question in questions
            ]

    class Writer:
        protocol = object()

        def __init__(self, *given: Any) -> None: ...

        def prompt(self, question: str, rounds: Any) -> tuple[Any, int]:
            assert rounds  # the texts stand in the prompt on both rungs
            return question, 0

        def write(self, prompts: list[str], memory: bool, forced: Any) -> list[str]:
            forcings.append(forced)
            assert (forced is not None) is memory
            return ["yes" if item == "forced" or (item == "texts" and not memory) else "no" for item in prompts]

    monkeypatch.setattr(asking, "asker_of", lambda *given, **options: Asker())
    monkeypatch.setattr(asking, "Writer", Writer)
    model: Any = torch.nn.Linear(1, 1)
    bank: Any = None
    for size in (1, 3, 99):
        reads = iter([read for _, read, _ in asked])
        batches = put(model, bank, bank, None, [ask for ask, _, _ in asked], batch_size=size)
        found = [outcome for batch in batches for outcome in batch]
        assert [outcome.broke for outcome in found] == [broke for _, _, broke in asked]
        assert [outcome.read for outcome in found] == [read for _, read, _ in asked]
        climbed = {"": 0, "invented": 0, "routing": 1, "distractors": 1, "memory": 2, "reader": 2}
        assert [len(outcome.rungs) for outcome in found] == [climbed[broke] for _, _, broke in asked]
    assert forcings[-2] == [[1, 2], [1, 2], [1], [1], [1]] and forcings[-1] is None


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("The code is 1,234.", "1234", True),
        ("12345", "1234", False),
        ("it is 6F9619FF-8B86-D011-B42D-00CF4FC964FF", "6f9619ff-8b86-d011-b42d-00cf4fc964ff", True),
        ("The Oskel Lantern", "oskel lantern", True),
        ("", "", False),
    ],
)
def test_an_answer_holds_whole_words(answer: str, expected: str, right: bool) -> None:
    assert holds(answer, expected) is right


def test_documents_too_short_to_count_are_refused_and_named(tiny: Tiny) -> None:
    """Otherwise all texts were read, without end where they are generated, and none kept."""
    with pytest.raises(ValueError, match="of 5 tokens at most are too short: those of fewer than 16"):
        Haystack(generated_texts(), tiny[1], 1000, document_tokens=5)
    with pytest.raises(HaystackTooSmall, match="have 0 tokens, 3 documents or rests of fewer than 16 left out, but 9"):
        Haystack(["One.", "Two.", "Three."], tiny[1], 9)
