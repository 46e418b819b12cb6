"""After compacting, nothing of a deleted document is in any file under the bank's directory, or an error says where."""

from __future__ import annotations

import errno
import json
import os
import random
import string
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_embedder import FakeEmbedder
from helpers.fake_model import CHUNK, LAYERS, FakeModel, contents, vectors

from msa_hf.bank import BankDamaged, BankStore, ErasureIncomplete
from msa_hf.bank.corpus_parts import FOLDER, Part, find_parts, write_part
from msa_hf.cli.command_line import main
from msa_hf.model.arrow_msa import table_of
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.retrieval.dense import normalized, text_digest

needs_tantivy = pytest.mark.skipif(find_spec("tantivy") is None, reason="tantivy is not installed")


class Secrets:
    """Documents of words that nothing else has, and what a file may hold of them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def word(self) -> str:
        return "".join(self.chance.choices(string.ascii_lowercase, k=12))

    def document(self, key: str | None = None) -> dict[str, Any]:
        words = [self.word() for _ in range(self.chance.randint(1, 9))]
        return {"key": key or self.word(), "text": " ".join(words), "owner": [self.word(), {self.word(): 1}]}

    @staticmethod
    def traces(document: dict[str, Any], with_key: bool = True) -> list[bytes]:
        """Its key, words, metadata, routing keys, content, vector, and the digest of its text."""
        text: str = document["text"]
        words = [*text.split(), document["owner"][0], *document["owner"][1], *([document["key"]] if with_key else [])]
        memory = vectors(text, -(-len(text) // CHUNK))
        rows = [part for layer in LAYERS for part in (memory[layer].routing_keys, memory[layer].pooled_kv)]
        numbers = [row.numpy().tobytes() for part in rows for row in part[-1:]]
        vector = normalized(FakeEmbedder()._embed([text])).half().numpy().tobytes()
        return [*(word.encode() for word in words), *numbers, vector, text_digest(text)]


def found(directory: Path, traces: list[bytes]) -> dict[str, int]:
    """How many of these traces each file holds that holds any."""
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    counts = {path: sum(trace in data for trace in traces) for path, data in files.items()}
    return {str(path.relative_to(directory)): count for path, count in counts.items() if count}


def change(bank: BankStore, secrets: Secrets, living: dict[str, dict[str, Any]]) -> list[bytes]:
    """Add, replace and delete documents in a few commits; returns the traces of what is gone."""
    gone: list[bytes] = []
    for _ in range(secrets.chance.randint(2, 6)):
        with bank.batch():
            for _ in range(secrets.chance.randint(2, 6)):
                document = secrets.document()
                living[document["key"]] = document
                bank.add([document])
        with bank.batch():
            for key in secrets.chance.sample(sorted(living), secrets.chance.randint(1, 1 + len(living) // 2)):
                old = living.pop(key)
                if secrets.chance.random() < 0.5:
                    bank.delete(key)
                    gone += secrets.traces(old)
                else:
                    living[key] = new = secrets.document(key)
                    bank.upsert(key, new["text"], metadata={"owner": new["owner"]})
                    gone += secrets.traces(old, with_key=False)
    return gone


def assert_erased(directory: Path, gone: list[bytes], living: dict[str, dict[str, Any]]) -> None:
    assert found(directory, gone) == {}
    stays = contents(MemoryBank.from_pretrained(directory))
    expected = {key: (item["text"], {"owner": item["owner"]}, None) for key, item in living.items()}
    assert stays == expected


def leave_parts(directory: Path, documents: list[dict[str, Any]]) -> list[Part]:
    """Leave what `msa-hf encode` leaves that is killed after one part, and while it writes the next one."""
    folder = directory / FOLDER
    folder.mkdir(parents=True)
    bank = FakeModel().encode_documents(documents)
    columns: dict[str, list[Any]] = {
        "key": [item["key"] for item in documents],
        "text": [item["text"] for item in documents],
        "metadata": [json.dumps({"owner": item["owner"]}) for item in documents],
        "tokens": bank.documents.counts("tokens").tolist(),
        "chunks": bank.documents.counts("chunks").tolist(),
        "id": list(range(len(documents))),
        "version": [None] * len(documents),
        "digest": [bytes(32)] * len(documents),
    }
    layers = {layer: (item.routing_keys, item.pooled_kv) for layer, item in bank.layers.items()}
    part = Part(0, len(documents), "a" * 64)
    write_part(folder, part, table_of(columns), layers)
    unfinished = folder / f".documents-0000000009-{'b' * 32}.tmp"
    unfinished.mkdir()
    (unfinished / "payload").write_text(documents[0]["text"])
    (folder / f".run-{'c' * 32}.tmp").touch()
    return [part]


@pytest.mark.parametrize("seed", range(1))
def test_nothing_stays_in_a_bank(tmp_path: Path, seed: int) -> None:
    secrets, living = Secrets(seed), dict[str, dict[str, Any]]()
    gone: list[bytes] = []
    for _ in range(2):
        with BankStore(FakeModel(), tmp_path) as bank:
            gone += change(bank, secrets, living)
            assert found(tmp_path, gone), "this test finds them"
            bank.compact()
            assert_erased(tmp_path, gone, living)
    with BankStore(None, tmp_path) as bank:
        for key in list(living):
            gone += secrets.traces(living.pop(key))
            bank.delete(key)
        bank.compact()
    assert_erased(tmp_path, gone, {})


@needs_tantivy
@pytest.mark.parametrize("seed", range(1))
def test_nothing_stays_in_indexes(tmp_path: Path, seed: int) -> None:
    secrets, living = Secrets(seed), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path, lexical=True, embedder=FakeEmbedder()) as bank:
        for _ in range(2):
            gone = change(bank, secrets, living)
            assert any("vectors" in name for name in found(tmp_path, gone)), "this test finds them"
            bank.compact()
            assert_erased(tmp_path, gone, living)
            document = next(iter(living.values()))
            for mode in ("lexical", "dense"):
                assert bank.search(document["text"], 1, mode)[0].key == document["key"]


@needs_tantivy
def test_nothing_stays_in_indexes_that_do_not_follow(tmp_path: Path) -> None:
    secrets, living = Secrets(7), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path, lexical=True, embedder=FakeEmbedder()) as bank:
        gone = change(bank, secrets, living)
    before = set(living)
    with BankStore(FakeModel(), tmp_path, lexical=False) as bank:
        gone += change(bank, secrets, living)
        bank.compact()
        assert_erased(tmp_path, gone, living)
        assert not list(tmp_path.glob("lexical-*"))
        with pytest.raises(ValueError, match="vectors"):
            MemoryBank.from_pretrained(tmp_path).search("x", 1, "dense", embedder=FakeEmbedder())
    embedder = FakeEmbedder()
    with BankStore(FakeModel(), tmp_path, embedder=embedder) as bank:
        fresh = [item["text"] for key, item in living.items() if key not in before]
        assert fresh and set(fresh) <= set(embedder.embedded[1:]), "after the probe"
        assert len(set(embedder.embedded[1:])) < len(living), "vectors of texts that stay are kept"
        for document in living.values():
            for mode in ("lexical", "dense"):
                assert bank.search(document["text"], 1, mode)[0].key == document["key"]


def test_nothing_stays_of_vectors_that_cannot_be_read(tmp_path: Path) -> None:
    secrets, living = Secrets(8), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
        gone = change(bank, secrets, living)
    for damage in (b"", b"{", b"[]", b'{"kind": "msa_hf-vectors", "version": 1, "files": 3}'):
        (tmp_path / "vectors.json").write_bytes(damage)
        (tmp_path / f"vectors-0000000000-{'d' * 16}.safetensors").write_bytes(b"".join(gone))
        with BankStore(FakeModel(), tmp_path, embedder=FakeEmbedder()) as bank:
            bank.compact()
        assert_erased(tmp_path, gone, living)


@pytest.mark.parametrize("clean", [True, False])
def test_nothing_stays_of_an_interrupted_encoding(
    tmp_path: Path, clean: bool, caplog: pytest.LogCaptureFixture
) -> None:
    secrets, living = Secrets(9), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path) as bank:
        document = secrets.document()
        bank.add([document])
        bank.delete(document["key"])
        if clean:
            bank.compact()
    parts = leave_parts(tmp_path, [document, secrets.document()])
    gone = secrets.traces(document)
    with BankStore(FakeModel(), tmp_path) as bank:
        assert find_parts(tmp_path, parts), "opening keeps what a later run can take over"
        assert any(name.startswith(FOLDER) for name in found(tmp_path, gone)), "this test finds them"
        assert bank.compact() is not clean
        assert "run again, it encodes them anew" in caplog.text
        assert not (tmp_path / FOLDER).exists()
        caplog.clear()
        bank.compact()
        assert "encodes them anew" not in caplog.text
    assert_erased(tmp_path, gone, living)


def test_nothing_stays_while_readers_have_the_files_open(tmp_path: Path) -> None:
    secrets, living = Secrets(10), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path) as bank:
        gone = change(bank, secrets, living)
        reader = BankStore(FakeModel(), tmp_path, read_only=True)
        whole = MemoryBank.from_pretrained(tmp_path)
        before, opened = contents(reader.snapshot()), [path.open("rb") for path in tmp_path.glob("documents-*")]
        bank.compact()
        assert_erased(tmp_path, gone, living)
        assert contents(reader.snapshot()) == contents(whole) == before, "readers keep what they have"
        assert reader.refresh() and contents(reader.snapshot()) == contents(bank.snapshot())
        for file in opened:
            file.close()


def test_nothing_stays_of_writes_that_did_not_come_to_their_end(tmp_path: Path) -> None:
    secrets, living = Secrets(11), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path) as bank:
        gone = change(bank, secrets, living)
        old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("documents-")}
        bank.compact()
        for name, data in old.items():  # of a commit that could not tidy up
            (tmp_path / name).write_bytes(data)
        for stem in ("documents-0000000000", "manifest", "vectors-0000000000", "lexical"):
            (tmp_path / f".{stem}-{'e' * 32}.tmp").write_bytes(b"".join(gone))
        folder = tmp_path / f".chunks-0000000000-{'e' * 32}.tmp"
        folder.mkdir()
        (folder / "payload").write_bytes(b"".join(gone))
        (tmp_path / "notes.txt").write_text("not ours")
        bank.compact()
        assert_erased(tmp_path, gone, living)
        assert (tmp_path / "notes.txt").read_text() == "not ours"


# What cannot be removed -----------------------------------------------------------------------------------------------


def keep_files(monkeypatch: pytest.MonkeyPatch, keeps: Callable[[str], bool], number: int = errno.EACCES) -> None:
    """Let files with such names not be removed."""
    unlink = os.unlink

    def refusing(path: Any, *arguments: Any, **options: Any) -> None:
        if keeps(os.path.basename(os.fspath(path))):
            raise OSError(number, os.strerror(number), os.fspath(path))
        unlink(path, *arguments, **options)

    monkeypatch.setattr(os, "unlink", refusing)


@pytest.mark.parametrize("kind", ["documents-", "chunks-", "index-", "deletions-"])
def test_a_file_that_stays_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    secrets, living = Secrets(12), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path) as bank:
        gone = change(bank, secrets, living)
        old = {path.name for path in tmp_path.iterdir() if path.name.startswith(kind)}
        keep_files(monkeypatch, lambda name: name in old)
        for _ in range(2):
            with pytest.raises(
                ErasureIncomplete, match=r"compacted, but .*Permission denied.* call compact\(\) again"
            ) as raised:
                bank.compact()
            assert set(raised.value.files) == old and min(old) in str(raised.value)
            assert contents(bank.snapshot()) == contents(MemoryBank.from_pretrained(tmp_path)), "it is compacted"
            assert bank.stat()["deleted"] == 0
        bank.close()
        BankStore(FakeModel(), tmp_path).close()  # which tries too
        assert f"{min(old)}: it belongs to nothing, but cannot be removed (Permission denied)" in caplog.text
    monkeypatch.undo()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert bank.compact() is False
        assert_erased(tmp_path, gone, living)
        document = secrets.document()
        living[document["key"]] = document
        bank.add([document])
    assert_erased(tmp_path, gone, living)


@needs_tantivy
def test_an_index_and_a_part_that_stay_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets, living = Secrets(13), dict[str, dict[str, Any]]()
    with BankStore(FakeModel(), tmp_path, lexical=True, embedder=FakeEmbedder()) as bank:
        gone = change(bank, secrets, living)
        leave_parts(tmp_path, [secrets.document()])
        kept = [next(tmp_path.glob(pattern)) for pattern in ("lexical-*/*.store", "vectors-*", f"{FOLDER}/documents-*")]
        keep_files(monkeypatch, {path.name for path in kept}.__contains__, errno.EBUSY)
        with pytest.raises(ErasureIncomplete, match="busy") as raised:
            bank.compact()
        assert set(raised.value.files) == {str(path.relative_to(tmp_path)) for path in kept}
        monkeypatch.undo()
        bank.compact()
        assert_erased(tmp_path, gone, living)
        assert bank.stat()["indexes"]["lexical"]["documents"] == len(living)


def test_many_files_that_stay_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        for number in range(9):
            bank.add([f"text {number}"])
        bank.delete("3")
        keep_files(monkeypatch, lambda name: name.startswith("documents-"))
        with pytest.raises(ErasureIncomplete, match=r" and \d+ more\. ") as raised:
            bank.compact()
        assert len(raised.value.files) >= 6 and str(raised.value).count("documents-") == 5


def test_what_nfs_makes_of_a_removed_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def renaming(path: Any, *arguments: Any, **options: Any) -> None:
        if (name := Path(os.fspath(path))).name.startswith("documents-"):
            name.rename(name.with_name(".nfs000000000a1b2c3d00000001"))
        else:
            unlink(path, *arguments, **options)

    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one", "two"])
        bank.delete("0")
        monkeypatch.setattr(os, "unlink", renaming)
        with pytest.raises(ErasureIncomplete, match=r"\.nfs0.*another process on its file system has it open"):
            bank.compact()
        (tmp_path / ".nfs000000000a1b2c3d00000001").rename(tmp_path.parent / "closed")
        assert bank.compact() is False


def test_removals_are_flushed_and_told_if_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    unlink, fsync = os.unlink, os.fsync
    failing = False

    def flush(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("flush" if path == tmp_path else "file")
        if failing and "unlink" in events:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    def remove(path: Any, *arguments: Any, **options: Any) -> None:
        if not os.fspath(path).endswith(("payload", ".tmp")):
            events.append("unlink")
        unlink(path, *arguments, **options)

    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one", "two"])
        bank.delete("0")
        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(os, "unlink", remove)
        bank.compact()
        assert "unlink" in events and "flush" in events[events.index("unlink") :]
        assert "unlink" not in events[len(events) - events[::-1].index("flush") :]
        bank.delete("1")
        events.clear()
        failing = True
        with pytest.raises(ErasureIncomplete, match="could not be flushed to the disk: Input/output error") as raised:
            bank.compact()
        assert raised.value.files == (".",)
        failing = False
        assert bank.compact() is False


def test_a_damaged_bank_is_not_said_to_be_erased(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one", "two"])
        bank.delete("0")
        path = next(tmp_path.glob("documents-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        with pytest.raises(BankDamaged):
            bank.compact()


def test_the_command_says_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one", "two"])
        bank.delete("0")
    old = next(tmp_path.glob("documents-*")).name
    keep_files(monkeypatch, old.__eq__)
    assert main(["bank", "compact", str(tmp_path)]) == 2
    assert f"{old} (Permission denied)" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["bank", "compact", str(tmp_path)]) == 0
    assert not (tmp_path / old).exists()
