"""The lexical index that is kept with a bank: it finds what the bank holds, whatever was done to the bank and whoever
died meanwhile, and nothing of what was erased."""

import json
import math
import os
import random
import re
import signal
import threading
import unicodedata
from pathlib import Path

import pytest
from fake_model import FakeModel

from msa_hf.bank import BankStore
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.retrieval import add_lexical_index, lexical, lexical_files
from msa_hf.retrieval.lexical import Change, LexicalIndex
from msa_hf.retrieval.lexical_files import LexicalFollower
from msa_hf.retrieval.rows import rows_of_bank

pytest.importorskip("tantivy")
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "kptx"]


def text_of(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))


def found(bank: MemoryBank, word: str, k: int = 1000) -> set[str]:
    """Keys of the documents that the index has for a word."""
    rows = bank.indexes["lexical"].best(word, k)
    return {bank.documents.row(row).key for row, _ in rows}


def is_exact(bank: MemoryBank, chance: random.Random) -> bool:
    return all(
        found(bank, word) == {item.key for item in bank.documents if word in (item.text or "").split()}
        for word in [*chance.sample(WORDS, 8), *bank.documents[0].text.split()]  # type: ignore[union-attr]
    )


def ranking(bank: MemoryBank, query: str) -> list[tuple[str, float]]:
    return [(bank.documents.row(row).key, score) for row, score in bank.indexes["lexical"].best(query, 50)]


def churn(bank: BankStore, chance: random.Random, commits: int) -> None:
    for _ in range(commits):
        with bank.batch():
            for _ in range(chance.randint(1, 9)):
                key = f"k{chance.randrange(30)}"
                if chance.random() < 0.3:
                    bank.delete(key)
                else:
                    bank.upsert(key, text_of(chance))
        if chance.random() < 0.2:
            bank.compact()


@pytest.mark.parametrize(("seed", "in_memory"), [(0, False), (1, True)])
def test_follows_all_changes(tmp_path: Path, seed: int, in_memory: bool) -> None:
    chance = random.Random(seed)
    with BankStore(FakeModel(), None if in_memory else tmp_path, lexical="none") as bank:
        for _ in range(4):
            churn(bank, chance, 3)
            assert is_exact(bank.snapshot(), chance)
        bank.compact()
        # What was compacted is what was made anew, scores and all.
        query = " ".join(WORDS[:40])
        fresh = LexicalIndex("none")
        fresh.apply(Change((), rows_of_bank(bank.snapshot()).texts(), False))
        expected = [(bank.snapshot().documents.row(row).key, score) for row, score in fresh.searcher().best(query, 50)]
        assert ranking(bank.snapshot(), query) == expected


@pytest.mark.parametrize("broken", ["apply", "write_sidecar", "stale"])
def test_a_crash_leaves_no_silent_error(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(7)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 4)
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise OSError("the disk is full")

            if broken == "apply":
                patch.setattr(LexicalIndex, "apply", fail)
            elif broken == "write_sidecar":  # tantivy has committed what the record does not know
                patch.setattr(lexical_files, "write_sidecar", fail)
            else:
                patch.setattr(bank._followers, "_followers", [])
            bank.upsert("k1", text_of(chance))
            bank.delete("k2")
            bank.upsert("new", text_of(chance))
            bank.delete("new")
            bank.upsert("new", text_of(chance))
            assert ("could not follow" in caplog.text) == (broken != "stale")
            if broken != "stale":
                assert "lexical" not in bank.snapshot().indexes
    with BankStore(None, tmp_path, read_only=True) as reader:
        assert "lexical" not in reader.snapshot().indexes and not reader.stat()["indexes"]["lexical"]["current"]
    with BankStore(FakeModel(), tmp_path) as bank:
        assert is_exact(bank.snapshot(), chance)
        churn(bank, chance, 2)
        assert is_exact(bank.snapshot(), chance)


