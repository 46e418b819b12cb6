"""Banks by value: pickled, copied, saved by torch and sent to a spawned process, they are the bank they were."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_files import assert_equal, make_bank
from fake_embedder import FakeEmbedder
from fake_model import FakeModel, contents

from msa_hf.bank import BankStore, place_bank
from msa_hf.model import bank_manifest_msa
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import Document, MemoryBank
from msa_hf.retrieval import add_lexical_index, add_vectors


def by_torch(bank: Any) -> Any:
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": by_torch,
}


def fill(store: BankStore) -> BankStore:
    """Several commits, deletions, and a row that was replaced."""
    store.add([{"key": f"k{row}", "text": f"text {row} " + "z" * row, "n": row} for row in range(6)])
    store.add([{"key": "secret", "text": "a secret text"}])
    store.delete("secret")
    store.delete("k1", 3)
    store.upsert("k2", "another text", 2)
    return store


def damaged(directory: Path, name: str) -> BankStore:
    """A bank one of whose tables or shards is lost."""
    fill(BankStore(FakeModel(), directory)).close()
    segment = bank_manifest_msa.read_manifest(directory)["segments"][0]
    record = segment["table"] if name == "table" else segment["tensors"][0]
    (directory / record["file"]).unlink()
    return BankStore(FakeModel(), directory, read_only=True)


def loaded(directory: Path, **options: Any) -> MemoryBank:
    fill(BankStore(FakeModel(), directory)).close()
    return MemoryBank.from_pretrained(directory, **options)


def saved(directory: Path) -> MemoryBank:
    make_bank([5, 3, 9]).save_pretrained(directory)
    return MemoryBank.from_pretrained(directory)


BANKS: dict[str, Callable[[Path], MemoryBank]] = {
    "in memory": lambda directory: fill(BankStore(FakeModel())).snapshot(),
    "in a directory": lambda directory: fill(BankStore(FakeModel(), directory)).snapshot(),
    "read only": lambda directory: damaged(directory, "none").snapshot(),
    "lost table": lambda directory: damaged(directory, "table").snapshot(),
    "lost shard": lambda directory: damaged(directory, "shard").snapshot(),
    "loaded": loaded,
    "loaded unverified": lambda directory: loaded(directory, verify=False),
    "version 1": saved,
    "made": lambda directory: make_bank([5, 3, 9], torch.bfloat16, numbered=True),
    "empty": lambda directory: BankStore(FakeModel(), directory).snapshot(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", BANKS)
def test_bit_equal(kind: str, way: str, tmp_path: Path) -> None:
    bank = BANKS[kind](tmp_path / "bank")
    copied = WAYS[way](bank)
    assert type(copied) is MemoryBank and copied is not bank
    assert_equal(copied, bank)
    assert (copied.num_chunks, copied.num_tokens, copied.next_id) == (bank.num_chunks, bank.num_tokens, bank.next_id)
    assert copied.home == bank.home and copied.documents.deleted.tolist() == bank.documents.deleted.tolist()
    assert all(copied.documents.position(document.key) == place for place, document in enumerate(bank.documents))
    with pytest.raises(KeyError):
        copied.documents.position("k1")
    ids = bank.documents.ids()
    assert (copied.documents.ids() is None) == (ids is None) and (ids is None or (copied.documents.ids() == ids).all())
    assert (copied.documents.counts("chunks") == bank.documents.counts("chunks")).all()


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_a_copy_outlives_the_files_and_what_changes(way: str, tmp_path: Path) -> None:
    store = fill(BankStore(FakeModel(), tmp_path / "bank"))
    bank, expected = store.snapshot(), contents(store.snapshot())
    store.upsert("later", "one more")
    store.compact()
    store.close()
    assert contents(pickle.loads(pickle.dumps(bank))) == expected
    copied = WAYS[way](bank)
    del bank, store
    shutil.rmtree(tmp_path / "bank")
    assert contents(copied) == expected
    assert contents(WAYS[way](copied)) == expected
    copied.save_pretrained(tmp_path / "again")
    assert contents(MemoryBank.from_pretrained(tmp_path / "again")) == expected


def test_a_deep_copy_has_memory_of_its_own(tmp_path: Path) -> None:
    bank = make_bank([5, 3])
    for copied in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        copied.layer(1).routing_keys.zero_()
        copied.prefix[0][0].zero_()
        assert bank.layer(1).routing_keys.any() and bank.prefix[0][0].any()
    assert copy.copy(bank).layer(1) is bank.layer(1)


def test_nothing_travels_but_the_bank(tmp_path: Path) -> None:
    """Neither texts of deleted documents, nor room in buffers, nor a file once per tensor."""
    store = fill(BankStore(FakeModel(), tmp_path / "bank"))
    bank = store.snapshot()
    store.add([{"key": "after", "text": "not known then " * 3000}])
    data = pickle.dumps(bank)
    assert b"secret" not in data and b"text 1" not in data and b"another text" in data and b"not known" not in data
    tensors = sum(tensor.nbytes for tensor in bank._tensors())
    assert len(data) < tensors + 20_000
    loaded = MemoryBank.from_pretrained(tmp_path / "bank")
    size = sum(path.stat().st_size for path in (tmp_path / "bank").iterdir())
    assert len(pickle.dumps(loaded)) < size + 20_000


def test_a_damaged_table_is_not_passed_on(tmp_path: Path) -> None:
    fill(BankStore(FakeModel(), tmp_path)).close()
    path = tmp_path / bank_manifest_msa.read_manifest(tmp_path)["segments"][0]["table"]["file"]
    path.write_bytes(path.read_bytes().replace(b"text 3", b"text \xff"))
    store = BankStore(FakeModel(), tmp_path, read_only=True)
    with pytest.raises(BankFormatError, match="table of documents is damaged"):
        pickle.dumps(store.snapshot())
    assert store.verify()
    assert contents(pickle.loads(pickle.dumps(store.snapshot()))) == contents(store.snapshot())


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_holds_files_or_places_says_what_to_pass(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path / "bank") as store:
        with pytest.raises(TypeError, match=r"pass `store.snapshot\(\)`.*or the directory '.*bank'"):
            copied(store)
        with pytest.raises(TypeError, match=r"pass `store.snapshot\(\)`, which can be\.$"):
            copied(BankStore(FakeModel()))
        placed = place_bank(fill(store), "cpu")
        if copied is not copy.copy:
            with pytest.raises(TypeError, match="send the bank that it was made from"):
                copied(placed)
        assert contents(store.snapshot())


def test_what_is_kept_for_searching(tmp_path: Path) -> None:
    pytest.importorskip("tantivy")
    embedder = FakeEmbedder()
    bank = make_bank([5, 3, 9])
    texts = ["the red harbour", "a green valley", "der rote Hafen"]
    rows = [Document(f"d{row}", text, None, 4, 1) for row, text in enumerate(texts)]
    bank = make_bank([4, 4, 4])
    bank.documents = type(bank.documents)(rows)
    add_lexical_index(bank, "german")
    add_vectors(bank, embedder)
    for way in ("pickle", "deepcopy"):
        copied = WAYS[way](bank)
        assert [hit.key for hit in copied.search("Hafen", 3, "lexical")] == ["d2"]
        assert copied.indexes["lexical"].language == "german"
        if way == "pickle":
            with pytest.raises(ValueError, match="pass it as `embedder`"):
                copied.search("harbour", 3, "dense")
        found, expected = (each.search("harbour", 3, "dense", embedder=embedder) for each in (copied, bank))
        assert [(hit.key, hit.score) for hit in found] == [(hit.key, hit.score) for hit in expected]
    with BankStore(FakeModel(), tmp_path / "bank", lexical="german", embedder=embedder) as store:
        store.add([{"key": row.key, "text": row.text} for row in rows])
        sent = pickle.dumps(store.snapshot())
    assert [hit.key for hit in pickle.loads(sent).search("Hafen", 3, "lexical")] == ["d2"]
    shutil.rmtree(tmp_path / "bank")
    assert [hit.key for hit in pickle.loads(sent).search("Hafen", 3, "lexical")] == ["d2"]


class Rows(torch.utils.data.Dataset[Any]):
    """What a spawned loader reads of a bank."""

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return len(self.bank)

    def __getitem__(self, index: int) -> Any:
        document = self.bank.documents[index]
        assert self.bank.documents.position(document.key) == index
        row = int(self.bank.documents.rows_of(torch.tensor(index)))
        chunks = slice(*self.bank.offsets[row : row + 2].tolist())
        layer = self.bank.layer(1)
        return document.key, document.text, layer.routing_keys[chunks].clone(), layer.pooled_kv[chunks].clone()


def test_a_spawned_loader(tmp_path: Path) -> None:
    store = fill(BankStore(FakeModel(), tmp_path / "bank"))
    rows = Rows(store.snapshot())
    loader = torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=1, multiprocessing_context="spawn", timeout=120
    )
    found = list(loader)
    assert len(found) == len(rows)
    for got, expected in zip(found, (rows[place] for place in range(len(rows))), strict=True):
        assert tuple(got[:2]) == expected[:2]
        assert all(torch.equal(*pair) for pair in zip(got[2:], expected[2:], strict=True))
