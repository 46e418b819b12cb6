"""A bank that changes: what events leave, what snapshots keep, who may write, and what that costs."""

import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import ORIGIN, FakeModel, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa_hf.bank import BankDamaged, BankLocked, BankStore
from msa_hf.bank.store.segments import Segment
from msa_hf.bank.store.state import State
from msa_hf.generation import COMPACT, DocumentIds
from msa_hf.model import bank_format_msa, bank_manifest_msa
from msa_hf.model.bank_format_msa import BankFormatError, FileRecord
from msa_hf.model.bank_writer_msa import BankWriter
from msa_hf.model.memory_msa import BankOrigin, Document, DocumentTable, MemoryBank
from msa_hf.model.shard_msa import Shard

PLACES = [pytest.param(False, id="memory"), pytest.param(True, id="directory")]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "bank" if request.param else None


def texts(bank: BankStore | MemoryBank) -> dict[str, str]:
    return {
        key: text for key, (text, *_) in contents(bank if isinstance(bank, MemoryBank) else bank.snapshot()).items()
    }


# --- events -----------------------------------------------------------------------------------------------------------

KEYS = [f"k{number}" for number in range(5)]
EVENTS = st.one_of(
    st.tuples(st.just("upsert"), st.sampled_from(KEYS), st.none() | st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("delete"), st.sampled_from(KEYS), st.none() | st.integers(0, 9), st.just(0)),
    st.tuples(st.just("add"), st.sampled_from(KEYS), st.none() | st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.sampled_from(["compact", "reopen", "snapshot"]), st.just(""), st.none(), st.just(0)),
)