POINTS = {  # what is called, and whether it does its work before the writer is killed
    "before the index": ((LexicalIndex, "apply"), False),
    "before the record": ((lexical_files, "write_sidecar"), False),
    "before old files go": ((lexical_files.shutil, "rmtree"), False),
    "behind all": ((LexicalFollower, "_tidy"), True),
}


@pytest.mark.parametrize(("point", "action"), [(point, ("change", "compact")[n % 2]) for n, point in enumerate(POINTS)])
def test_a_killed_writer_leaves_an_index_that_is_found_out(tmp_path: Path, point: str, action: str) -> None:
    chance = random.Random(5)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 4)
        bank.upsert("k1", "zyxwquark")
    (owner, name), works = POINTS[point]
    child = os.fork()
    if child == 0:
        try:
            bank = BankStore(FakeModel(), tmp_path)
            original = getattr(owner, name)

            def killed(*arguments: object, **options: object) -> None:
                if works:
                    original(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            bank.delete("k1")
            setattr(owner, name, killed)
            bank.upsert("k2", text_of(chance)) if action == "change" else bank.compact()
        finally:
            os._exit(1)
    reached = os.waitpid(child, 0)[1] == signal.SIGKILL
    assert reached or (point, action) == ("before old files go", "change")
    with BankStore(FakeModel(), tmp_path) as bank:
        assert is_exact(bank.snapshot(), chance) and not found(bank.snapshot(), "zyxwquark")
        bank.compact()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    assert not any(b"zyxwquark" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_readers_beside_a_writer_find_what_their_state_has(tmp_path: Path) -> None:
    chance, done = random.Random(1), threading.Event()
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 2)

        def write() -> None:
            churn(bank, chance, 12)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = looked = 0
        own = random.Random(2)
        while not done.is_set():
            with BankStore(None, tmp_path, read_only=True) as reader:
                snapshot = reader.snapshot()
                if "lexical" in snapshot.indexes and len(snapshot):
                    assert is_exact(snapshot, own)
                    seen += 1
                looked += 1
        writer.join()
    assert seen and looked >= seen


def test_damaged_files_of_the_index_are_made_anew(tmp_path: Path) -> None:
    chance = random.Random(3)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 3)
    for damage in ("record", "files", "folder"):
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        if damage == "record":
            (tmp_path / "lexical.json").write_text("{")
        else:
            for path in list(folder.iterdir()):
                path.unlink()
            if damage == "folder":
                folder.rmdir()
        with BankStore(FakeModel(), tmp_path) as bank:
            assert is_exact(bank.snapshot(), chance)
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier release"])
def test_flipped_bits_are_found_before_tantivy_sees_them(tmp_path: Path, recorded: bool) -> None:
    """It would find something else in them, or end with what is no `Exception`."""
    chance = random.Random(5)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 4)
    for kind in ("fast", "term", "json") if recorded else ("fast", "term"):
        path = chance.choice(sorted(path for path in tmp_path.glob(f"*/*.{kind}") if not path.name.startswith(".")))
        name, data = str(path.relative_to(tmp_path)), bytearray(path.read_bytes())
        with BankStore(None, tmp_path, read_only=True) as reader:
            assert reader.verify() == []
            path.write_bytes(bytes(255 - byte for byte in data) if not recorded else flipped(data, chance))
            assert not recorded or [damage.file for damage in reader.verify()] == [name]
        if not recorded:
            record = json.loads((tmp_path / "lexical.json").read_text())
            (tmp_path / "lexical.json").write_text(json.dumps({**record, "files": {}}))
        with BankStore(None, tmp_path, read_only=True) as reader:
            assert [hit.key for hit in reader.search("absent", 3, "lexical")] == []
        with BankStore(FakeModel(), tmp_path) as bank:
            assert is_exact(bank.snapshot(), chance)
            bank.upsert("k1", text_of(chance))
            assert is_exact(bank.snapshot(), chance) and bank.verify() == []


