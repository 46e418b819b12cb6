"""A bank in the Hub's cache is read through the links that the Hub's client makes, and through no others."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_hf import MemoryBank
from msa_hf.bank import BankError, BankNotWritable, BankStore
from msa_hf.model.bank_lock_msa import WriterLock

COMMIT = "8a0eee5d4b717a6d9beafdd0076519fc75e09f60"
MARKER = ".huggingface-shared-blobs"


@pytest.fixture
def snapshot(bank: MemoryBank, cache: Path, tmp_path: Path) -> Path:
    """A bank laid out as the Hub's client does."""
    bank.save_pretrained(tmp_path / "plain")
    repository = cache / "datasets--user--bank"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in (tmp_path / "plain").iterdir():
        if path.name != ".lock":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, repository / "blobs" / digest)
            (folder / path.name).symlink_to(f"../../blobs/{digest}")
    return folder


def share(snapshot: Path, name: str, prefix: str = "") -> Path:
    """Move the blob of a file to where all repositories of the cache share it."""
    blob, cache = (snapshot / name).resolve(), snapshot.parents[2]
    shared = cache / "blobs" / (prefix or blob.name[:2]) / blob.name
    shared.parent.mkdir(parents=True)
    (cache / "blobs" / MARKER).write_text("1\n")
    blob.rename(shared)
    blob.symlink_to(f"../../blobs/{shared.parent.name}/{blob.name}")
    return shared


def test_links_into_the_blobs_are_followed(snapshot: Path, bank: MemoryBank, tmp_path: Path) -> None:
    assert len(MemoryBank.from_pretrained(snapshot)) == len(bank)
    with BankStore(None, snapshot, read_only=True) as store:
        assert store.verify() == [] and len(store.snapshot()) == len(bank)
    (tmp_path / "by a link").symlink_to(snapshot.parents[2])
    assert len(MemoryBank.from_pretrained(tmp_path / "by a link" / snapshot.relative_to(snapshot.parents[2])))
    moved = shutil.move(snapshot.parents[2], tmp_path / "elsewhere")
    assert len(MemoryBank.from_pretrained(Path(moved, *snapshot.parts[-3:]))) == len(bank)


@pytest.mark.parametrize("name", ["manifest.json", "layer-*", "documents-*"])
def test_blobs_that_repositories_share_are_followed(snapshot: Path, bank: MemoryBank, name: str) -> None:
    share(snapshot, next(snapshot.glob(name)).name)
    assert len(MemoryBank.from_pretrained(snapshot)) == len(bank)


def out_of_the_cache(link: Path, blob: Path) -> str:
    return os.path.relpath(shutil.copy(blob, link.parents[3].parent / "secret"), link.parent)


def absolute(link: Path, blob: Path) -> str:
    return str(blob)


def of_another_repository(link: Path, blob: Path) -> str:
    other = link.parents[3] / "datasets--user--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(blob, other / blob.name)
    return f"../../../datasets--user--other/blobs/{blob.name}"


def by_way_of_the_blobs(link: Path, blob: Path) -> str:
    of_another_repository(link, blob)
    return f"../../blobs/../../datasets--user--other/blobs/{blob.name}"


def to_nothing(link: Path, blob: Path) -> str:
    return "../../blobs/" + "0" * 64


def to_a_folder(link: Path, blob: Path) -> str:
    (blob.parent / "folder").mkdir()
    return "../../blobs/folder"


def to_the_blobs(link: Path, blob: Path) -> str:
    return "../../blobs/.."


def to_a_ref(link: Path, blob: Path) -> str:
    shutil.copy(blob, link.parents[2] / "refs")
    return "../../refs"


def chain_of_blobs(link: Path, blob: Path) -> str:
    (blob.parent / "first").symlink_to(blob.name)
    return "../../blobs/first"


def chain_out_of_the_cache(link: Path, blob: Path) -> str:
    (blob.parent / "first").symlink_to(shutil.copy(blob, link.parents[3].parent / "secret"))
    return "../../blobs/first"


def chain_to_another_repository(link: Path, blob: Path) -> str:
    of_another_repository(link, blob)
    (blob.parent / "first").symlink_to(f"../../datasets--user--other/blobs/{blob.name}")
    return "../../blobs/first"


