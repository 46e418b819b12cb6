"""One writer at a time: who holds a bank, and when it lets go."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_model import FakeModel, contents

from msa_hf.bank import BankLocked, BankNotWritable, BankStore, BankUnreadable
from msa_hf.cli.command_line import main
from msa_hf.model import bank_lock_msa
from msa_hf.model.bank_lock_msa import WriterLock, file_system
from msa_hf.model.bank_writer_msa import BankWriter
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.retrieval import keep_indexes


# What writes to a bank's directory, apart from `msa-hf encode` (test_encode_bank.py).
def open_store(directory: Path, **options: Any) -> None:
    BankStore(FakeModel(), directory, **options).close()


def save_bank(directory: Path, **options: Any) -> None:
    FakeModel().encode_documents([{"text": "saved"}]).save_pretrained(directory, **options)


def add_index(directory: Path, **options: Any) -> None:
    pytest.importorskip("tantivy")
    keep_indexes(directory, lexical=True, **options)


WRITERS: dict[str, Callable[..., None]] = {"open": open_store, "save": save_bank, "index": add_index}


def small_bank(directory: Path) -> Path:
    with BankStore(FakeModel(), directory) as bank:
        bank.add(["a text"])
    return directory


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.name != ".lock" and path.is_file())
    return {path.name: path.read_bytes() for path in found}


# Who holds it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_refused_while_a_bank_is_open_for_writing(tmp_path: Path, writer: str) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["a text"])
        before = files(tmp_path)
        with pytest.raises(BankLocked, match=rf"open for writing in process {os.getpid()} on "):
            WRITERS[writer](tmp_path)
        assert files(tmp_path) == before
        bank.add(["another"])
    WRITERS[writer](tmp_path)
    with WriterLock(tmp_path):  # given back
        pass


def test_a_bank_is_not_opened_to_write_while_one_is_saved_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_bank(tmp_path)
    refused = []
    commit = BankWriter.commit

    def tried(writer: BankWriter, manifest: Any) -> None:
        for name in ("open", "save"):
            with pytest.raises(BankLocked):
                WRITERS[name](tmp_path)
            refused.append(name)
        commit(writer, manifest)

    monkeypatch.setattr(BankWriter, "commit", tried)
    FakeModel().encode_documents([{"text": "saved"}]).save_pretrained(tmp_path)
    assert refused == ["open", "save"]
    assert [document.text for document in MemoryBank.from_pretrained(tmp_path).documents] == ["saved"]


def test_the_lock_is_given_back_when_saving_fails(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("no manifest")
    for _ in range(2):
        with pytest.raises(ValueError, match="not overwritten"):
            WRITERS["save"](tmp_path)
    assert (tmp_path / "manifest.json").read_text() == "no manifest"


# Files that are no lock -----------------------------------------------------------------------------------------------


def made_symlink(lock: Path, outside: Path) -> None:
    lock.symlink_to(outside)


def made_dangling(lock: Path, outside: Path) -> None:
    lock.symlink_to(outside.with_name("nowhere"))


def made_hard_link(lock: Path, outside: Path) -> None:
    lock.hardlink_to(outside)


def made_pipe(lock: Path, outside: Path) -> None:
    os.mkfifo(lock)


def made_directory(lock: Path, outside: Path) -> None:
    lock.mkdir()


def made_socket(lock: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(lock.parent)  # paths of sockets are short
        listening.bind(lock.name)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "make, words",
    [
        (made_symlink, "is a symbolic link and no file"),
        (made_dangling, "is a symbolic link and no file"),
        (made_hard_link, r"has 2 names \(hard links\)"),
        (made_pipe, "is a pipe and no file"),
        (made_directory, "is a directory and no file"),
        (made_socket, "is a socket and no file"),
    ],
)
def test_what_is_no_plain_file_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, make: Callable[[Path, Path], None], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    bank, outside = small_bank(tmp_path / "bank"), tmp_path / "outside"
    outside.write_text("keep this")
    (bank / ".lock").unlink()
    make(bank / ".lock", outside)
    before = files(bank)
    with pytest.raises(BankNotWritable, match=rf"bank/\.lock {words}.*[Rr]emove it"):
        WRITERS[writer](bank)
    assert outside.read_text() == "keep this" and files(bank) == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("swap", ["replaced", "removed", "linked", "became a link"])
def test_a_lock_file_that_changes_while_it_is_locked_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str
) -> None:
    bank = small_bank(tmp_path / "bank")
    lock, aside = bank / ".lock", tmp_path / "aside"
    lock.write_text("not ours")
    flock = fcntl.flock

    def swapped(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if swap == "linked":
            aside.hardlink_to(lock)
            return
        lock.rename(aside)
        if swap == "replaced":
            lock.write_text("not ours either")
        elif swap == "became a link":
            lock.symlink_to(aside)

    monkeypatch.setattr(fcntl, "flock", swapped)
    with pytest.raises(BankNotWritable, match=r"\.lock (was removed|was replaced|has 2 names)"):
        BankStore(FakeModel(), bank)
    assert aside.read_text() == "not ours"
    assert swap != "replaced" or lock.read_text() == "not ours either"


@pytest.mark.parametrize("make", [made_symlink, made_hard_link, made_pipe])
def test_a_lock_file_that_changes_before_it_is_opened_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, Path], None]
) -> None:
    bank, outside, lstat = small_bank(tmp_path / "bank"), tmp_path / "outside", Path.lstat
    outside.write_text("keep this")

    def changing(path: Path) -> os.stat_result:
        found = lstat(path)
        if path.name == ".lock":
            path.unlink()
            make(path, outside)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", changing)
        patch.setattr(fcntl, "flock", lambda *_: pytest.fail("it is not locked"))
        with pytest.raises(BankNotWritable, match=r"remove it"):
            BankStore(FakeModel(), bank)
    assert outside.read_text() == "keep this"


def test_a_lock_file_that_gets_a_second_name_is_not_written_to_at_the_end(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    (tmp_path / "second").hardlink_to(tmp_path / ".lock")
    held = (tmp_path / "second").read_text()
    with pytest.raises(BankNotWritable, match="has 2 names"):
        lock.check()
    lock.release()
    assert (tmp_path / "second").read_text() == held != ""


# Directly before a commit ---------------------------------------------------------------------------------------------


def test_a_lock_is_checked_again(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    for _ in range(3):
        lock.check()
    (tmp_path / ".lock").unlink()
    with pytest.raises(BankNotWritable, match=r"was removed since the bank was opened.*another writer may"):
        lock.check()
    with WriterLock(tmp_path) as other:
        with pytest.raises(BankNotWritable, match="was replaced since"):
            lock.check()
        other.check()
    lock.release()
    with pytest.raises(BankNotWritable, match="was given back"):
        lock.check()
    assert not lock.held
    lock.release()  # once more does no harm


def test_a_lock_that_was_lost_is_noticed(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    assert lock._descriptor is not None
    fcntl.flock(lock._descriptor, fcntl.LOCK_UN)  # as a server of files may after it was started again
    with WriterLock(tmp_path), pytest.raises(BankNotWritable, match="is no longer locked by this process"):
        lock.check()
    lock.release()


def test_a_bank_whose_lock_file_was_removed_is_not_written_to(tmp_path: Path) -> None:
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one"])
        (tmp_path / ".lock").unlink()
        with BankStore(FakeModel(), tmp_path) as other:
            with pytest.raises(BankNotWritable, match="was replaced since"):
                bank.add(["two"])
            other.add(["three"])
    assert [document.text for document in MemoryBank.from_pretrained(tmp_path).documents] == ["one", "three"]


def test_a_bank_is_not_saved_once_the_lock_file_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_bank(tmp_path)
    before, segment = files(tmp_path), BankWriter.segment

    def removing(*arguments: Any) -> Any:
        (tmp_path / ".lock").unlink()
        return segment(*arguments)

    monkeypatch.setattr(BankWriter, "segment", removing)
    with pytest.raises(BankNotWritable, match="was removed since"):
        save_bank(tmp_path)
    assert files(tmp_path) == before


# File systems without locks -------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    asked = []

    def refusing(descriptor: int, operation: int) -> None:
        asked.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    return asked


@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_system_without_locks_is_named_and_needs_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, number: str
) -> None:
    bank = small_bank(tmp_path / "bank")
    before = files(bank)
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {tmp_path} rw shared:1 - nfs4 server:/x rw\n")
    monkeypatch.setattr(bank_lock_msa, "MOUNTS", mounts)
    asked = refuse(monkeypatch, getattr(errno, number))
    said = rf"bank lies on a file system of the type 'nfs4', mounted at {tmp_path}, which gives no locks.*sole_writer"
    with pytest.raises(BankNotWritable, match=said):
        WRITERS[writer](bank)
    assert files(bank) == before and len(asked) == 1
    WRITERS[writer](bank, sole_writer=True)
    assert len(asked) == 1
    assert files(bank) != before or writer == "open"


def test_other_errors_of_locking_are_told_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError) as raised:
        BankStore(FakeModel(), tmp_path)
    assert raised.value.errno == errno.EIO


def test_a_sole_writer_writes_and_is_forked_and_closed_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.ENOSYS)
    bank = BankStore(FakeModel(), tmp_path, sole_writer=True)
    bank.add(["one", "two"])
    if (child := os.fork()) == 0:
        try:
            bank.add(["three"])
        except BankNotWritable:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    bank.delete("0")
    assert bank.compact()
    bank.close()
    with pytest.raises(BankNotWritable, match="closed"):
        bank.add(["four"])
    assert not (tmp_path / ".lock").exists()
    with BankStore(None, tmp_path, read_only=True) as reader:
        assert len(reader) == 1


def test_commands_take_the_word_of_a_sole_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = small_bank(tmp_path / "bank")
    refuse(monkeypatch, errno.ENOLCK)
    commands = {
        "delete": ["bank", "delete", str(bank), "0"],
        "compact": ["bank", "compact", str(bank)],
        **({"index": ["bank", "index", str(bank), "--lexical"]} if find_spec("tantivy") else {}),
        "verify": ["bank", "verify", str(bank), "--discard-damaged"],
    }
    for command in commands.values():
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "gives no locks" in error and "--sole-writer" in error and error.count("\n") == 1
        assert main([*command, "--sole-writer"]) == 0
        capsys.readouterr()
    with BankStore(None, bank, read_only=True) as reader:
        assert len(reader) == 0 and reader.stat()["deleted"] == 0


def test_a_manifest_is_restored_by_who_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = small_bank(tmp_path / "bank")
    (bank / "manifest.json").unlink()
    with WriterLock(bank):
        assert main(["bank", "restore", str(bank)]) == 2
        error = capsys.readouterr().err
        assert "is open for writing in process" in error and error.count("\n") == 1
    refuse(monkeypatch, errno.ENOSYS)
    assert main(["bank", "restore", str(bank)]) == 2
    assert "gives no locks" in capsys.readouterr().err
    assert main(["bank", "restore", str(bank), "--sole-writer"]) == 0
    assert [document.text for document in MemoryBank.from_pretrained(bank).documents] == ["a text"]


def test_the_file_system_of_a_path_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(bank_lock_msa, "MOUNTS", mounts)
    assert file_system(tmp_path) == "a file system of a kind that is not known"
    lines = [
        "22 1 0:21 / / rw - ext4 /dev/vda rw",
        "23 22 0:22 / /data rw - xfs /dev/vdb rw",
        "24 22 0:23 / /data rw master:3 shared:7 - fuse.s3fs s3fs rw",  # over the one before
        r"25 24 0:24 / /data/my\040disk rw - nfs4 server:/x - y rw",
        "26 22 0:25 / /dat rw - tmpfs none rw",
        "broken",
    ]
    mounts.write_text("\n".join(lines))
    for path, kind, mount in [
        ("/home/x", "ext4", "/"),
        ("/database", "ext4", "/"),
        ("/data/bank", "fuse.s3fs", "/data"),
        ("/data/my disk/bank", "nfs4", "/data/my disk"),
        ("/data/my disk 2/bank", "fuse.s3fs", "/data"),
        ("/dat/bank", "tmpfs", "/dat"),
    ]:
        assert file_system(Path(path)) == f"a file system of the type {kind!r}, mounted at {mount}"


# Closing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["upsert", "compact"])
def test_closing_waits_for_the_commit_of_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    bank = BankStore(FakeModel(), tmp_path)
    for text in ("first", "second"):
        bank.upsert(text, text)
    inside, go_on = threading.Event(), threading.Event()
    name = "append" if task == "upsert" else "commit"
    commit = getattr(BankWriter, name)

    def waiting(writer: BankWriter, what: object) -> None:
        inside.set()
        assert go_on.wait(10)
        commit(writer, what)

    monkeypatch.setattr(BankWriter, name, waiting)
    writing = threading.Thread(target=lambda: bank.upsert("third", "third") if task == "upsert" else bank.compact())
    closing = threading.Thread(target=bank.close)
    writing.start()
    assert inside.wait(10)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    with pytest.raises(BankLocked):
        BankStore(FakeModel(), tmp_path)
    go_on.set()
    writing.join(10)
    closing.join(10)
    assert not writing.is_alive() and not closing.is_alive()
    monkeypatch.undo()
    with BankStore(FakeModel(), tmp_path) as after:
        expected = {"first", "second", "third"} if task == "upsert" else {"first", "second"}
        assert set(contents(after.snapshot())) == expected


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_batch_is_not_closed_from_inside(tmp_path: Path, on_disk: bool) -> None:
    with BankStore(FakeModel(), tmp_path if on_disk else None) as bank:
        with bank.batch():
            bank.upsert("a", "text")
            with pytest.raises(RuntimeError, match="leave the batch first"):
                bank.close()
            bank.upsert("b", "more")
        assert set(contents(bank.snapshot())) == {"a", "b"}


def test_a_forked_process_closes_though_a_thread_was_writing(tmp_path: Path) -> None:
    bank = BankStore(FakeModel(), tmp_path)
    inside, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with bank.batch():
            inside.set()
            go_on.wait(10)

    writing = threading.Thread(target=write)
    writing.start()
    assert inside.wait(10)
    if (child := os.fork()) == 0:
        bank.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    writing.join(10)
    with pytest.raises(BankLocked):
        BankStore(FakeModel(), tmp_path)
    bank.close()


# A disk that fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fstat", "ftruncate", "close"])
def test_a_failing_disk_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """What cannot be noted when the lock is given back hides no error, and the next writer comes in."""
    bank = BankStore(FakeModel(), tmp_path)
    bank.add(["a text"])
    original = getattr(os, call)

    def failing(*arguments: Any) -> Any:
        if call == "close":
            original(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        bank.close()
    with BankStore(FakeModel(), tmp_path) as bank:
        assert len(bank) == 1


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_manifest_that_cannot_be_looked_at_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    small_bank(tmp_path)
    before, original = files(tmp_path), os.lstat

    def failing(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("manifest.json"):
            raise OSError(error, os.strerror(error))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "lstat", failing)
    for read_only in (False, True):
        with pytest.raises(BankUnreadable, match=r"manifest.json.*no damage"):
            BankStore(FakeModel(), tmp_path, read_only=read_only)
    monkeypatch.undo()
    assert files(tmp_path) == before


def test_a_leftover_that_cannot_be_removed_does_not_undo_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.unlink

    def failing(path: Any, **options: Any) -> None:
        if Path(path).name.startswith(".manifest"):
            raise OSError(errno.EIO, "Input/output error")
        original(path, **options)

    monkeypatch.setattr(os, "unlink", failing)
    save_bank(tmp_path)
    assert contents(MemoryBank.from_pretrained(tmp_path)).keys() == {"0"}
