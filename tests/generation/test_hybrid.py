"""`select="hybrid"`: documents are read by a fusion of rankings, and memory layers attend to what a search found."""

import pytest
import torch
from fake_embedder import FakeEmbedder
from scripted import COMPACT, TEXTS, bank_of, byte_tokenizer, memory_model

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.generation import MemoryInterleave
from msa_hf.retrieval import FusionWeights, Searcher, add_lexical_index, add_vectors, fuse, wording

pytest.importorskip("tantivy")
TOKENIZER = byte_tokenizer()
MODEL = memory_model(TOKENIZER, COMPACT)
OPTIONS = {"max_rounds": 2, "documents_per_round": 2, "max_new_tokens": 2, "router_may_end": False}
QUESTIONS = ["Where is the amber?", "How far is it to the reef and the pine?"]


def asked(bank: object, select: str = "hybrid", **options: object) -> MemoryInterleave:
    return MemoryInterleave(MODEL, TOKENIZER, bank, COMPACT, select=select, **{**OPTIONS, **options})


@pytest.mark.parametrize("vectors", [False, True])
def test_rounds_read_what_all_rankings_together_find(vectors: bool) -> None:
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    if vectors:
        add_vectors(bank, FakeEmbedder())
    ways = ("lexical", "dense") if vectors else ("lexical",)
    found = {way: Searcher(bank).rankings(way, QUESTIONS, 100) for way in ways}
    for number, answer in enumerate(asked(bank).ask(QUESTIONS)):
        read: set[int] = set()
        for item in answer.trace.rounds:
            lists = {way: [pair for pair in lists[number] if pair[0] not in read] for way, lists in found.items()}
            lists["router"] = [
                (choice.position, choice.score) for choice in item.combined if choice.position not in read
            ]
            expected = [position for position, _ in fuse(lists)[:2]]
            assert [choice.position for choice in item.read] == expected and not read & set(expected)
            read |= set(expected)
        assert len(read) == 4
    # One way alone, as weights may say.
    weighed = asked(bank, max_rounds=1)
    weighed._selector.searcher.fusion = FusionWeights(("router", *ways), "lexical")  # type: ignore[attr-defined]
    expected = [position for position, _ in found["lexical"][1][:2]]
    assert [source.position for source in weighed.ask(QUESTIONS[1]).documents] == expected


def test_rounds_read_for_wording_where_weights_say_so() -> None:
    """By what a text has of the question's capitalized words and numbers alone, whatever the rankings say."""
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    names = tuple((float(feature == "names"), 0.0, 0.0, 0.0) for feature in (*wording.FEATURES, "router", "lexical"))
    weights = FusionWeights(("router", "lexical"), wording=names)
    for number in (11, 14):
        question = f"What stands {number} miles from the amber and the cedar?"
        answer = asked(bank, max_rounds=1, documents_per_round=1, fusion=weights).ask(question)
        (source,) = answer.documents
        assert f" {number} miles" in TEXTS[source.position]


def test_rounds_go_by_the_weights_of_the_checkpoint(tmp_path) -> None:
    MODEL.save_pretrained(tmp_path)
    FusionWeights(("router", "lexical"), "lexical").save_pretrained(tmp_path)
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    model = MSAForCausalLM.from_pretrained(tmp_path).eval()
    expected = [position for position, _ in Searcher(bank).rankings("lexical", [QUESTIONS[1]], 2)[0]]
    for options, same in (({}, True), ({"fusion": "reciprocal"}, False)):
        asker = MemoryInterleave(
            model, TOKENIZER, bank, COMPACT, select="hybrid", **{**OPTIONS, "max_rounds": 1}, **options
        )
        read = [source.position for source in asker.ask(QUESTIONS[1]).documents]
        assert (read == expected) == same


def test_a_bank_without_either_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no lexical index\. Make one"):
        asked(bank_of(MODEL, TOKENIZER, COMPACT))
    with BankStore(MODEL, tmp_path, TOKENIZER, COMPACT, embedder=FakeEmbedder()) as bank:
        bank.add([{"text": text} for text in TEXTS])
        assert len(asked(bank, max_rounds=1).ask(QUESTIONS[0]).documents) == 2
    with (
        BankStore(MODEL, tmp_path, TOKENIZER, COMPACT) as bank,
        pytest.raises(ValueError, match="pass it as `embedder`"),
    ):
        asked(bank)


def test_memory_layers_attend_to_what_was_found() -> None:
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    add_vectors(bank, FakeEmbedder())
    searcher = Searcher(bank)
    documents = searcher.documents(QUESTIONS, MODEL.config.top_k, ways=("lexical", "dense"))
    assert documents.shape == (2, MODEL.config.top_k)
    expected = searcher.search(QUESTIONS, MODEL.config.top_k, ways=("lexical", "dense"))
    assert documents.tolist() == [[hit.position for hit in hits] for hits in expected]
    assert searcher.documents(["xyzzy amber"], 3, "lexical").tolist() == [[0, -1, -1]]
    assert searcher.documents(["xyzzy amber"], 10**12, "lexical").tolist() == [[0, *[-1] * (len(bank) - 1)]]
    inputs = TOKENIZER(QUESTIONS, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        routing = MODEL(**inputs, memory=bank, force_documents=documents).routing
    for found in routing.values():
        assert found.documents[:, : MODEL.config.top_k].sort().values.tolist() == documents.sort().values.tolist()
    assert MODEL.generate(**inputs, memory=bank, force_documents=documents, max_new_tokens=2).shape[0] == 2
