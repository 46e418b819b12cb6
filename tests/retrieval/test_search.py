"""`bank.search` on every kind of bank: what is found, in which order, and why."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_embedder import FakeEmbedder
from scripted import COMPACT, TEXTS, bank_of, byte_tokenizer, memory_model

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import BankStore, place_bank
from msa_hf.generation import PromptProtocol
from msa_hf.model.memory_msa import DocumentTable
from msa_hf.retrieval import (
    FusionWeights,
    Hit,
    Searcher,
    add_lexical_index,
    add_vectors,
    fit_fusion,
    fuse,
    search,
    wording,
)
from msa_hf.retrieval.fusion import RECIPROCAL, fusion_beside

TOKENIZER = byte_tokenizer()
MODEL = memory_model(TOKENIZER, COMPACT)
ROUTERS: dict[str, Any] = {"model": MODEL, "tokenizer": TOKENIZER, "protocol": COMPACT}
QUESTIONS = ["How far from the cedar is it?", "Which miles does the quarry stand?", "pine larch"]
ALL = ("router", "lexical", "dense")
pytest.importorskip("tantivy")


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL.config, "routers_trained", True)


def store_of(directory: Path | None) -> BankStore:
    bank = BankStore(MODEL, directory, TOKENIZER, COMPACT, lexical=True, embedder=FakeEmbedder())
    bank.add([{"key": f"k{number}", "text": text, "place": number} for number, text in enumerate(TEXTS)])
    bank.add([{"key": "gone", "text": "cedar quarry pine larch"}])
    bank.delete("gone")
    return bank


def in_memory(_: Path) -> MemoryBank:
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    add_lexical_index(bank)
    add_vectors(bank, FakeEmbedder())
    return bank


def loaded(path: Path) -> MemoryBank:
    store_of(path).close()
    return MemoryBank.from_pretrained(path, MODEL, TOKENIZER)


KINDS: dict[str, Callable[[Path], Any]] = {
    "memory": in_memory,
    "loaded": loaded,
    "store": store_of,
    "store in memory": lambda _: store_of(None),
    "reader": lambda path: store_of(path).close() or BankStore(None, path, read_only=True),
    "tiers": lambda path: place_bank(loaded(path), "cpu"),
    "directory": lambda path: store_of(path).close() or path,
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_banks_find_the_same(kind: str, tmp_path: Path) -> None:
    bank = KINDS[kind](tmp_path)
    options = {**ROUTERS, "embedder": FakeEmbedder()}
    expected = in_memory(tmp_path)
    for mode in (*ALL, "hybrid"):
        found = search(bank, QUESTIONS, 6, mode, **options)
        others = search(expected, QUESTIONS, 6, mode, **options)
        for row, other in zip(found, others, strict=True):
            assert [(hit.text, hit.position) for hit in row] == [(hit.text, hit.position) for hit in other]
            if mode != "lexical":  # whose statistics count deleted documents until the bank is compacted
                assert [hit.score for hit in row] == pytest.approx([hit.score for hit in other], abs=1e-5)
            assert [hit.rank for hit in row] == list(range(1, len(row) + 1))
            assert [hit.score for hit in row] == sorted((hit.score for hit in row), reverse=True)


def test_hits_say_why(tmp_path: Path) -> None:
    with store_of(tmp_path) as bank:
        (hit, *_) = bank.search("How far is the CEDARS, from quarry?", 5, "lexical")
        assert isinstance(hit, Hit) and hit.key == "k2" and hit.metadata == {"place": 2} and hit.id == 2
        assert (
            hit.why.terms == ("CEDARS", "from") and hit.why.lexical is not None and hit.why.lexical.score == hit.score
        )
        assert hit.why.router is hit.why.dense is None and hit.why.layers == () and hit.why.fused_by is None
        assert json.loads(json.dumps(hit.to_dict()))["why"]["lexical"]["rank"] == 1

        hits = bank.search(QUESTIONS[0], len(TEXTS), "router")
        assert [hit.why.router.rank for hit in hits if hit.why.router] == list(range(1, len(TEXTS) + 1))
        for hit in hits:
            assert [item.layer for item in hit.why.layers] == MODEL.config.memory_layers
            assert hit.score == pytest.approx(sum(item.score for item in hit.why.layers) / len(hit.why.layers))
        for place, layer in enumerate(MODEL.config.memory_layers):
            ranked = sorted((hit.why.layers[place] for hit in hits), key=lambda item: item.rank)
            assert [item.rank for item in ranked] == list(range(1, len(TEXTS) + 1)), layer
            assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)

        hits = bank.search(QUESTIONS[0], 4)
        assert all(hit.why.fused_by == "reciprocal ranks" for hit in hits)
        assert all(hit.why.router and hit.why.dense and hit.why.layers for hit in hits)
        expected = fuse(Searcher(bank, **ROUTERS).candidates(QUESTIONS[:1])[0])
        assert [(hit.position, hit.score) for hit in hits] == expected[:4]


def test_routers_score_as_generation_does() -> None:
    bank = in_memory(Path())
    ids, routes = PromptProtocol.join(COMPACT.transcript(TOKENIZER, QUESTIONS[0]))
    with torch.no_grad():
        routing = MODEL(torch.tensor([ids]), memory=bank, routing_mask=torch.tensor([routes])).routing
    hits = {hit.position: hit for hit in bank.search(QUESTIONS[0], len(TEXTS), "router", **ROUTERS)}
    for place, layer in enumerate(MODEL.config.memory_layers):
        pairs = zip(routing[layer].documents[0].tolist(), routing[layer].scores[0].tolist(), strict=True)
        for rank, (position, score) in enumerate(pairs, 1):
            evidence = hits[position].why.layers[place]
            assert (evidence.layer, evidence.rank) == (layer, rank)
            assert evidence.score == pytest.approx(score, abs=1e-5)


def test_batches_and_numbers_of_hits_change_nothing() -> None:
    bank, options = in_memory(Path()), {**ROUTERS, "embedder": FakeEmbedder()}
    for mode in (*ALL, "hybrid"):
        together = search(bank, QUESTIONS, 7, mode, **options)
        assert len(search(bank, QUESTIONS, 3, mode, batch_size=2, **options)) == 3
        for question, hits in zip(QUESTIONS, together, strict=True):
            single = search(bank, question, 7, mode, **options)
            assert [hit.key for hit in single] == [hit.key for hit in hits]
            assert [hit.score for hit in single] == pytest.approx([hit.score for hit in hits], abs=1e-5)
            fewer = search(bank, question, 3, mode, **options)
            assert [hit.key for hit in fewer] == [hit.key for hit in single[:3]]
    assert search(bank, [], mode="lexical") == []
    for mode in (*ALL, "hybrid"):
        most = search(bank, QUESTIONS[0], len(TEXTS), mode, **options)
        for k in (1000, 10**12, 10**30):  # room for so many hits would end the process
            assert search(bank, QUESTIONS[0], k, mode, **options) == most
        assert mode == "lexical" or len(most) == len(TEXTS)
    assert len(search(bank, QUESTIONS[0], 3, depth=10**12, **options)) == 3


def test_fusion_weights_lie_beside_the_bank(tmp_path: Path) -> None:
    with store_of(tmp_path) as bank:
        FusionWeights(("lexical", "dense"), "lexical").save_pretrained(tmp_path)
        hits = bank.search(QUESTIONS[0], 3, ways=("lexical", "dense"))
        assert hits[0].why.fused_by == "lexical" and hits[0].key == bank.search(QUESTIONS[0], 1, "lexical")[0].key
        with pytest.raises(ValueError, match="fusion weights are for lexical, dense, but router, lexical, dense were"):
            bank.search(QUESTIONS[0], 3)
        assert bank.search(QUESTIONS[0], 3, fusion="reciprocal")[0].why.fused_by == "reciprocal ranks"


def test_weights_lie_beside_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those beside the bank go before; those for other ways do not count, and are said not to."""
    MODEL.save_pretrained(tmp_path / "model")
    model = MSAForCausalLM.from_pretrained(tmp_path / "model").eval()
    options: dict[str, Any] = {**ROUTERS, "model": model, "embedder": FakeEmbedder()}
    query = QUESTIONS[0]
    with store_of(tmp_path / "bank") as bank:

        def fused_by(**more: Any) -> str | None:
            return bank.search(query, 3, **{**options, **more})[0].why.fused_by

        assert fused_by() == "reciprocal ranks" and not caplog.records
        FusionWeights(("router", "lexical"), "lexical").save_pretrained(tmp_path / "model")
        found = bank.search(query, 3, ways=("router", "lexical"), **options)
        assert found[0].why.fused_by == "lexical" and found[0].key == bank.search(query, 1, "lexical")[0].key
        assert fused_by(ways=("router", "lexical"), fusion="reciprocal") == "reciprocal ranks" and not caplog.records
        assert fused_by() == "reciprocal ranks"
        assert "fusion.json weighs router, lexical; router, lexical, dense are fused by reciprocal ranks" in caplog.text
        FusionWeights(("router", "lexical"), "router").save_pretrained(tmp_path / "bank")
        assert fused_by(ways=("router", "lexical")) == "router"
        (tmp_path / "bank" / "fusion.json").unlink()
        (tmp_path / "model" / "fusion.json").write_text("{}")
        with pytest.raises(ValueError, match=r"model.fusion\.json: not weights of a fusion"):
            fused_by()
    assert fusion_beside("") is None and fusion_beside(str(tmp_path)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_are_read_for_their_wording(kind: str, tmp_path: Path) -> None:
    """By the names of a question alone: the one text that has them both comes first, the others keep their order."""
    names = [[float(feature == "names"), 0.0, 0.0, 0.0] for feature in (*wording.FEATURES, "lexical", "dense")]
    weights = FusionWeights(("lexical", "dense"), "lexical", wording=tuple(map(tuple, names)))
    place = KINDS[kind](tmp_path)
    options: dict[str, Any] = {"ways": ("lexical", "dense"), "embedder": FakeEmbedder()}
    bank = MemoryBank.from_pretrained(place, MODEL, TOKENIZER) if isinstance(place, Path) else place
    query = "Which 13 The"
    plain = bank.search(query, 6, fusion="reciprocal", **options)
    found = bank.search(query, 6, fusion=weights, **options)
    assert " 13 " in (found[0].text or "") and found[0].score == 1.0
    assert found[0].why.fused_by == "lexical, then wording"
    assert {hit.key for hit in found} == {hit.key for hit in plain}
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    with pytest.raises(ValueError, match="weights are for lexical, dense"):
        bank.search(query, 3, fusion=weights, **{**options, **ROUTERS, "ways": None})
    ranks = replace(weights, method=RECIPROCAL)  # which fuse any ways, but read what these have found
    with pytest.raises(ValueError, match="weights are for lexical, dense"):
        bank.search(query, 3, fusion=ranks, **{**options, **ROUTERS, "ways": ("router", "dense")})


def test_the_ways_count_again_once_wording_does(tmp_path: Path) -> None:
    """Two ways whose lists differ: the weight on one of them alone gives the order of its list, whichever it is."""
    bank, embedder = in_memory(tmp_path), FakeEmbedder()
    for way in ("lexical", "dense"):
        alone = tuple((float(row == way), 0.0, 0.0, 0.0) for row in (*wording.FEATURES, "dense", "lexical"))
        weights = FusionWeights(("dense", "lexical"), wording=alone)
        searcher = Searcher(bank, embedder=embedder, fusion=weights)
        for one, other in pairwise(TEXTS[:6]):
            query = f"{one} {other}"
            lists = searcher.candidates([query], ("lexical", "dense"))[0]  # in another order than the weights are for
            scores = dict(lists[way])
            found = [scores[document] for document, _ in searcher.fused(lists, query) if document in scores]
            assert len(set(found)) > 2 and found == sorted(found, reverse=True)


def test_wording_is_fitted_on_a_bank() -> None:
    bank = in_memory(Path())
    searcher = Searcher(bank, embedder=FakeEmbedder())
    questions = [f"How far is {text.split()[3]} {text.split()[4]}?" for text in TEXTS] * 3
    gold = [{number % len(TEXTS)} for number in range(len(questions))]
    candidates = searcher.candidates(questions)
    plain = fit_fusion(candidates, gold, questions)
    weights = searcher.fit_wording(plain, candidates, gold, questions)
    assert searcher.fit_wording(weights, candidates, gold, questions) == weights
    assert replace(weights, wording=()) == plain
    unweighed = searcher.fit_wording(None, candidates, gold, questions)
    assert unweighed.method == "reciprocal ranks" and unweighed.ways == tuple(candidates[0])
    again = Searcher(bank, embedder=FakeEmbedder(), fusion=unweighed)
    right = sum(hits[0].position in known for hits, known in zip(again.search(questions, 1), gold, strict=True))
    before = sum(hits[0].position in known for hits, known in zip(searcher.search(questions, 1), gold, strict=True))
    assert right >= before
    with pytest.raises(ValueError, match="No questions"):
        searcher.fit_wording(None, [], [], [])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bank = bank_of(MODEL, TOKENIZER, COMPACT)
    with pytest.raises(ValueError, match=r"no lexical index\. Make one: `msa-hf bank index BANK --lexical`"):
        bank.search("cedar", mode="lexical")
    with pytest.raises(ValueError, match=r"no vectors\. Make them"):
        bank.search("cedar", mode="dense")
    with pytest.raises(ValueError, match="by routers needs `model` and its `tokenizer`"):
        bank.search("cedar", mode="router")
    with pytest.raises(
        ValueError, match=r"needs two of router, lexical, dense or more; there is none. There is no `model`"
    ):
        bank.search("cedar")
    add_lexical_index(bank)
    add_vectors(bank, FakeEmbedder())
    monkeypatch.setattr(MODEL.config, "routers_trained", False)
    assert bank.search("cedar", 2, **ROUTERS)[0].why.router is None  # the two others are there
    bank.search("cedar", 2, "router", **ROUTERS)
    assert "routers of this model have not been trained" in caplog.text
    for wrong, message in (
        ({"query": " "}, "Query 0 is ' '"),
        ({"query": None}, "`query` must be a text, or a list of texts, got None"),
        ({"query": "x", "fusion": {"ways": 2}}, "`fusion` must be FusionWeights or 'reciprocal', got {'ways': 2}"),
        ({"query": "x", "k": 0}, "`k` must be"),
        ({"query": "x", "mode": "bm25"}, "`mode` must be one of"),
        ({"query": "x", "ways": ["words"]}, "`ways` must be some of"),
        ({"query": "x", "mode": "lexical", "ways": ["lexical"]}, "belongs to mode='hybrid'"),
        ({"query": "x", "fusion": "mean"}, "`fusion` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.search(**wrong)


def test_without_the_package_that_reads_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tantivy", None)
    with pytest.raises(ImportError, match=r"pip install 'msa-hf\[lexical\]'"):
        add_lexical_index(bank_of(MODEL, TOKENIZER, COMPACT))
    with pytest.raises(ImportError, match=r"msa-hf\[lexical\]"):
        BankStore(MODEL, None, TOKENIZER, lexical=True)


def test_documents_without_texts_and_empty_banks(tmp_path: Path) -> None:
    bank = MODEL.encode_documents([[1, 2, 3], {"text": "cedar", "key": "c"}], TOKENIZER)
    add_lexical_index(bank)
    add_vectors(bank, FakeEmbedder())
    assert [hit.key for hit in bank.search("cedar", 5, ways=("lexical", "dense"))] == ["c"]
    assert list(DocumentTable(list(bank.documents)).texts(1)) == [(1, "cedar")]
    with BankStore(MODEL, tmp_path, TOKENIZER, COMPACT, lexical=True, embedder=FakeEmbedder()) as empty:
        assert all(empty.search("cedar", mode=mode) == [] for mode in (*ALL, "hybrid"))


# Metadata -------------------------------------------------------------------------------------------------------------

FIELDS: list[dict[str, Any]] = [
    {"year": 1889, "kind": "note"},
    {"year": 1889.0, "kind": ["mail", "old"]},
    {"year": "1889", "kind": None},
    {"year": True, "größe": "ü"},
    {"year": 1, "say": 'a "word"'},
    {},
]


def fits(metadata: dict[str, Any], where: dict[str, Any]) -> bool:
    """The rule, spelled out."""
    for name, wanted in where.items():
        there, wanted = metadata.get(name), wanted if isinstance(wanted, list) else [wanted]
        there = there if isinstance(there, list) else [there]
        if not any(
            type(one) is type(other) and one == other for one in map(real, there) for other in map(real, wanted)
        ):
            return False
    return True


def real(value: Any) -> Any:
    return float(value) if type(value) is int else value


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same documents with metadata in every kind of bank, two of them deleted where banks change."""
    path = tmp_path_factory.mktemp("noted") / "bank"
    rows = [{"key": f"k{number}", "text": text, **FIELDS[number % 6]} for number, text in enumerate(TEXTS)]
    with BankStore(MODEL, path, TOKENIZER, COMPACT, lexical=True, embedder=FakeEmbedder()) as store:
        store.add([{"key": "gone", "text": TEXTS[0], **FIELDS[0]}, *rows])
        store.add([{"key": "late", "text": TEXTS[1], **FIELDS[0]}])
        for key in ("gone", "late"):
            store.delete(key)
    made = MODEL.encode_documents(COMPACT.encode_corpus(rows, TOKENIZER), TOKENIZER, show_progress=False)
    add_lexical_index(made)
    add_vectors(made, FakeEmbedder())
    read = MemoryBank.from_pretrained(path, MODEL, TOKENIZER)
    found: dict[str, Any] = {"memory": made, "loaded": read, "tiers": place_bank(read, "cpu")}
    for kind, mode in itertools.product(list(found), ALL):
        hits = search(found[kind], QUESTIONS[0], len(TEXTS), mode, **ROUTERS, embedder=FakeEmbedder())
        found[f"{kind} {mode}"] = [(hit.key, hit.score) for hit in hits]
    return found


@pytest.mark.parametrize("kind", ["memory", "loaded", "tiers"])
@pytest.mark.parametrize(
    "where",
    [
        {"year": 1889},
        {"year": "1889"},
        {"year": True},
        {"year": 1},
        {"year": None},
        {"kind": "old"},
        {"kind": ["note", "old"], "year": 1889},
        {"kind": ["note", None]},
        {"größe": "ü"},
        {"say": 'a "word"'},
        {"year": 1890},
        {"no such": "x"},
        {},
    ],
    ids=str,
)
def test_only_documents_with_the_metadata_are_found(kind: str, where: dict[str, Any], noted: dict[str, Any]) -> None:
    """As if the others were left out of a list of all, in every mode."""
    bank, options = noted[kind], {**ROUTERS, "embedder": FakeEmbedder(), "where": where}
    wanted = {f"k{number}" for number in range(len(TEXTS)) if fits(FIELDS[number % 6], where)}
    for mode in ALL:
        kept = [(key, score) for key, score in noted[f"{kind} {mode}"] if key in wanted]
        found = search(bank, QUESTIONS[0], len(TEXTS), mode, **options)
        assert [hit.key for hit in found] == [key for key, _ in kept]
        assert [hit.score for hit in found] == pytest.approx([score for _, score in kept], abs=1e-5)
    assert [hit.key for hit in search(bank, QUESTIONS[0], 2, "lexical", **options)] == [
        key for key, _ in noted[f"{kind} lexical"] if key in wanted
    ][:2]
    hits = search(bank, QUESTIONS[0], 50, **options)
    assert {hit.key for hit in hits} == wanted, "fused from those alone, so that none of them is crowded out"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("year", "must be a mapping of names"),
        ([("year", 1889)], "must be a mapping of names"),
        ({1: "x"}, "names of metadata are texts"),
        ({"year": []}, "has no values"),
        ({"year": {"$gt": 3}}, "or several of these in a list"),
        ({"year": float("nan")}, "a finite number"),
        ({"year": [[1]]}, "or several of these in a list"),
    ],
    ids=str,
)
def test_conditions_that_are_none_are_refused(where: Any, message: str, noted: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        search(noted["memory"], "x", mode="lexical", where=where)


def test_queries_that_the_model_has_no_positions_for_are_refused() -> None:
    """Before the model works on them: the attention of a long one takes minutes, and what comes of it is noise."""
    bank = in_memory(Path())
    room = MODEL.config.max_position_embeddings
    for mode in ("router", "hybrid"):
        with pytest.raises(ValueError, match="shorten it"):
            search(bank, ["cedar", "x" * room], mode=mode, **{**ROUTERS, "embedder": FakeEmbedder()})
    assert search(bank, "cedar " * room, mode="lexical")
