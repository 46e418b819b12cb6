"""A bank of a stranger, format version 2: whatever its manifest and files say, it is refused or read within itself."""

import copy
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_files import make_bank, sign, tampered
from fake_model import FakeModel, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msa_hf.bank import BankDamaged, BankStore
from msa_hf.model import bank_files_msa, bank_format_msa, bank_manifest_msa, bank_writer_msa
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import MemoryBank

ROWS = 6


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("original")
    with BankStore(FakeModel(), directory, max_shard_size=600) as bank:
        bank.add([{"key": f"k{row}", "text": f"text {row} " + "z" * row, "n": row} for row in range(4)])
        bank.delete("k1", 3)
        bank.upsert("k2", "another text", 2)
        bank.upsert("new", "one more")
        bank.checkpoint()  # in the manifest, not in the log
    return directory, bank_manifest_msa.read_manifest(directory)


@pytest.fixture
def bank_copy(original: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "bank"))


opened: list[str] = []
watching = False


def _audit(event: str, arguments: Any) -> None:
    if watching and event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(_audit)


def use(directory: Path, verify: bool) -> None:
    """Read a bank in every way; nothing but refusals may come of it, and no file outside of it may be opened."""
    global watching
    opened.clear()
    watching = True
    try:
        for read in (lambda: MemoryBank.from_pretrained(directory, verify=verify), lambda: opened_bank(directory)):
            try:
                bank = read()
                assert len(bank) <= ROWS and bank.offsets[-1] <= 100
                for document in bank.documents:
                    with suppress(KeyError):  # an index that lies finds nothing
                        bank.documents.position(document.key)
                bank.documents.ids()
            except (BankFormatError, BankDamaged):
                pass
            except ValueError as error:
                assert "not made with this model" in str(error)
    finally:
        watching = False
    outside = [path for path in opened if not Path(path).is_relative_to(directory) and "/msa_" not in path]
    assert not [path for path in outside if path.endswith((".json", ".bin", ".arrow", ".safetensors", "passwd"))]


def opened_bank(directory: Path) -> MemoryBank:
    bank = BankStore(FakeModel(), directory, read_only=True)
    bank.get("k2")
    return bank.snapshot()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_manifests(bank_copy: Path, original: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    sign(bank_copy, tampered(original[1], data))
    use(bank_copy, data.draw(st.booleans()))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files(bank_copy: Path, original: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    """Bytes of any file changed, at its size, with hashes that agree: tables and indices that lie."""
    manifest = copy.deepcopy(original[1])
    entry = data.draw(st.sampled_from(bank_format_msa.data_files(manifest)))
    path = bank_copy / entry["file"]
    before = path.read_bytes()
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        fresh = data.draw(st.sampled_from([b"\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\x80", b"\1\0\0\0"]))
        content[place : place + len(fresh)] = fresh[: len(content) - place]
    path.write_bytes(content)
    entry["sha256"] = bank_files_msa.file_digest(path)
    sign(bank_copy, manifest)
    try:
        use(bank_copy, data.draw(st.booleans()))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("next_id",), -1, "`next_id` must lie between 0"),
        (("next_id",), 2, "ids of documents are not distinct numbers below `next_id`"),
        (("generation",), "1", "`generation` must be of type int"),
        (("deletions", 0, "rows"), 10**15, "deletions[0].`bytes` is"),
        (("deletions", 0, "keys"), 0, "deletions[0].`bytes` is"),
        (("deletions", 0, "file"), "../x", "plain name"),
        (("deletions",), None, "`deletions` must be of type list"),
        (("segments", 0, "index", "bytes"), 24, "segments[0].index.`bytes` is 24 instead of"),
        (("segments", 0, "index", "file"), "/etc/passwd", "plain name"),
        (("segments", 0, "index"), 3, "`index` must be of type dict"),
        (("segments", 0, "tensors", 0, "chunks"), [0, 2**60], "`chunks` must be"),
        (("segments", 0, "tensors", 0), 3, "`layer` is missing"),
        (("format_version",), 1, "`layer` is missing"),
    ],
)
def test_lying_manifests(
    bank_copy: Path, original: tuple[Path, dict[str, Any]], where: tuple[Any, ...], value: Any, message: str
) -> None:
    manifest: Any = copy.deepcopy(original[1])
    node = manifest
    for step in where[:-1]:
        node = node[step]
    node[where[-1]] = value
    sign(bank_copy, manifest)
    with pytest.raises(BankFormatError) as caught:
        MemoryBank.from_pretrained(bank_copy)
    assert message in str(caught.value) and str(bank_copy) in str(caught.value)


