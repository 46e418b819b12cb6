"""The log of commits: cost that does not grow, files put together as they come, and what is wrong with one."""

import copy
import errno
import json
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many_commits
import numpy as np
import pytest
from fake_model import FakeModel, contents
from forking import ended, forked

from msa_hf.bank import (
    BankDamaged,
    BankFormatError,
    BankNotWritable,
    BankStore,
    BankUnreadable,
    CommitOutcomeUnknown,
    restore_manifest,
)
from msa_hf.bank.store.deleted_keys import DeletedKeys
from msa_hf.bank.store.merge import FAN_IN, LOG_COMMITS, merge_start
from msa_hf.model import bank_files_msa, bank_manifest_msa, bank_writer_msa
from msa_hf.model.bank_log_msa import entry_name
from msa_hf.model.memory_msa import MemoryBank

ERRORS = [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), MemoryError()]


def texts(bank: MemoryBank) -> dict[str, str]:
    return {key: text for key, (text, *_) in contents(bank).items()}


def filled(directory: Path | None, count: int = 3) -> BankStore:
    bank = BankStore(FakeModel(), directory)
    for number in range(count):
        bank.upsert(f"k{number}", f"text {number}", version=1)
    return bank


# Cost -----------------------------------------------------------------------------------------------------------------


def test_files_descriptors_and_mappings_stay_few_and_commits_cheap(tmp_path: Path) -> None:
    """With fewer descriptors than commits; what a commit costs is the same at the end."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        many_commits.main(tmp_path / "bank", 480)

    with open(os.devnull) as none, open(tmp_path / "said", "w") as said, open(tmp_path / "errors", "w") as errors:
        (code,) = ended(forked(work, [file.fileno() for file in (none, said, errors)]))
    assert code == 0, (tmp_path / "errors").read_text()
    found = json.loads((tmp_path / "said").read_text())
    assert found["documents"] == 480 and found["segments"] <= LOG_COMMITS + 3 * FAN_IN
    assert found["descriptors"] <= 64 and found["mappings"] <= 64
    assert found["late"] < 3 * found["early"] + 0.5, "seconds of CPU of a run of commits"
    assert found["written"] < 64 * 1024


@pytest.mark.parametrize("in_memory", [False, True])
def test_any_sequence_of_many_commits_leaves_what_a_dictionary_would(tmp_path: Path, in_memory: bool) -> None:
    """Across checkpoints and merges; readers follow by `refresh`, from wherever they are."""
    pick = random.Random(int(in_memory))
    expected: dict[str, str] = {}
    directory = None if in_memory else tmp_path
    with BankStore(FakeModel(), directory) as bank:
        bank.snapshot()
        reader = None if in_memory else BankStore(FakeModel(), tmp_path, read_only=True)
        for number in range(3 * LOG_COMMITS + 5):
            key = f"k{pick.randrange(40)}"
            if pick.random() < 0.3:
                assert bank.delete(key) == (expected.pop(key, None) is not None)
            else:
                expected[key] = f"text {pick.randrange(1000)}" * pick.randint(1, 3)
                bank.upsert(key, expected[key])
            if number % 50 == 49:
                assert texts(bank.snapshot()) == expected
                assert {name: name in bank for name in (f"k{row}" for row in range(41))} == {
                    name: name in expected for name in (f"k{row}" for row in range(41))
                }
                if reader is not None:
                    reader.refresh()
                    assert texts(reader.snapshot()) == expected
                    assert texts(MemoryBank.from_pretrained(tmp_path)) == expected
        assert bank.stat()["segments"] < LOG_COMMITS + 2 * FAN_IN
        assert bank.verify() == []
        bank.compact()
        assert texts(bank.snapshot()) == expected
    if not in_memory:
        with BankStore(FakeModel(), tmp_path) as bank:
            assert texts(bank.snapshot()) == expected and bank.stat()["chunks"] == bank.snapshot().num_chunks


@pytest.mark.parametrize("seed", range(3))
def test_merging_takes_neighbors_and_leaves_few(seed: int) -> None:
    """However large the commits are: a run up to the end, in order, each byte rewritten about once per size."""
    pick = random.Random(seed)
    sizes: list[int] = []
    written = total = 0
    for _ in range(600):
        fresh = [pick.choice([500, 3000, 200_000]) for _ in range(pick.randint(1, 4))]
        sizes, total = sizes + fresh, total + sum(fresh)
        start = merge_start(sizes, len(fresh), 10**7)
        assert start <= len(sizes) - 2 or start == len(sizes)
        if start < len(sizes):
            assert all(size < 10**7 for size in sizes[start:])
            written += sum(sizes[start:])
            sizes[start:] = [sum(sizes[start:])]
    assert sum(sizes) == total and written < 8 * total
    assert len(sizes) < 60


def test_what_was_put_together_is_not_written_again_at_every_checkpoint(tmp_path: Path) -> None:
    """A large file of deletions, and a large segment, stay as they are while small commits follow."""
    with BankStore(FakeModel(), tmp_path) as bank:
        with bank.batch():
            for number in range(3000):
                bank.upsert(f"k{number}", "a text", version=1)
        with bank.batch():
            for number in range(2900):
                bank.delete(f"k{number}", version=2)
        bank.checkpoint()
        large = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 50_000}
        assert len([name for name in large if name.startswith(("deletions", "chunks", "documents"))]) == 3
        for number in range(3 * LOG_COMMITS):
            bank.upsert(f"new{number}", "x", version=1)
            bank.delete(f"new{number}", version=2)
        assert large <= {path.name for path in tmp_path.iterdir()}
        assert len(bank_manifest_msa.read_manifest(tmp_path)["deletions"]) < LOG_COMMITS + 2 * FAN_IN
        assert bank.stat()["remembered_deletions"] == 2900 + 3 * LOG_COMMITS and len(bank) == 100


def test_a_large_segment_is_left_alone() -> None:
    assert merge_start([10**9, 100, 100], 2, 10**9) == 1
    assert merge_start([100, 10**9], 2, 10**9) == 2
    assert merge_start([100], 1, 10**9) == 1 and merge_start([], 0, 10**9) == 0


def test_deleted_keys_are_those_of_a_dictionary() -> None:
    pick, expected = random.Random(0), dict[tuple[int, int], int]()
    keys = DeletedKeys(np.array([[1, 2, 3], [1, 2, 9], [1, 1, 0], [2**64 - 1, 0, 2**62]], np.uint64))
    expected.update({(1, 2): 9, (1, 1): 0, (2**64 - 1, 0): 2**62})
    for _ in range(20):
        more = {(pick.randrange(5), pick.randrange(5)): pick.randrange(50) for _ in range(pick.randrange(4))}
        keys.update(more)
        expected.update({key: max(version, expected.get(key, -1)) for key, version in more.items()})
        assert dict(keys) == expected and len(keys) == len(expected)
        assert all((first, second) in keys for first, second in expected) and (7, 7) not in keys
    keys.forget(20)
    assert dict(keys) == {key: version for key, version in expected.items() if version > 20}


@pytest.mark.parametrize("in_memory", [False, True])
def test_deletions_are_forgotten_up_to_a_watermark(tmp_path: Path, in_memory: bool) -> None:
    directory = None if in_memory else tmp_path
    with BankStore(FakeModel(), directory) as bank:
        for number in range(10):
            bank.upsert(f"k{number}", "text", version=number)
            bank.delete(f"k{number}", version=number + 10)
        bank.upsert("there", "a text", version=3)
        assert bank.stat()["remembered_deletions"] == 10
        assert bank.forget_deletions(14) == 5 and bank.stat()["remembered_deletions"] == 5
        assert not bank.upsert("k2", "late", version=11) and not bank.upsert("k9", "late", version=18)
        assert not bank.upsert("unheard of", "late", version=14) and not bank.delete("there", version=14)
        assert bank.upsert("k2", "new", version=15) and bank.upsert("without a version", "text")
        with pytest.raises(ValueError, match="up to 14 already"):
            bank.forget_deletions(13)
        with pytest.raises(ValueError, match="from 0 to 2"):
            bank.forget_deletions(-1)
        bank.compact()
    if not in_memory:
        with BankStore(FakeModel(), tmp_path) as bank:
            assert bank.stat()["remembered_deletions"] == 5 and not bank.upsert("other", "late", version=14)
            assert set(texts(bank.snapshot())) == {"there", "k2", "without a version"}


# What is wrong --------------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> bytes:
    data = path.read_bytes()
    place = bit // 8 % len(data)
    path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit % 8]) + data[place + 1 :])
    return data


@pytest.mark.parametrize("merged", [True])
def test_presence_is_never_taken_from_damaged_bytes(tmp_path: Path, merged: bool) -> None:
    """Any bit of an index or a table: a key that is there is never said to be absent, nor given to two documents."""
    with filled(tmp_path, 6) as bank:
        if merged:
            bank.checkpoint()
    for path in [*tmp_path.glob("index-*"), *tmp_path.glob("documents-*")]:
        size = 8 * path.stat().st_size
        for bit in (0, 77, size // 2, size - 1, *random.Random(path.name).sample(range(size), 4)):
            before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
            flip(path, bit)
            try:
                with BankStore(FakeModel(), tmp_path, read_only=True) as reader:
                    assert all(f"k{number}" in reader for number in range(6))
            except (BankDamaged, BankFormatError) as error:
                assert path.name in str(error)
            with BankStore(FakeModel(), tmp_path) as bank:
                try:
                    assert bank.delete("k0") is True
                    bank.upsert("k1", "another text")
                except BankDamaged:
                    assert path.name.startswith("documents")
                else:
                    assert path.name.startswith("index")
                    bank.compact()
                    assert bank.verify() == []
                    expected = {f"k{number}": f"text {number}" for number in range(2, 6)}
                    assert texts(bank.snapshot()) == {**expected, "k1": "another text"}
                    with BankStore(None, tmp_path, read_only=True) as reader:
                        assert texts(reader.snapshot()) == texts(bank.snapshot())
            for item in tmp_path.iterdir():
                if item.name not in before:
                    item.unlink()
            for name, data in before.items():
                (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize("command", [False, True])
def test_a_missing_manifest_deletes_nothing_and_is_restored(
    tmp_path: Path, command: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with filled(tmp_path, 4) as bank:
        bank.checkpoint()
        bank.upsert("later", "in the log")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "manifest.json").unlink()
    for refused in (
        lambda: BankStore(FakeModel(), tmp_path),
        lambda: BankStore(None, tmp_path),
        lambda: BankStore(FakeModel(), tmp_path, read_only=True),
        lambda: MemoryBank.from_pretrained(tmp_path),
        lambda: FakeModel().encode_documents(["other"]).save_pretrained(tmp_path),
    ):
        with pytest.raises(BankFormatError, match="msa-hf bank restore"):
            refused()
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == {name: data for name, data in before.items() if name != "manifest.json"} | {".lock": left[".lock"]}
    if command:
        from msa_hf.cli import main

        assert main(["bank", "restore", str(tmp_path)]) == 0
        assert "its manifest was restored" in capsys.readouterr().out
        assert main(["bank", "restore", str(tmp_path)]) != 0
    else:
        restore_manifest(tmp_path)
        with pytest.raises(BankFormatError, match="is intact"):
            restore_manifest(tmp_path)
    with BankStore(FakeModel(), tmp_path) as bank:
        assert set(texts(bank.snapshot())) == {"k0", "k1", "k2", "k3", "later"} and bank.verify() == []


def test_data_files_without_a_manifest_or_its_copy(tmp_path: Path) -> None:
    filled(tmp_path).close()
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / name).unlink()
    names = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(BankFormatError, match=r"is missing, but \d+ data files of a bank are there"):
        BankStore(FakeModel(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(BankFormatError, match="no intact copy"):
        restore_manifest(tmp_path)


def test_a_damaged_manifest_is_restored_from_its_copy(tmp_path: Path) -> None:
    filled(tmp_path).close()
    flip(tmp_path / "manifest.json", 8 * 300)
    with pytest.raises(BankFormatError, match="msa-hf bank restore"):
        BankStore(FakeModel(), tmp_path)
    restore_manifest(tmp_path)
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 3


def test_a_creation_that_was_killed_can_be_begun_again(tmp_path: Path) -> None:
    filled(tmp_path).close()
    for path in tmp_path.iterdir():
        if not path.name.startswith("prefix"):
            path.unlink()
    with filled(tmp_path) as bank:
        assert len(bank) == 3


def alter(directory: Path, generation: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a commit and sign it."""
    path = directory / entry_name(generation)
    entry = json.loads(path.read_text().splitlines()[0])
    change(entry)
    entry["checksum"] = bank_writer_msa.manifest_checksum(entry)
    path.write_text(2 * (json.dumps(entry) + "\n"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(parent="0" * 64), "follows another state"),
        (lambda entry: entry.update(generation=9), "`generation` is 9 instead of 2"),
        (lambda entry: entry.update(format="x"), "not a commit of a bank"),
        (lambda entry: entry.update(format_version=99), "reads up to 3. Upgrade"),
        (lambda entry: entry.update(next_id=0), "`next_id` must lie between"),
        (lambda entry: entry.update(tokens=-1), "`tokens` must lie between"),
        (lambda entry: entry.update(segment=3), "`documents` is missing"),
        (lambda entry: entry["segment"].update(documents=[5, 6]), "`documents` must be"),
        (lambda entry: entry["segment"]["table"].update(file="../x"), "plain name"),
        (lambda entry: entry.update(deletions={"file": "a"}), "`rows` is missing"),
        (lambda entry: entry.pop("segment"), "segment"),
    ],
)
def test_commits_that_lie_are_refused(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    filled(tmp_path).close()
    alter(tmp_path, 2, change)
    for read in (lambda: BankStore(FakeModel(), tmp_path), lambda: MemoryBank.from_pretrained(tmp_path)):
        with pytest.raises(BankFormatError) as caught:
            read()
        assert message in str(caught.value) and str(tmp_path / entry_name(2)) in str(caught.value)


def test_a_commit_survives_one_damaged_place_and_not_two(tmp_path: Path) -> None:
    filled(tmp_path).close()
    path = tmp_path / entry_name(2)
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(b"\0" * half + data[half:])
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 3
        (damage,) = bank.verify()
        assert damage.file == path.name and not damage.documents
        bank.checkpoint()
        assert bank.verify() == []
    filled(tmp_path / "other").close()
    (tmp_path / "other" / entry_name(2)).write_bytes(bytes(len(data)))
    with pytest.raises(BankFormatError, match=entry_name(2)):
        BankStore(FakeModel(), tmp_path / "other")


def test_a_missing_commit_is_told(tmp_path: Path) -> None:
    filled(tmp_path, 4).close()
    (tmp_path / entry_name(2)).unlink()
    names = {path.name for path in tmp_path.iterdir()}
    for read in (lambda: BankStore(FakeModel(), tmp_path), lambda: MemoryBank.from_pretrained(tmp_path)):
        with pytest.raises(BankFormatError, match=f"{entry_name(2)}: is missing, and with it the commits after it"):
            read()
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("compacted", [False, True])
def test_newest_commits_that_are_missing_are_told(
    tmp_path: Path, compacted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """They cannot be told from those that a copy lacks which was made beside a writer: the bank stays usable."""
    with filled(tmp_path, 2) as bank:
        bank.compact() if compacted else None
        before = texts(bank.snapshot())
        last = bank.generation
        bank.upsert("new", "lost", 7)
        bank.upsert("new", "lost as well", 8)
        assert bank.verify() == []
    lost = [tmp_path / entry_name(last + number) for number in (1, 2)]
    doors = {
        "load": lambda: MemoryBank.from_pretrained(tmp_path),
        "read": lambda: BankStore(None, tmp_path, read_only=True).snapshot(),
    }
    for door in doors.values():
        assert texts(door())["new"] == "lost as well" and "was made" not in caplog.text
    for path in lost:
        path.unlink()
    for door in doors.values():
        assert texts(door()) == before
        assert f"commit {last + 2} was made, but the bank ends with commit {last}" in caplog.text
        caplog.clear()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert [item.file for item in bank.verify()] == [lost[0].name] and "was made" in caplog.text
        for version in (7, 8):
            bank.upsert("new", f"again {version}", version)
        assert bank.verify() == []
    caplog.clear()
    assert texts(doors["load"]()) == {**before, "new": "again 8"} and not caplog.text


@pytest.mark.parametrize("lost", ["an older manifest", "the commits"])
def test_files_of_missing_commits_are_not_taken_for_leftovers(tmp_path: Path, lost: str) -> None:
    """Whoever puts back what is missing has all of it again, though a writer came in between and changed nothing."""
    with filled(tmp_path, 2) as bank:
        bank.checkpoint()
        first = bank.generation
        older = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        bank.upsert("new", "lost")
        bank.upsert("newer", "lost as well")
        if lost == "an older manifest":
            bank.checkpoint()
        after = texts(bank.snapshot())
    if lost == "an older manifest":
        taken = {"manifest.json": (tmp_path / "manifest.json").read_bytes()}
        (tmp_path / "manifest.json").write_bytes(older["manifest.json"])
    else:
        paths = [tmp_path / entry_name(first + number) for number in (1, 2)]
        taken = {path.name: path.read_bytes() for path in paths}
        for path in paths:
            path.unlink()
    names = {path.name for path in tmp_path.iterdir()}
    for _ in range(2):
        with BankStore(FakeModel(), tmp_path) as bank:
            assert "new" not in texts(bank.snapshot())
        assert {path.name for path in tmp_path.iterdir()} == names
    for name, content in taken.items():
        (tmp_path / name).write_bytes(content)
    with BankStore(FakeModel(), tmp_path) as bank:
        assert texts(bank.snapshot()) == after and bank.verify() == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_what_cannot_be_read_now_is_no_damage(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(tmp_path) as bank:
        original = bank_files_msa.file_digest

        def failing(path: Path) -> str:
            if path.name.startswith("documents"):
                raise OSError(number, os.strerror(number), str(path))
            return original(path)

        monkeypatch.setattr(bank_files_msa, "file_digest", failing)
        found = bank.verify()
        assert {item.documents for item in found} == {0} and all(item.unreadable for item in found)
        assert len(found) == 3, "it goes on to the end"
        bank.upsert("more", "it can be written to")
        assert len(bank) == 4 and len(texts(bank.snapshot())) == 4
    with pytest.raises(BankUnreadable) as caught:
        BankStore(FakeModel(), tmp_path)
    assert caught.value.errno == number and "no damage" in str(caught.value)
    monkeypatch.undo()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 4 and bank.verify() == []


# Outcomes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        *((moment, error) for moment in ("flush", "load", "checkpoint") for error in ERRORS),
        ("merging", KeyboardInterrupt()),  # other errors cost nothing then: it is tried again at the next commit
    ],
)
def test_after_the_swap_there_is_one_error_and_the_bank_is_intact(
    tmp_path: Path, error: BaseException, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = filled(tmp_path, LOG_COMMITS - 1 if moment in ("checkpoint", "merging") else 3)
    bank.snapshot()
    expected = texts(bank.snapshot())

    def raising(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if moment == "flush":
            sync = bank_writer_msa.sync
            linked: list[bool] = []
            link = os.link
            patch.setattr(os, "link", lambda *names: (link(*names), linked.append(True)))
            patch.setattr(bank_writer_msa, "sync", lambda path: raising() if linked else sync(path))
        elif moment == "load":
            patch.setattr("msa_hf.bank.store.store.manifest_after", raising)
        elif moment == "merging":
            patch.setattr("msa_hf.bank.store.store.write_checkpoint", raising)
        else:
            patch.setattr("msa_hf.bank.store.store.State.merged", raising)
        with pytest.raises(CommitOutcomeUnknown) as caught:
            bank.upsert("new", "a text")
    assert caught.value.__cause__ is error and "Open the bank again" in str(caught.value)
    for refused in (lambda: bank.upsert("x", "y"), lambda: bank.delete("k0"), bank.compact, bank.checkpoint):
        with pytest.raises(BankNotWritable, match="closed"):
            refused()
    with BankStore(FakeModel(), tmp_path) as again:
        assert texts(again.snapshot()) == {**expected, "new": "a text"} and again.verify() == []
        assert not again.upsert("k1", "late", version=1)


def test_a_checkpoint_that_fails_costs_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with filled(tmp_path, LOG_COMMITS - 1) as bank:
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr("msa_hf.bank.store.store.write_checkpoint", full)
            for number in range(3):
                bank.upsert(f"more {number}", "acknowledged")
        assert "could not be put together" in caplog.text and len(bank) == LOG_COMMITS + 2
        bank.upsert("last", "text")
        assert not list(tmp_path.glob("commit-*")) and bank.stat()["segments"] == 1
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == LOG_COMMITS + 3


def test_a_generation_is_committed_once(tmp_path: Path) -> None:
    """Where locks do not work: whoever comes second is told, and changes nothing."""
    filled(tmp_path).close()
    with BankStore(FakeModel(), tmp_path, sole_writer=True) as first:
        second = BankStore(FakeModel(), tmp_path, sole_writer=True)
        first.upsert("first", "was here")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for change in (lambda: second.upsert("second", "too late"), second.compact, second.checkpoint):
            with pytest.raises(BankNotWritable, match="was replaced since it was opened"):
                change()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        second = BankStore(FakeModel(), tmp_path, sole_writer=True)
        first.checkpoint()
        first.upsert("again", "was here")
        with pytest.raises(BankNotWritable, match="was replaced since it was opened"):
            second.upsert("second", "too late")
        assert texts(MemoryBank.from_pretrained(tmp_path)).keys() == {"k0", "k1", "k2", "first", "again"}


def test_two_threads_that_commit_at_once_lose_nothing(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:

        def write(name: str) -> None:
            for number in range(40):
                bank.upsert(f"{name}{number}", "text")

        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(bank) == 80
    assert len(MemoryBank.from_pretrained(tmp_path)) == 80


def test_banks_of_version_2_are_upgraded_at_the_first_write(tmp_path: Path) -> None:
    bank = filled(None, 5).snapshot()
    bank.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 2 and "lineage" not in manifest
    before = copy.deepcopy({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    with BankStore(FakeModel(), tmp_path) as store:
        assert texts(store.snapshot()) == texts(bank)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == {
            **before,
            ".lock": (tmp_path / ".lock").read_bytes(),
        }
        store.delete("k1", version=7)
        assert json.loads((tmp_path / "manifest.json").read_text())["format_version"] == 3
        assert set(texts(store.snapshot())) == {"k0", "k2", "k3", "k4"}
    assert set(texts(MemoryBank.from_pretrained(tmp_path))) == {"k0", "k2", "k3", "k4"}
    filled(None, 2).snapshot().save_pretrained(tmp_path)
    assert set(texts(MemoryBank.from_pretrained(tmp_path))) == {"k0", "k1"}, "replaced, with its log"
    with BankStore(FakeModel(), tmp_path) as store:
        assert len(store) == 2 and not list(tmp_path.glob("commit-*"))


def test_a_lookup_beside_a_writer_moves_on_to_the_last_commit(tmp_path: Path) -> None:
    """That a key is not there is said of a table that was verified; one that a writer has removed cannot be."""
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([{"key": "a", "text": "first"}, {"key": "b", "text": "second"}])
        readers = [BankStore(None, tmp_path, read_only=True) for _ in range(2)]
        bank.delete("b")
        bank.add([{"key": "c", "text": "third"}])
        bank.compact()
        assert "never" not in readers[0] and readers[0].generation == bank.generation
        assert readers[1].get("c") is not None and "b" not in readers[1]
        assert contents(readers[1].snapshot()).keys() == {"a", "c"}
        last = BankStore(None, tmp_path, read_only=True)
        for path in tmp_path.glob("documents-*"):
            path.unlink()
        with pytest.raises(BankDamaged, match="cannot be read"):  # nobody has committed since
            assert "never" not in last


# A writer between two looks of a reader -------------------------------------------------------------------------------


def two_states(tmp_path: Path) -> tuple[Path, str, Path]:
    """A bank with commits behind its manifest, the checksum of what its writer made of it next, and that manifest."""
    home = tmp_path / "bank"
    with filled(home) as store:
        for number in range(4):
            store.add([{"key": f"later {number}", "text": f"text {number}"}])
    (made := tmp_path / "made").mkdir()
    shutil.copytree(home, made, dirs_exist_ok=True)
    with BankStore(FakeModel(), made) as store:
        store.compact()
    following = bank_manifest_msa.read_manifest(made)
    assert following["generation"] > bank_manifest_msa.read_manifest(home)["generation"]
    return home, following["checksum"], made / "manifest.json"


def test_a_manifest_that_is_replaced_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is that of the file that is read, not of the one that was looked at."""
    home, checksum, following = two_states(tmp_path)
    whole = following.read_text()
    assert len(whole) > 100
    (home / "manifest.json").write_text(whole[:100] + "...")  # shorter, and never read
    look = bank_manifest_msa.regular_file

    def replaced(directory: Path, name: str) -> os.stat_result:
        found = look(directory, name)
        if name == "manifest.json":
            os.replace(following, directory / name) if following.exists() else None
        return found

    monkeypatch.setattr(bank_manifest_msa, "regular_file", replaced)
    assert bank_manifest_msa.read_manifest(home)["checksum"] == checksum


@pytest.mark.parametrize("gone", [[-1], [-2, -1], [0]], ids=["last", "last two", "first"])
def test_commits_that_a_writer_removes_while_they_are_listed(
    gone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in its next manifest, which is then read: never an older state than one that could be read before."""
    home, checksum, following = two_states(tmp_path)
    listed = bank_manifest_msa.log_generations

    def partly(directory: Path) -> list[int]:
        found = sorted(listed(directory))
        if following.exists():
            os.replace(following, directory / "manifest.json")
            for place in gone:
                (directory / entry_name(found[place])).unlink()
            found = sorted(listed(directory))
        return found

    monkeypatch.setattr(bank_manifest_msa, "log_generations", partly)
    assert bank_manifest_msa.read_manifest(home)["checksum"] == checksum
