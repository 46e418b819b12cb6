"""What is committed stays: through kills, full disks and flipped bytes; what is deleted goes."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from churn import State, apply, commit, event, serve
from fake_model import CHUNK, LAYERS, FakeModel, contents, vectors
from forking import ended, forked

from msa_hf.bank import BankDamaged, BankNotWritable, BankStore, CommitOutcomeUnknown, ErasureIncomplete
from msa_hf.model import bank_format_msa, bank_log_msa, bank_manifest_msa, bank_writer_msa
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import MemoryBank

resource = pytest.importorskip("resource")
KILLS = 20  # benchmarks/torture_bank.py goes on for longer


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def named(directory: Path) -> set[str]:
    """The files that the manifest accounts for."""
    manifest = bank_manifest_msa.read_manifest(directory)
    data = (entry["file"] for entry in bank_format_msa.data_files(manifest))
    # A bank that changes has a copy of its manifest, and one that took its place.
    changes = "lineage" in manifest or (directory / "manifest.backup.json").exists()
    copy = {"manifest.backup.json"} if changes else set()
    return {"manifest.json", ".lock", *copy, *data, *bank_log_msa.entry_names(manifest)}


def texts(bank: MemoryBank) -> dict[str, str]:
    return {key: text for key, (text, *_) in contents(bank).items()}


def living(state: State) -> dict[str, str]:
    return {key: text for key, (_, text) in state.items() if text is not None}


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: a kill needs no disk, and flushing one takes most of a commit's time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_killed_writer_loses_nothing_it_acknowledged(fast_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kills at random moments: the bank is what it was after the last acknowledged event, or one later."""
    pick = random.Random(0)
    bank_directory = fast_directory / "bank"
    state: State = {}
    number = repaired = in_flight = 0
    span = 0.08  # seconds until a kill, at most
    (told, to), (said, out) = os.pipe(), os.pipe()
    server = forked(serve, [told, out, 2])
    os.close(told)
    os.close(out)
    with open(to, "w", buffering=1) as lines, open(said) as acks:
        caplog.set_level(logging.WARNING)
        for kill in range(5 * KILLS):
            if kill >= KILLS and repaired > 0 and in_flight > 0:
                break  # they have hit commits
            print(bank_directory, number, file=lines)
            child = int(acks.readline().split()[1])
            time.sleep(pick.uniform(0, span))
            os.kill(child, signal.SIGKILL)
            before = number
            while (line := acks.readline().split())[0] == "ack":
                assert int(line[1]) == number
                state, number = apply(state, event(number)), number + 1
            span *= 1.15 if number == before else 0.95  # as long as a few commits take, also where the machine is busy
            caplog.clear()
            with BankStore(FakeModel(), bank_directory) as bank:
                found = texts(bank.snapshot())
                later = apply(state, event(number))
                if found != living(state):
                    assert found == living(later), "half an event, or an acknowledged one is missing"
                    state, number, in_flight = later, number + 1, in_flight + 1
                assert bank.verify() == []
                repaired += "removed" in caplog.text
            assert set(files_of(bank_directory)) == named(bank_directory)
    assert ended(server) == [0]
    assert number > KILLS // 4 and repaired > 0 and in_flight > 0, "the kills must have hit commits"


def test_what_a_library_leaves_of_its_own_is_removed_too(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """safetensors writes to a file with a name of its own choice, beside the one it was asked for."""
    with BankStore(FakeModel(), fast_directory) as bank:
        bank.add([{"key": "kept", "text": "as it was"}])

    def killed(tensors: object, path: Path) -> None:
        Path(path).with_name(".tmpDGdub1").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(bank_writer_msa, "save_file", killed)
        monkeypatch.setattr(bank_writer_msa, "SMALL_TENSORS", 0)
        try:
            with BankStore(FakeModel(), fast_directory) as bank:
                bank.add([{"key": "new", "text": "never acknowledged"}])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with BankStore(FakeModel(), fast_directory) as bank:
        assert texts(bank.snapshot()) == {"kept": "as it was"}
    assert "removed 1 files of an interrupted write" in caplog.text
    assert set(files_of(fast_directory)) == named(fast_directory)


# --- errors -----------------------------------------------------------------------------------------------------------

WRITES: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (os, "link"),
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "touch"),
    (bank_writer_msa, "save_file"),
]