def test_a_list_of_tantivys_own_that_is_damaged_changes_no_result(tmp_path: Path) -> None:
    """What it tidies up by is not recorded: nothing is found with it."""
    chance = random.Random(8)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 4)
    for damage in (b"", b"{", b"\xff" * 40, b'["../../manifest.json"]', b'["no-file.term"]'):
        (path,) = tmp_path.glob("*/.managed.json")
        path.write_bytes(damage)
        with BankStore(None, tmp_path, read_only=True) as reader:
            assert reader.verify() == [] and is_exact(reader.snapshot(), chance)
        with BankStore(FakeModel(), tmp_path) as bank:
            churn(bank, chance, 2)
            assert is_exact(bank.snapshot(), chance) and bank.verify() == []


def flipped(data: bytearray, chance: random.Random) -> bytes:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("files", [{"../x": ""}, {"": ""}, ["x"], {"/dev/zero": ""}, 3])
def test_a_record_of_files_that_are_elsewhere(tmp_path: Path, files: object) -> None:
    chance = random.Random(6)
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        churn(bank, chance, 1)
    record = json.loads((tmp_path / "lexical.json").read_text())
    (tmp_path / "lexical.json").write_text(json.dumps({**record, "files": files}))
    with BankStore(None, tmp_path, read_only=True) as reader:
        assert [damage.file for damage in reader.verify()] == ["lexical.json"]
        assert reader.search("absent", 3, "lexical") == []
    with BankStore(FakeModel(), tmp_path) as bank:
        assert is_exact(bank.snapshot(), chance)