class Dictionary:
    """The same rules over a dictionary: key -> (version, text, id), text None where it was deleted."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int | None, str | None, int]] = {}
        self.next_id = 0

    def put(self, key: str, text: str, version: int | None) -> bool:
        old, before, id = self.known.get(key, (None, None, -1))
        if version is not None and old is not None and version <= old:
            return False
        version = old if version is None else version
        if before is None:
            id, self.next_id = self.next_id, self.next_id + 1
        self.known[key] = (version, text, id)
        return (version, text) != (old, before)

    def delete(self, key: str, version: int | None) -> bool:
        old, before, id = self.known.get(key, (None, None, -1))
        if (version is not None and old is not None and version <= old) or (before is None and version is None):
            return False
        self.known[key] = (old if version is None else version, None, id)
        return before is not None

    @property
    def living(self) -> dict[str, tuple[int | None, str, int]]:
        return {key: (version, text, id) for key, (version, text, id) in self.known.items() if text is not None}


def agrees(bank: MemoryBank, model: Dictionary) -> None:
    found = contents(bank)
    assert {key: (version, text) for key, (text, _, version) in found.items()} == {
        key: (version, text) for key, (version, text, _) in model.living.items()
    }
    ids = DocumentIds(bank)
    for position, document in enumerate(bank.documents):
        assert document.id == model.living[document.key][2] == ids.id_of(position)
        assert ids.position_of(document.id) == position
    assert ids.next_id() == model.next_id == bank.next_id
    gone = set(range(model.next_id + 2)) - {id for *_, id in model.living.values()}
    assert all(ids.position_of(id) is None for id in gone)


@pytest.mark.parametrize("on_disk", PLACES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(st.tuples(EVENTS, st.booleans()), max_size=25), repeats=st.randoms(use_true_random=False))
def test_any_sequence_of_events_leaves_what_a_dictionary_would(
    tmp_path: Path, on_disk: bool, events: list[Any], repeats: random.Random
) -> None:
    """Repeated and late events, alone or many to a commit, with compactions and reopening in between."""
    directory = tmp_path / "bank" if on_disk else None
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
    delivered = list(events)
    for item in events:
        if item[0][0] in ("upsert", "delete") and repeats.random() < 0.5:
            delivered.insert(repeats.randint(0, len(delivered)), item)
    model, bank, kept = Dictionary(), BankStore(FakeModel(), directory), []

    def deliver(event: Any) -> None:
        nonlocal bank
        kind, key, version, size = event
        text = f"text {size} of {key}"
        if kind == "upsert":
            assert bank.upsert(key, text, version) == model.put(key, text, version)
        elif kind == "delete":
            assert bank.delete(key, version) == model.delete(key, version)
        elif kind == "add" and key in model.living:
            with pytest.raises(ValueError, match=f"has a document with the key '{key}'"):
                bank.add([{"key": key, "text": text}])
        elif kind == "add":
            fresh = model.next_id
            applied = model.put(key, text, version)
            assert bank.add([{"key": key, "text": text, "version": version}]) == [fresh if applied else None]

    place = 0
    while place < len(delivered):
        event, grouped = delivered[place]
        if event[0] == "compact":
            bank.compact()
        elif event[0] == "reopen":
            if directory is not None:
                bank.close()
                bank = BankStore(FakeModel(), directory)
        elif event[0] == "snapshot":
            snapshot = bank.snapshot()
            kept.append((snapshot, contents(snapshot)))
        elif grouped:
            before = bank.generation
            with bank.batch():
                while place < len(delivered) and delivered[place][1] and delivered[place][0][1]:
                    deliver(delivered[place][0])
                    place += 1
            assert bank.generation <= before + 1
            continue
        else:
            deliver(event)
        place += 1
    assert len(bank) == len(model.living)
    agrees(bank.snapshot(), model)
    for snapshot, then in kept:
        assert contents(snapshot) == then
    if directory is not None:
        assert bank.verify() == []
        agrees(MemoryBank.from_pretrained(directory), model)
    bank.close()


def test_a_version_is_known_over_deletion_compaction_and_reopening(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        assert bank.upsert("a", "first", 3) and not bank.upsert("a", "first", 3) and not bank.upsert("a", "late", 2)
        assert bank.delete("a", 5) and not bank.delete("a", 5) and not bank.upsert("a", "late", 4)
        assert not bank.delete("never seen", 7)
        bank.compact()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert not bank.upsert("a", "late", 5) and not bank.upsert("never seen", "late", 6)
        assert bank.upsert("a", "back", 6) and bank.get("a").id == 1  # type: ignore[union-attr]


def test_unchanged_text_is_not_encoded_again(place: Path | None) -> None:
    model = FakeModel()
    with BankStore(model, place) as bank:
        bank.add([{"key": "a", "text": "a text"}, {"key": "b", "text": "b text"}])
        model.encoded.clear()
        assert not bank.upsert("a", "a text"), "nothing changed at all"
        generation = bank.generation
        assert bank.upsert("a", "a text", 4) and bank.upsert("b", "b text", metadata={"n": [1]})
        assert bank.generation == generation + 2 and model.encoded == []
        found = contents(bank.snapshot())
        assert found == {"a": ("a text", None, 4), "b": ("b text", {"n": [1]}, None)}
        bank.upsert("b", "b text", 5, metadata={"n": [2]})  # now that tensors are in memory
        assert model.encoded == [] and contents(bank.snapshot())["b"] == ("b text", {"n": [2]}, 5)
        bank.upsert("b", "other text")
        assert model.encoded == ["other text"]


def test_what_wraps_a_text_counts_as_a_change(tmp_path: Path) -> None:
    class Tokenizer:
        unk_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(character) for character in text]}

    model: Any = FakeModel()
    tokenizer = Tokenizer()
    with BankStore(model, tmp_path, tokenizer, COMPACT) as bank:
        bank.add(["some text", "more"])
        assert model.encoded[-1] == str([ord(character) for character in "[1] more\n[1]"])
        model.encoded.clear()
        assert not bank.upsert("0", "some text")
        with pytest.raises(ValueError, match="this bank's protocol"):
            bank.add([[1, 2]])
    with BankStore(model, tmp_path, tokenizer) as bank:
        assert bank.upsert("0", "some text") and model.encoded == ["some text"]


def test_a_batch_is_one_commit_or_none(place: Path | None) -> None:
    with BankStore(FakeModel(), place) as bank:
        with bank.batch():
            bank.add(["one", "two"])
            bank.delete("0")
            bank.upsert("0", "one again")
        assert bank.generation == 1 and texts(bank) == {"1": "two", "0": "one again"}
        assert bank.get("0").id == 2  # type: ignore[union-attr]  # another document: the first was deleted
        for failing in (lambda: bank.add(["refuse me"]), lambda: bank.delete(1 / 0)):  # type: ignore[arg-type]
            with pytest.raises((ValueError, ZeroDivisionError)), bank.batch():
                bank.delete("1")
                failing()
            assert bank.generation == 1 and texts(bank) == {"1": "two", "0": "one again"}
        with bank.batch():
            pass
        assert bank.generation == 1
        assert bank.add(["next"]) == [3], "ids of what failed were never given"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda bank: bank.add("text"), TypeError, "must be an iterable"),
        (lambda bank: bank.add([{"key": "x"}]), ValueError, "'x' has no text"),
        (lambda bank: bank.add([{"key": "x", "text": 3}]), TypeError, "'x': its text is a int"),
        (lambda bank: bank.upsert("x", "t", metadata={"a": {1}}), ValueError, "'x': its metadata cannot be written"),
        (lambda bank: bank.upsert("x", "\ud800"), ValueError, "'x': its text is not Unicode"),
        (lambda bank: bank.upsert("\ud800", "x"), ValueError, "surrogates"),
        (lambda bank: bank.upsert("x", "t", -1), ValueError, "`version` must be an integer"),
        (lambda bank: bank.upsert("x", "t", True), ValueError, "`version` must be an integer"),
        (lambda bank: bank.delete("x", 2**63), ValueError, "`version` must be an integer"),
        (lambda bank: bank.add(["a", {"key": "0", "text": "b"}]), ValueError, "has a document with the key '0'"),
    ],
)
def test_what_is_no_document_is_named_and_changes_nothing(
    place: Path | None, change: Callable[[BankStore], Any], error: type[Exception], message: str
) -> None:
    with BankStore(FakeModel(), place) as bank:
        with pytest.raises(error, match=message):
            change(bank)
        assert len(bank) == 0 and bank.generation == 0


# --- snapshots and readers --------------------------------------------------------------------------------------------


def test_what_is_caught_inside_a_batch_leaves_nothing_in_its_commit(place: Path | None) -> None:
    with BankStore(FakeModel(), place) as bank:
        bank.upsert("there", "one")
        with bank.batch():
            bank.upsert("pending", "two")
            with pytest.raises(ValueError, match="'there'"):
                bank.add([{"key": "lost", "text": "three"}, {"key": "there", "text": "four"}])
            with pytest.raises(ValueError, match="no text"):
                bank.add([{"key": "lost", "text": "three"}, {"key": "other"}])
            assert bank.add(["five"]) == [2]
        assert texts(bank) == {"there": "one", "pending": "two", "2": "five"}


def test_a_document_is_that_of_its_key_while_another_thread_compacts(
    place: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BankStore(FakeModel(), place) as bank:
        bank.add({"key": f"k{number}", "text": f"text {number}"} for number in range(4))
        bank.delete("k0")
        find = State.find

        def find_and_compact(state: State, key: str) -> int | None:
            row = find(state, key)
            bank.compact()
            return row

        monkeypatch.setattr(State, "find", find_and_compact)
        found = bank.get("k1")
        assert found is not None and (found.key, found.text) == ("k1", "text 1")


def test_an_integer_names_a_document_wherever_a_key_does(place: Path | None) -> None:
    with BankStore(FakeModel(), place) as bank:
        bank.add([{"key": 7, "text": "seven", "version": 3}])
        for key in (7, np.int64(7), "7"):
            found = bank.get(key)  # type: ignore[arg-type]
            assert found is not None and found.key == "7" and key in bank  # type: ignore[operator]
            assert bank.known_version(key) == 3  # type: ignore[arg-type]
            assert bank.snapshot().documents.position(key) == bank.documents.position(key) == 0  # type: ignore[arg-type]
        assert 8 not in bank and bank.get(8) is None  # type: ignore[operator,arg-type]
        for wrong in (7.0, True, None):
            with pytest.raises(TypeError, match="an integer by its digits"):
                bank.get(wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="an integer by its digits"):
                bank.documents.position(wrong)  # type: ignore[arg-type]


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no bank")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BankFormatError, match="a file is where the directory of a bank is to be"):
            BankStore(FakeModel(), path)


def test_a_snapshot_stays_while_the_writer_goes_on(place: Path | None) -> None:
    with BankStore(FakeModel(), place) as bank:
        bank.add([f"text {number}" for number in range(6)])
        first, then = bank.snapshot(), texts(bank)
        assert bank.snapshot() is first, "without a commit it is the same"
        for number in range(0, 6, 2):
            bank.delete(str(number))
            bank.upsert("5", f"new {number}")
            bank.compact()
        assert texts(first) == then and first.documents.position("5") == 5
        with pytest.raises(KeyError):
            bank.snapshot().documents.position("0")
        assert bank.snapshot().documents.position("3") == 1


def test_readers_keep_what_they_opened_until_they_refresh(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as writer:
        writer.add([f"text {number}" for number in range(4)])
        loaded = MemoryBank.from_pretrained(tmp_path)
        reader = BankStore(FakeModel(), tmp_path, read_only=True)
        late = BankStore(FakeModel(), tmp_path, read_only=True)  # asks for its tensors when the files are gone
        before = texts(reader)
        writer.delete("1")
        writer.add([{"key": "new", "text": "a new one"}])
        assert texts(reader) == before
        assert reader.refresh() and not reader.refresh()
        assert texts(reader) == texts(writer) != before
        writer.upsert("2", "changed")
        writer.compact()
        files = {path.name for path in tmp_path.iterdir()}
        assert texts(loaded) == texts(late) == before
        assert reader.refresh() and texts(reader) == texts(writer)
        assert {path.name for path in tmp_path.iterdir()} == files, "readers write nothing"
        for change in (lambda: reader.add(["x"]), reader.compact, lambda: reader.delete("0")):
            with pytest.raises(RuntimeError, match="read_only=True"):
                change()


def test_a_reader_that_opens_while_files_are_removed_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = BankStore(FakeModel(), tmp_path)
    writer.add(["one", "two"])
    original, compacted = Segment.open, []

    def opening(*arguments: Any) -> Any:
        if not compacted:  # between the reader's look at the manifest and at the files
            compacted.append(True)
            assert writer.delete("0") and writer.compact()
        return original(*arguments)

    monkeypatch.setattr(Segment, "open", opening)
    reader = BankStore(FakeModel(), tmp_path, read_only=True)
    assert compacted == [True] and texts(reader) == {"1": "two"} and reader.stat()["damaged"] == 0


# --- who may write ----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_holds_the_bank(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        with pytest.raises(BankLocked, match=rf"open for writing in process {os.getpid()} on .* since 20.*read_only"):
            BankStore(FakeModel(), tmp_path)
        bank.add(["still works"])
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 1
    with pytest.raises(RuntimeError, match="is closed"):
        bank.add(["too late"])


def test_a_forked_process_neither_holds_nor_frees_the_lock(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:

        def child() -> None:
            with pytest.raises(RuntimeError, match="was forked"):
                bank.add(["x"])
            bank.close()
            os._exit(7)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(20)
        assert process.exitcode == 7
        with pytest.raises(BankLocked):
            BankStore(FakeModel(), tmp_path)


def test_a_bank_that_was_replaced_under_its_writer_is_not_written_over(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one"])
        FakeModel().encode_documents([{"text": "another bank"}]).save_pretrained(tmp_path / "other")
        for path in (tmp_path / "other").iterdir():
            if path.name != ".lock":
                path.rename(tmp_path / path.name)
        with pytest.raises(RuntimeError, match="was replaced since it was opened"):
            bank.add(["two"])
    assert texts(MemoryBank.from_pretrained(tmp_path)) == {"0": "another bank"}


def test_another_models_bank_is_refused(tmp_path: Path) -> None:
    BankStore(FakeModel(), tmp_path).close()

    class Other(FakeModel):
        def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
            return BankOrigin.from_dict({**ORIGIN.to_dict(), "similarity": "dot"})

    with pytest.raises(ValueError, match="similarity: the bank has cosine, the model dot"):
        BankStore(Other(), tmp_path)
    BankStore(FakeModel(), tmp_path).close()  # the lock is free again


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1GB", 1])
def test_a_bank_of_version_1_is_upgraded_by_its_first_commit(tmp_path: Path, size: Any) -> None:
    plain = FakeModel().encode_documents([{"key": f"k{row}", "text": f"text {row}"} for row in range(4)])
    rows = [Document(d.key, d.text, {"id": 7} if d.key == "k1" else None, d.tokens, d.chunks) for d in plain.documents]
    plain.documents = DocumentTable(rows)
    plain.save_pretrained(tmp_path, max_shard_size=size)
    before = {path.name for path in tmp_path.iterdir()}
    with BankStore(FakeModel(), tmp_path, read_only=True) as bank:
        assert [document.id for document in bank.snapshot().documents] == [0, 7, 2, 3]
        assert {path.name for path in tmp_path.iterdir()} == before
    model = FakeModel()
    with BankStore(model, tmp_path) as bank:
        assert bank.verify() == [] and bank.stat()["next_id"] == 8
        assert bank.add([{"key": "new", "text": "added"}]) == [8] and model.encoded == ["added"]
        bank.delete("k0")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 3
    tensors = {name for name in before if name.startswith("layer")}
    assert tensors <= {path.name for path in tmp_path.iterdir()}, "tensors are not written again"
    loaded = MemoryBank.from_pretrained(tmp_path)
    assert texts(loaded) == {"k1": "text 1", "k2": "text 2", "k3": "text 3", "new": "added"}
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.compact()
        assert [(d.key, d.id) for d in bank.snapshot().documents] == [("k1", 7), ("k2", 2), ("k3", 3), ("new", 8)]


def test_a_saved_snapshot_is_a_bank_without_the_deleted(tmp_path: Path) -> None:
    bank = BankStore(FakeModel())
    bank.add([f"text {row} " + "z" * row for row in range(5)])
    bank.delete("1")
    bank.delete("4")
    bank.snapshot().save_pretrained(tmp_path)
    loaded = MemoryBank.from_pretrained(tmp_path)
    assert contents(loaded) == contents(bank.snapshot()) and loaded.num_chunks == int(loaded.offsets[-1])
    with BankStore(FakeModel(), tmp_path) as again:
        assert again.add(["sixth"]) == [5], "also the id of the last document, which was deleted, stays taken"


def test_deletions_are_put_together(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([f"text {row}" for row in range(150)])
        for row in range(145):
            bank.delete(str(row), row)
        assert len(bank_manifest_msa.read_manifest(tmp_path)["deletions"]) < 40
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 5 and not bank.upsert("3", "late", 3)


@pytest.mark.parametrize("key", [["a"], ("a",), None, True, 1.5, b"a", {"key": "a"}])
def test_what_is_no_key_is_refused(key: Any) -> None:
    bank = BankStore(FakeModel())
    bank.upsert("a", "text")
    for change in (lambda: bank.delete(key), lambda: bank.upsert(key, "text")):
        with pytest.raises(TypeError, match="A key is a string"):
            change()
    assert len(bank) == 1
    bank.upsert(7, "an integer is taken as its digits")  # type: ignore[arg-type]
    assert "7" in bank and bank.delete(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes, left", [([200, 9, 5], 2), ([9, 200, 5], 3), ([9, 5, 200, 9], 3), ([200, 200, 9], 3)])
def test_compacting_keeps_large_segments_and_joins_small_ones(tmp_path: Path, sizes: list[int], left: int) -> None:
    """In any order; each large one stays the file it is, neighboring small ones become one."""
    with BankStore(FakeModel(), tmp_path, max_shard_size=2000) as bank:
        for number, size in enumerate(sizes):
            bank.add([{"key": str(number), "text": chr(97 + number) * size}])
        before, expected = bank_manifest_msa.read_manifest(tmp_path)["segments"], texts(bank)
        bank.compact()
        after = bank_manifest_msa.read_manifest(tmp_path)["segments"]
        assert texts(bank) == expected and texts(MemoryBank.from_pretrained(tmp_path)) == expected
    large = [part["tensors"] for part, size in zip(before, sizes, strict=True) if size == 200]
    assert all(tensors in [part["tensors"] for part in after] for tensors in large)
    assert len(after) == left


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_commit_costs_what_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes written, documents encoded, and memory of snapshots, in a bank 50 times as large as the change."""
    read: list[int] = []
    original = Shard.tensors
    monkeypatch.setattr(Shard, "tensors", lambda *arguments: (read.append(1), original(*arguments))[1])
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([f"text {row}" for row in range(2000)])
        large = sum(path.stat().st_size for path in tmp_path.iterdir())
    model = FakeModel()
    with BankStore(model, tmp_path) as bank:
        written: list[int] = []
        publish = BankWriter._publish

        def counted(*arguments: Any) -> FileRecord:
            entry = publish(*arguments)
            written.append(entry["bytes"])
            return entry

        monkeypatch.setattr(BankWriter, "_publish", counted)
        bank.add([{"key": f"new {row}", "text": f"text {row}"} for row in range(40)])
        for row in range(3):
            bank.delete(str(row))
        assert sum(written) < large / 20 and len(model.encoded) == 40
        assert bank.get("1999") is not None and read == [], "neither opening nor writing reads tensors"
        bank.snapshot()
        bank.add(["makes room"])
        places = {layer: memory.pooled_kv.data_ptr() for layer, memory in bank.snapshot().layers.items()}
        for row in range(5):
            bank.add([f"more {row}"])
            bank.delete(f"new {row}")
            assert {layer: memory.pooled_kv.data_ptr() for layer, memory in bank.snapshot().layers.items()} == places