def test_deletions_that_name_rows_twice_or_none_of_them(bank_copy: Path, original: tuple[Path, dict[str, Any]]) -> None:
    for rows in ([0, 0], [-1, 2], [1, 2**40]):
        manifest = copy.deepcopy(original[1])
        payload = bank_format_msa.deletions_payload(np.array(rows), np.empty((0, 3), np.uint64))
        entry = bank_writer_msa.BankWriter(bank_copy).content("deletions-9", payload)
        manifest["deletions"] = [{**entry, "rows": 2, "keys": 0}]
        sign(bank_copy, manifest)
        for read in (MemoryBank.from_pretrained, lambda directory: BankStore(FakeModel(), directory, read_only=True)):
            with pytest.raises(BankFormatError, match="name documents twice, or none of these"):
                read(bank_copy)


def test_links_out_of_the_directory_are_not_followed(bank_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    everything = contents(MemoryBank.from_pretrained(bank_copy))
    for path in sorted(bank_copy.iterdir()):
        if path.name.startswith(("deletions", "index", "chunks", "documents")):
            shutil.move(path, outside)
            path.symlink_to(outside)
            with pytest.raises(BankFormatError, match="a link that leaves the directory"):
                MemoryBank.from_pretrained(bank_copy)
            if path.name.startswith("deletions"):
                with pytest.raises(BankFormatError, match="a link that leaves the directory"):
                    BankStore(FakeModel(), bank_copy, read_only=True)
            else:
                bank = BankStore(FakeModel(), bank_copy, read_only=True)
                (damage,) = bank._damage.values()
                assert damage.file == path.name and "a link that leaves the directory" in damage.cause
                assert contents(bank.snapshot()).items() <= everything.items()
            path.unlink()
            shutil.move(outside, path)


@pytest.mark.parametrize("place", [1, 3, ROWS - 2])
@pytest.mark.parametrize("lie", [2**31 - 1, -(2**31), 2**20])
def test_keys_whose_offsets_lie_are_not_followed(tmp_path: Path, place: int, lie: int) -> None:
    """Not even where nothing was compared: a process would end there, of memory that is not its own."""
    bank = make_bank([4] * ROWS, numbered=True)
    bank.save_pretrained(tmp_path)
    path = tmp_path / bank_manifest_msa.read_manifest(tmp_path)["segments"][0]["table"]["file"]
    offsets = np.cumsum([0, *(len(document.key) for document in bank.documents)]).astype("<i4")
    content = path.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    lying = offsets.copy()
    lying[place] = lie
    path.write_bytes(content.replace(offsets.tobytes(), lying.tobytes()))
    with pytest.raises(BankFormatError, match="table of documents is damaged"):
        MemoryBank.from_pretrained(tmp_path, verify=False)


def test_a_directory_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    """Whatever file a write is about to put in its place."""
    from msa_hf.bank import BankNotWritable
    from msa_hf.model.bank_writer_msa import put_in_place

    (tmp_path / "new").write_text("new")
    (tmp_path / "taken").mkdir()
    with pytest.raises(BankNotWritable, match="taken is a directory, where the bank has a file"):
        put_in_place(tmp_path / "new", tmp_path / "taken")
    assert (tmp_path / "new").read_text() == "new"