def chain_in_the_snapshot(link: Path, blob: Path) -> str:
    (link.parent / "first").symlink_to(f"../../blobs/{blob.name}")
    (link.parent.parent / "other").mkdir()
    (link.parent.parent / "other" / "first").symlink_to(f"../../blobs/{blob.name}")
    return "../other/first"


def to_itself(link: Path, blob: Path) -> str:
    return link.name


def blobs_that_are_a_link(link: Path, blob: Path) -> str:
    blob.parent.rename(link.parents[3].parent / "my files")
    blob.parent.symlink_to(link.parents[3].parent / "my files")
    return f"../../blobs/{blob.name}"


def shared_without_the_marker(link: Path, blob: Path) -> str:
    share(link.parent, link.name)
    (link.parents[3] / "blobs" / MARKER).unlink()
    return f"../../blobs/{blob.name}"


def shared_under_another_prefix(link: Path, blob: Path) -> str:
    share(link.parent, link.name, prefix="11" if blob.name.startswith("00") else "00")
    return f"../../blobs/{blob.name}"


def shared_by_a_link(link: Path, blob: Path) -> str:
    shared = share(link.parent, link.name)
    shared.rename(link.parents[3].parent / "secret")
    shared.symlink_to(link.parents[3].parent / "secret")
    return f"../../blobs/{blob.name}"


HOSTILE = [
    out_of_the_cache,
    absolute,
    of_another_repository,
    by_way_of_the_blobs,
    to_nothing,
    to_a_folder,
    to_the_blobs,
    to_a_ref,
    chain_of_blobs,
    chain_out_of_the_cache,
    chain_to_another_repository,
    chain_in_the_snapshot,
    to_itself,
    blobs_that_are_a_link,
    shared_without_the_marker,
    shared_under_another_prefix,
    shared_by_a_link,
]


@pytest.mark.parametrize("name", ["manifest.json", "layer-*", "documents-*"])
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_other_links_are_refused(snapshot: Path, attack: Callable[[Path, Path], str], name: str) -> None:
    link = next(snapshot.glob(name))
    target = attack(link, link.resolve())
    link.unlink()
    link.symlink_to(target)
    with pytest.raises(BankError) as caught:
        MemoryBank.from_pretrained(snapshot)
    assert str(link) in str(caught.value) or "blobs_that" in attack.__name__
    assert any(said in str(caught.value) for said in ("a link that leaves", "cannot be read", "not a regular file"))


def test_a_layout_like_it_elsewhere_is_not_the_cache(snapshot: Path, tmp_path: Path) -> None:
    """Only a folder that is named as the client names repositories: `blobs` of anybody else are out of reach."""
    other = tmp_path / "projects" / "photos"
    shutil.copytree(snapshot.parents[1], other, symlinks=True)
    with pytest.raises(BankError, match="a link that leaves the directory"):
        MemoryBank.from_pretrained(other / "snapshots" / COMMIT)
    nested = snapshot.parent / "deep" / COMMIT
    shutil.copytree(snapshot, nested, symlinks=True)
    with pytest.raises(BankError, match=r"cannot be read|a link that leaves"):
        MemoryBank.from_pretrained(nested)


def test_a_link_to_nothing_names_the_remedy(snapshot: Path) -> None:
    next(snapshot.glob("layer-*")).resolve().unlink()
    with pytest.raises(BankError, match=r"Download the bank again: .* force_download=True"):
        MemoryBank.from_pretrained(snapshot)


def test_nobody_writes_there(snapshot: Path, bank: MemoryBank, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    for directory in (snapshot, snapshot.parent / "another-commit"):
        directory.mkdir(exist_ok=True)
        with pytest.raises(BankNotWritable, match="Change a copy"):
            WriterLock(directory)
        with pytest.raises(BankNotWritable, match="Change a copy"):
            BankStore(model, directory, tokenizer)
        with pytest.raises(BankNotWritable, match="Change a copy"):
            bank.save_pretrained(directory)
    assert not list(snapshot.parents[1].rglob(".lock"))
    MemoryBank.from_pretrained(snapshot).save_pretrained(tmp_path / "copy")
    with BankStore(model, tmp_path / "copy", tokenizer) as store:
        store.upsert("new", "Otters.")
        assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