def test_positions_count_documents_and_rows_count_deleted_ones_too() -> None:
    pick = np.random.default_rng(0)
    for _ in range(50):
        rows = int(pick.integers(1, 40))
        deleted = np.sort(pick.choice(rows, pick.integers(0, rows), replace=False))
        table = DocumentTable([Document(str(row), None, None, 1, 1) for row in range(rows)], deleted)
        alive = [row for row in range(rows) if row not in set(deleted.tolist())]
        assert [document.key for document in table] == [str(row) for row in alive] and len(table) == len(alive)
        positions = torch.tensor([[*range(len(alive)), -1]])
        assert table.rows_of(positions).tolist() == [[*alive, -1]]
        assert table.positions_of(table.rows_of(positions)).tolist() == positions.tolist()
        assert [table[place].key for place in range(len(alive))] == [str(row) for row in alive]


# --- without a model --------------------------------------------------------------------------------------------------


def test_a_bank_is_cared_for_without_its_model(tmp_path: Path) -> None:
    with pytest.raises(bank_format_msa.BankFormatError, match="not a bank"):
        BankStore(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="needs a `model`"):
        BankStore(None)
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([{"key": key, "text": f"text of {key}"} for key in "abc"])
        expected = contents(bank.snapshot())
    with BankStore(None, tmp_path) as bank:
        assert bank.origin == ORIGIN and bank.verify() == []
        with pytest.raises(ValueError, match="opened without a model"):
            bank.upsert("b", "another text")
        with pytest.raises(ValueError, match="opened without a model"):
            bank.add(["a further text"])
        assert bank.delete("b") and bank.compact()
        del expected["b"]
        assert contents(bank.snapshot()).keys() == expected.keys()
    with BankStore(FakeModel(), tmp_path) as bank:
        found = contents(bank.snapshot())
        assert str(found) == str(expected)


def test_without_its_model_a_damaged_prefix_is_never_replaced(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([{"key": key, "text": f"text of {key}"} for key in "ab"])
    path = next(tmp_path.glob("prefix-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with BankStore(None, tmp_path) as bank:
        assert [item.file for item in bank.verify()] == [path.name]
        assert bank.delete("a")
        for action in (bank.snapshot, bank.compact):
            with pytest.raises(BankDamaged, match="prefix"):
                action()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert texts(bank) == {"b": "text of b"} and bank.compact() and bank.verify() == []


@pytest.mark.parametrize("metadata", [[1], "year", 7, [("year", 1)]])
def test_metadata_that_is_no_mapping_is_refused_and_changes_nothing(tmp_path: Path, metadata: Any) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        with pytest.raises(TypeError, match=r"Document 'k': its metadata must be a dict of values by name, got"):
            bank.upsert("k", "text", metadata=metadata)
        assert len(bank) == 0 and bank.upsert("k", "text", metadata={"year": 1})