def fail_at(monkeypatch: pytest.MonkeyPatch, place: int, half: bool) -> Callable[[], int]:
    """Make the `place`-th write, flush or rename fail, `half`: after it was done; returns a counter of calls."""
    calls = 0

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == place and not half:
                raise OSError(errno.ENOSPC, "No space left on device")
            result = original(*arguments, **options)
            if calls == place:
                raise OSError(errno.EIO, "Input/output error")
            return result

        monkeypatch.setattr(owner, name, failing)

    for owner, name in WRITES:
        wrap(owner, name)
    return lambda: calls


def changes(bank: BankStore) -> None:
    with bank.batch():
        bank.add([{"key": "new", "text": "something new"}, {"key": "more", "text": "and more"}])
        bank.upsert("kept", "changed text", 5)
        bank.delete("gone", 6)


BEFORE = {"kept": "as it was", "gone": "to be deleted", "still": "untouched"}
AFTER = {"kept": "changed text", "new": "something new", "more": "and more", "still": "untouched"}


def prepared(directory: Path) -> BankStore:
    bank = BankStore(FakeModel(), directory)
    bank.add([{"key": key, "text": text, "version": 1} for key, text in BEFORE.items()])
    bank.snapshot()  # with tensors in memory, which must stay in step
    return bank