def test_erased_words_are_in_no_file(tmp_path: Path) -> None:
    def holds(word: bytes) -> bool:
        return any(word in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    with BankStore(FakeModel(), tmp_path, lexical=True) as bank:
        bank.add([{"key": f"k{number}", "text": f"plain text {number}"} for number in range(20)])
        bank.add([{"key": "secret", "text": "zyxwquark is here"}, {"key": "old", "text": "brzlfoo stands"}])
        assert holds(b"zyxwquark") and found(bank.snapshot(), "zyxwquark") == {"secret"}
        bank.delete("secret")
        bank.upsert("old", "nothing stands")
        assert not found(bank.snapshot(), "zyxwquark") and not found(bank.snapshot(), "brzlfoo")
        bank.compact()
        assert not holds(b"zyxwquark") and not holds(b"brzlfoo") and found(bank.snapshot(), "stands") == {"old"}


def test_readers_write_nothing_and_keep_their_state(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        bank.add([{"key": "a", "text": "bak dot"}, {"key": "b", "text": "bak"}])
        for path in tmp_path.rglob(".tantivy*"):
            path.unlink()  # what a copy of the directory may lack, and a reader of a read-only one could not make
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with BankStore(None, tmp_path, read_only=True) as reader:
            old = reader.snapshot()
            assert found(old, "bak") == {"a", "b"}
            assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
            bank.delete("a")
            bank.add([{"key": "c", "text": "bak"}])
            bank.compact()
            assert found(old, "bak") == {"a", "b"}
            assert reader.refresh() and found(reader.snapshot(), "bak") == {"b", "c"}
            assert reader.stat()["indexes"]["lexical"] == {"language": "none", "current": True}


def test_what_is_damaged_is_not_found_and_comes_back_when_restored(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path, lexical="none") as bank:
        for key in "abc":
            bank.add([{"key": key, "text": "bak"}])
    victim = sorted(tmp_path.glob("chunks-*"))[1]
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    for path in folder.iterdir():  # so that it is made anew of what can be read
        path.unlink()
    with BankStore(None, tmp_path) as bank:
        assert found(bank.snapshot(), "bak") == {"a", "c"}
    victim.write_bytes(content)
    with BankStore(None, tmp_path) as bank:
        assert found(bank.snapshot(), "bak") == {"a", "b", "c"}


def test_equal_scores_go_to_the_lower_row() -> None:
    index = LexicalIndex("none")
    for start in range(0, 400, 80):  # several of tantivy's segments
        index.apply(Change((), ((row, "dot") for row in reversed(range(start, start + 80))), False))
    assert [row for row, _ in index.searcher().best("dot", 7)] == list(range(7))
    assert [row for row, _ in index.searcher().best("dot", 3, lambda row: row % 50 == 49)] == [49, 99, 149]
    assert index.searcher().best("", 3) == index.searcher().best("unknown", 3) == []


def test_words(tmp_path: Path) -> None:
    assert LexicalIndex("english").terms("The Cafés are RUNNING!") == ["cafe", "run"]
    bigrams = LexicalIndex("bigrams")
    bigrams.apply(Change((), [(0, "私は猫が好きです"), (1, "犬がいます")], False))
    assert [row for row, _ in bigrams.searcher().best("猫が", 2)] == [0]
    with pytest.raises(ValueError, match=re.escape("`language` must be one of danish")):
        LexicalIndex("klingon")
    with BankStore(FakeModel(), tmp_path, lexical="german"):
        pass
    with pytest.raises(ValueError, match="'german', not 'french'"):
        BankStore(FakeModel(), tmp_path, lexical="french")
    with BankStore(FakeModel(), tmp_path) as bank:
        assert bank.stat()["indexes"]["lexical"]["language"] == "german"


def test_accents_count_as_one_whether_they_stand_apart_or_not() -> None:
    words = ["Zürich", "café", "한국어", "ἀρχή"]
    apart = [unicodedata.normalize("NFD", word) for word in words]
    index = LexicalIndex("none")
    index.apply(Change((), enumerate([" ".join(words), " ".join(apart)]), False))
    for one, other in zip(words, apart, strict=True):
        assert one != other and index.terms(one) == index.terms(other) and len(index.terms(one)) == 1
        assert [row for row, _ in index.searcher().best(one, 3)] == [0, 1]
        assert index.searcher().best(one, 3) == index.searcher().best(other, 3)
    bank = FakeModel().encode_documents([{"text": apart[0]}])
    add_lexical_index(bank)
    assert [hit.why.terms for hit in bank.search(apart[0], mode="lexical")] == [(words[0],)]


def test_an_index_of_another_release_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with BankStore(FakeModel(), tmp_path, lexical=True) as bank:
        bank.add([{"key": "a", "text": "bak"}])
    record = json.loads((tmp_path / "lexical.json").read_text())
    (tmp_path / "lexical.json").write_text(json.dumps({**record, "version": record["version"] - 1}))
    with BankStore(None, tmp_path, read_only=True) as reader:
        assert not reader.stat()["indexes"]["lexical"]["current"]
        assert [hit.key for hit in reader.search("bak", mode="lexical")] == ["a"]
    assert "another release made it, by other rules of what is a word" in caplog.text
    with BankStore(FakeModel(), tmp_path) as bank:
        assert [hit.key for hit in bank.search("bak", mode="lexical")] == ["a"]
    again = json.loads((tmp_path / "lexical.json").read_text())
    assert again["version"] == record["version"] and again["index"] != record["index"]


def test_words_are_rare_as_their_texts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "KEPT_WORDS", 5)
    chance = random.Random(7)
    texts = [text_of(chance) for _ in range(40)]
    index = LexicalIndex("none")
    index.apply(Change((), enumerate(texts), many=False))
    searcher = index.searcher()
    for word in [*chance.sample(WORDS, 12), "nowhere"]:
        count = sum(word in text.split() for text in texts)
        assert searcher.rarity(word) == pytest.approx(math.log(41 / (count + 0.5)))
    index.apply(Change(range(10), (), many=False))  # what was removed still counts, as its statistics do
    assert all(math.isfinite(index.searcher().rarity(word)) for word in WORDS)
