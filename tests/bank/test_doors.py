"""Every kind of bank opens a directory through one door: the same refusals, in the same words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bank_files import Change, change, manifest_of, sign
from fake_model import ORIGIN, FakeModel, contents

from msa_hf.bank import BankError, BankFormatError, BankStore, place_bank, shard_bank
from msa_hf.model.memory_msa import BankOrigin, MemoryBank


class Other(FakeModel):
    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        return BankOrigin.from_dict({**ORIGIN.to_dict(), "similarity": "dot"})


def store(directory: Path, model: Any = None) -> MemoryBank:
    """A bank that changes leaves documents out where it can; what it says of the file is what others refuse with."""
    bank = BankStore(model, directory, read_only=True)
    if bank._damage:
        raise BankFormatError(next(iter(bank._damage.values())).cause)
    return bank.snapshot()


DOORS: list[Callable[..., Any]] = [
    store,
    lambda directory, model=None: MemoryBank.from_pretrained(directory, model),
    lambda directory, model=None: place_bank(directory, model=model),
    lambda directory, model=None: shard_bank(directory, model=model),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with BankStore(FakeModel(), tmp_path / "bank") as bank:
        bank.add([{"key": f"k{row}", "text": f"text {row}", "n": row} for row in range(5)])
        bank.delete("k1", 3)
        bank.upsert("k2", "another text", 2)
        bank.checkpoint()  # in the manifest, not in the log
    return tmp_path / "bank"


def said(directory: Path, model: Any = None) -> str:
    """What all doors say; they say the same."""
    found = set()
    for door in DOORS:
        with pytest.raises(ValueError) as caught:
            door(directory, model=model)
        assert isinstance(caught.value, BankError) == (model is None)
        found.add(str(caught.value))
    (message,) = found
    return message


def test_what_is_intact_is_the_same_behind_all_doors(directory: Path) -> None:
    keys = [[document.key for document in door(directory, model=FakeModel()).documents] for door in DOORS]
    assert keys == [["k0", "k3", "k4", "k2"]] * len(DOORS)
    assert contents(store(directory)) == contents(MemoryBank.from_pretrained(directory))


def test_a_relative_path_means_the_same_bank_wherever_the_process_goes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a daemon, which goes to the root: files are opened when they are asked for, and written by their names."""
    expected = contents(store(directory))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    banks = [door(Path("bank"), model=FakeModel()) for door in DOORS]
    reader, writer = BankStore(None, "bank", read_only=True), BankStore(FakeModel(), "bank")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with reader, writer:
        assert contents(reader.snapshot()) == contents(banks[0]) == expected
        for bank in banks:
            assert [document.key for document in bank.documents] == ["k0", "k3", "k4", "k2"]
        writer.upsert("new", "text")
        assert writer.compact() and writer.verify() == [] and len(writer) == 5
        assert len(reader.snapshot()) in (4, 5) and not list(Path.cwd().iterdir())
    assert len(store(directory)) == 5


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        (change("format_version", to=4), "this library reads up to 3. Upgrade"),
        (change("reader_features", to=["fp4"]), "which this library cannot read. Upgrade"),
        (change("origin", "more", to=1), "unknown field of the origin: more. Restore the bank"),
        (change("deletions", 0, "rows", to=7), "deletions[0].`bytes` is"),
        (change("segments", 0, "table", "file", to="../x"), "plain name"),
        (change("counts", "chunks", to=1), "counts.`chunks` is 1"),
    ],
)
def test_a_manifest_that_lies(directory: Path, altered: Change, message: str) -> None:
    manifest = manifest_of(directory)
    altered(manifest)
    sign(directory, manifest)
    found = said(directory)
    assert found.startswith(f"{directory / 'manifest.json'}: ") and message in found


@pytest.mark.parametrize("kind", ["manifest.json", "documents", "chunks", "prefix", "deletions"])
def test_files_that_are_missing_cut_or_elsewhere(directory: Path, kind: str) -> None:
    path = next(path for path in sorted(directory.iterdir()) if path.name.startswith(kind))
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    found = said(directory)
    assert found.startswith(f"{path}: ") and ("truncated" in found or kind == "manifest.json")
    path.unlink()
    found = said(directory)
    assert found.startswith(f"{path}: ") and ("cannot be read" in found or "data files of a bank are there" in found)
    (directory.parent / "outside").write_bytes(data)
    path.symlink_to(directory.parent / "outside")
    assert said(directory).startswith(f"{path}: a link that leaves the directory")


def test_the_bank_of_another_model(directory: Path) -> None:
    assert "similarity: the bank has cosine, the model dot" in said(directory, Other())


def test_too_few_files_may_be_open_is_no_damage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents would be left out, and offered to be given up, for a limit of the process."""

    def exhausted(path: Path, *_: object) -> Any:
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr("msa_hf.model.bank_reader_msa.read_stream", exhausted)
    for door in DOORS:
        with pytest.raises(OSError, match="Too many open files"):
            door(directory)