@pytest.mark.parametrize(("half", "compacting"), [(True, False), (False, True)])
def test_an_error_at_any_write_leaves_the_last_commit(
    tmp_path: Path, half: bool, compacting: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = 0
    monkeypatch.setattr(bank_writer_msa, "SMALL_TENSORS", 1000)  # so that files are written in both ways
    for place in range(1, 100):
        directory = tmp_path / str(place)
        with prepared(directory) as bank:
            before, after = BEFORE, AFTER
            if compacting:
                changes(bank)
                before = AFTER
            action = bank.compact if compacting else (lambda bank=bank: changes(bank))
            with pytest.MonkeyPatch.context() as patch:
                calls = fail_at(patch, place, half)
                try:
                    action()
                except OSError:
                    found = before
                    assert texts(bank.snapshot()) == before, "nothing has changed"
                    assert set(files_of(directory)) <= named(directory), "nothing of the failed commit is left"
                except ErasureIncomplete:
                    found = before
                    assert bank.compact() is False or texts(bank.snapshot()) == before
                except CommitOutcomeUnknown:
                    with pytest.raises(BankNotWritable, match="closed"):
                        bank.upsert("further", "by an object that must be opened again")
                    bank = BankStore(FakeModel(), directory)
                    found, unknown = texts(bank.snapshot()), unknown + 1
                    assert found in (before, after) and set(files_of(directory)) == named(directory)
                else:
                    found = after if not compacting else before
                    if calls() < place:
                        break
                    assert "no copy of the manifest could be kept" in caplog.text
            assert texts(MemoryBank.from_pretrained(directory)) == found
            if found == before and not compacting:
                changes(bank)
            bank.upsert("further", "after the error")
            after = {**after, "further": "after the error"}
            assert texts(bank.snapshot()) == after
            bank.close()
        with BankStore(FakeModel(), directory) as bank:
            assert texts(bank.snapshot()) == after and bank.verify() == []
    assert place > 15 and unknown > 0


@pytest.mark.parametrize("limit", [0, 1, 100, 500, 1000, 2000])
def test_a_full_disk_leaves_the_last_commit(tmp_path: Path, limit: int) -> None:
    """Files cannot grow beyond a limit, whoever writes them."""
    with prepared(tmp_path) as bank:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(Exception, match=r"(?i)file too large|os error 27|errno 27"):
                changes(bank)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert texts(bank.snapshot()) == BEFORE and set(files_of(tmp_path)) <= named(tmp_path)
        changes(bank)
        assert texts(MemoryBank.from_pretrained(tmp_path)) == AFTER


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A bank of several segments and shards, with deletions."""
    directory = tmp_path / "mixed"
    expected = {f"k{row}": f"document {row} " + "y" * row for row in range(12)}
    with BankStore(FakeModel(), directory, max_shard_size=1000) as bank:
        for first in range(0, 12, 4):
            bank.add([{"key": key, "text": text} for key, text in list(expected.items())[first : first + 4]])
        for key in ("k1", "k6"):
            bank.delete(key, 9)
            del expected[key]
        bank.upsert("k2", "another text", 3)
        expected["k2"] = "another text"
    yield directory, expected


def test_verify_finds_any_flipped_byte_and_the_rest_stays_usable(
    mixed: tuple[Path, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    directory, expected = mixed
    pick = random.Random(4)
    left_out = 0
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        if path.name in (".lock", "manifest.json"):
            continue
        for position in {0, 8, len(data) // 2, len(data) - 1, *(pick.randrange(len(data)) for _ in range(2))}:
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << pick.randrange(8)]) + data[position + 1 :])
            with BankStore(FakeModel(), directory, read_only=True) as bank:
                caplog.clear()
                (damage,) = bank.verify()
                assert damage.file == path.name
                assert bank.verify() == [damage], "it stays known"
                lost = len(expected) - len(bank)
                found = texts(bank.snapshot())
                assert found.items() <= expected.items() and len(found) == len(bank)
                known = {key for key in damage.keys if key is not None}
                assert damage.documents == lost and (None in damage.keys or expected.keys() - found.keys() == known)
                assert (lost > 0) >= path.name.startswith("documents")
                assert caplog.text.count(path.name) <= 1, "it is said once"
                left_out += lost
        path.write_bytes(data)
    assert left_out
    with BankStore(FakeModel(), directory, read_only=True) as bank:
        assert bank.verify() == [] and texts(bank.snapshot()) == expected


def test_compaction_does_not_pass_damage_on(mixed: tuple[Path, dict[str, str]]) -> None:
    """A damaged file that it copies would otherwise get a new checksum, which is right."""
    directory, expected = mixed
    path = max(directory.glob("chunks-*"))
    data = path.read_bytes()
    with BankStore(FakeModel(), directory) as bank:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        before = {file.name: file.read_bytes() for file in directory.iterdir()}
        with pytest.raises(BankDamaged, match=path.name):
            bank.compact()
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
        assert len(bank) < len(expected)
    path.write_bytes(data)
    with BankStore(FakeModel(), directory) as bank:
        assert bank.compact() and texts(bank.snapshot()) == expected and bank.verify() == []


def test_a_damaged_manifest_is_found(mixed: tuple[Path, dict[str, str]]) -> None:
    directory, expected = mixed
    with BankStore(FakeModel(), directory, read_only=True) as bank:
        path = directory / "manifest.json"
        data = path.read_bytes()
        place = data.index(b'"generation"') + 3
        path.write_bytes(data[:place] + b"X" + data[place + 1 :])
        (damage,) = bank.verify()
        assert damage.file == "manifest.json" and set(expected) <= set(damage.keys)
        assert texts(bank.snapshot()) == expected, "what is open stays usable"


@pytest.mark.parametrize("kind", ["chunks", "documents"])
def test_a_damaged_bank_is_written_to_only_after_a_decision(mixed: tuple[Path, dict[str, str]], kind: str) -> None:
    directory, expected = mixed
    path = next(path for path in sorted(directory.iterdir()) if path.name.startswith(kind))
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")  # the wrong size: seen when it is opened
    with BankStore(FakeModel(), directory) as bank:
        found = texts(bank.snapshot())
        lost = len(expected) - len(found)
        assert lost > 0 and found.items() <= expected.items()
        with pytest.raises(BankDamaged, match=f"{lost} documents are in damaged files .*{path.name}"):
            bank.upsert("new", "text")
        assert bank.discard_damaged() == lost
        bank.upsert("new", "text")
        bank.compact()
        assert bank.verify() == [] and not path.exists()
    assert texts(MemoryBank.from_pretrained(directory)) == {**found, "new": "text"}


def test_what_can_be_done_without_is_made_anew(mixed: tuple[Path, dict[str, str]]) -> None:
    directory, expected = mixed
    for path in directory.iterdir():
        if path.name.startswith(("index", "prefix")):
            path.write_bytes(path.read_bytes() + b"x")
    with BankStore(FakeModel(), directory) as bank:
        assert texts(bank.snapshot()) == expected
        bank.upsert("k3", "found by its key")
        assert bank.compact() and bank.verify() == []
    assert texts(MemoryBank.from_pretrained(directory)) == {**expected, "k3": "found by its key"}


def test_deletions_survive_one_damaged_place_and_not_two(mixed: tuple[Path, dict[str, str]]) -> None:
    directory, expected = mixed
    path = next(path for path in directory.iterdir() if path.name.startswith("deletions"))
    data = path.read_bytes()
    path.write_bytes(b"\0" * (len(data) // 2) + data[len(data) // 2 :])
    with BankStore(FakeModel(), directory, read_only=True) as bank:
        assert texts(bank.snapshot()) == expected
    path.write_bytes(bytes(len(data)))
    with pytest.raises(BankFormatError, match=f"{path.name}.*damaged in both of its copies"):
        BankStore(FakeModel(), directory, read_only=True)


# --- erasure ----------------------------------------------------------------------------------------------------------


def test_after_compacting_no_file_holds_anything_of_a_deleted_document(tmp_path: Path) -> None:
    secret = {"key": "kept secret", "text": "the password is swordfish", "owner": "Ahab of Nantucket"}
    traces = [text.encode() for text in (secret["text"], secret["owner"], secret["key"])]

    def tensors(text: str) -> list[bytes]:
        memory = vectors(text, -(-len(text) // CHUNK))
        rows = [part for layer in LAYERS for part in (memory[layer].routing_keys, memory[layer].pooled_kv)]
        return [row.numpy().tobytes() for part in rows for row in part]

    replaced = "an earlier text of another document"
    traces += [*tensors(secret["text"]), replaced.encode(), *tensors(replaced)]

    def found() -> int:
        everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        return sum(any(trace in data for data in everything) for trace in traces)

    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add([{"key": "a", "text": "first"}, secret, {"key": "b", "text": replaced}])
        assert found() == len(traces), "this test can find them"
        old = bank.snapshot()
        bank.delete("kept secret", 8)
        bank.upsert("b", "a later text")
        bank.compact()
        assert found() == 0
        assert texts(old)["kept secret"] == secret["text"], "a snapshot keeps what it had"
        assert bank.upsert("kept secret", "late", 7) is False, "yet the deletion is known"
        bank.add([secret])
        names = set(files_of(tmp_path))
        copy = tmp_path.parent / "copy"
        shutil.copytree(tmp_path, copy)
        bank.delete("kept secret")
        bank.compact()
    # As a writer leaves them that was killed before it had tidied up, or while it wrote.
    for name in names - set(files_of(tmp_path)):
        shutil.copy(copy / name, tmp_path / name)
    (tmp_path / f".documents-0000000000-{'a' * 32}.tmp").write_bytes(secret["text"].encode())
    assert found() > 0
    BankStore(FakeModel(), tmp_path).close()
    assert found() == 0


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("README.md").write_text("mine")
    tmp_path.joinpath("model-00001-0123456789abcdef.safetensors").write_text("mine")
    with BankStore(FakeModel(), tmp_path) as bank:
        bank.add(["one"])
        bank.compact()
    BankStore(FakeModel(), tmp_path).close()
    assert {"README.md", "model-00001-0123456789abcdef.safetensors"} <= set(files_of(tmp_path))


def test_events_of_the_churn_exercise_everything() -> None:
    """The kill test proves something only if its events delete, repeat and compact."""
    state: State = {}
    late = compactions = 0
    for number in range(300):
        compactions += not event(number)
        late += sum(version <= state.get(key, (-1, None))[0] for key, _, version in event(number))
        state = apply(state, event(number))
    assert late > 20 and compactions > 20 and 2 < len(living(state)) < 8
    bank = BankStore(FakeModel())
    for number in range(60):
        commit(bank, event(number))
    assert bank.stat()["generation"] > 40


def test_a_committed_manifest_is_flushed_after_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file is flushed")
    events: list[tuple[str, str]] = []
    fsync = os.fsync

    def record_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("flush", "directory" if path == tmp_path else path.name))
        fsync(descriptor)

    def recorder(original: Callable[..., None]) -> Callable[[Path, Path], None]:
        def record(source: Path, target: Path) -> None:
            events.append(("rename", target.name if ("flush", source.name) in events else "unflushed"))
            original(source, target)

        return record

    with BankStore(FakeModel(), tmp_path) as bank:
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "replace", recorder(os.replace))
        monkeypatch.setattr(os, "link", recorder(os.link))
        for action, name in (
            (lambda: bank.add(["one", "two"]), "commit-0000000001.json"),
            (lambda: bank.delete("0", 1), "commit-0000000002.json"),
            (bank.compact, "manifest.json"),
        ):
            events.clear()
            action()
            assert ("rename", "unflushed") not in events
            place = events.index(("rename", name))
            assert events[place - 1] == events[place + 1] == ("flush", "directory")
            assert all(kind == "flush" for kind, what in events[place + 1 :] if what != "manifest.backup.json")
    renamed = json.loads((tmp_path / "manifest.json").read_text())
    assert renamed["generation"] == 3 and torch.is_tensor(BankStore(FakeModel(), tmp_path).snapshot().offsets)
