"""Files that are open and mapped stay few, whatever the number of files that a bank has: in every kind of bank."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from connected import together
from fake_embedder import FakeEmbedder
from fake_model import LAYERS, FakeModel
from test_durability import fast_directory  # noqa: F401
from test_encode_bank import encode, written

from msa_hf.bank import BankStore, place_bank, shard_bank
from msa_hf.bank.tiered.plan import PlacementOptions
from msa_hf.model import bank_reader_msa
from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.memory_msa import MemoryBank
from msa_hf.model.routing_msa import Selection
from msa_hf.retrieval import dense_files

PARTS, MOST = 300, 64
ON_DISK = PlacementOptions(content_on="disk")
NARROW = PlacementOptions(keys="int8", content_on="disk")  # the exact keys stay where the bank has them


def text_of(number: int) -> str:
    return f"text {number} of many"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of 300 parts, each of a table, an index and a file of tensors."""
    place = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        rows = [{"key": f"key {number}", "text": text_of(number)} for number in range(PARTS)]
        encode(written(place / "documents.jsonl", rows), place / "bank", place / "log", part_size=1)
    return place / "bank"


@pytest.fixture(autouse=True)
def _map_every_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all of them were large."""
    monkeypatch.setattr(bank_reader_msa, "SMALL_FILE", 0)
    monkeypatch.setattr(dense_files, "SMALL_FILE", 0)


def held(directory: Path) -> int:
    """Descriptors and mappings of this process in a directory."""
    place, count = f"{directory.resolve()}/", 0
    for link in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{link}").startswith(place)
        except OSError:
            continue  # the one that lists
    return count + sum(place in line for line in Path("/proc/self/maps").read_text().splitlines())


def of_store(directory: Path, **options: Any) -> MemoryBank:
    return BankStore(None, directory, read_only=True, **options).snapshot()


def placed_store(directory: Path) -> MemoryBank:
    return place_bank(BankStore(None, directory, read_only=True), "cpu", ON_DISK)


KINDS: dict[str, Callable[[Path], MemoryBank]] = {
    "memory": MemoryBank.from_pretrained,
    "store": of_store,
    "tiered": partial(place_bank, device="cpu", placement=ON_DISK),
    "tiered, narrow keys": partial(place_bank, device="cpu", placement=NARROW),
    "tiered, of a store": placed_store,
}


def gathered(bank: MemoryBank, layer: int, documents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = Selection(torch.tensor([documents]), torch.zeros(1, len(documents)))
    rows = bank.layers[layer].over(bank.layout).gather(chosen, torch.float32)
    there = rows.row_mask[0]
    return rows.keys[:, :, there], rows.values[:, :, there]


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_bank_in_hundreds_of_parts(kind: str, parts: Path) -> None:
    expected = FakeModel().encode_documents([{"input_ids": list(text_of(row).encode())} for row in range(PARTS)])
    assert held(parts) == 0
    bank, most = KINDS[kind](parts), 0
    for layer in LAYERS:
        for first in range(0, PARTS, 150):
            documents = list(range(first, first + 150))
            ours, theirs = gathered(bank, layer, documents), gathered(expected, layer, documents)
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
            most = max(most, held(parts))
    assert bank.documents[PARTS - 1].text == text_of(PARTS - 1)
    assert 0 < most <= MOST


def test_of_a_share(parts: Path) -> None:
    def work(rank: int) -> int:
        with shard_bank(parts) as memory:
            assert len(memory.documents) == PARTS
            return held(parts)

    assert max(together(2, work)) <= MOST


@pytest.mark.usefixtures("fast_directory")
def test_of_a_bank_that_changes_and_keeps_vectors(fast_directory: Path) -> None:  # noqa: F811
    directory, embedder, most = fast_directory / "bank", FakeEmbedder(), 0
    with BankStore(FakeModel(), directory, embedder=embedder) as bank:
        for number in range(60):
            bank.upsert(f"key {number}", f"text {number}")
            most = max(most, held(directory)) if number % 10 == 9 else most
        bank.snapshot()
        assert 0 < max(most, held(directory)) <= MOST
        assert [hit.key for hit in bank.search("text 7", 1, "dense")] == ["key 7"]
    del bank
    with BankStore(FakeModel(), directory, read_only=True) as reader:
        assert [hit.key for hit in reader.search("text 7", 1, "dense", embedder=embedder)] == ["key 7"]
        assert held(directory) <= MOST


def test_a_file_that_was_let_go_and_removed_is_told(parts: Path, tmp_path: Path) -> None:
    for path in parts.iterdir():
        if path.is_file():
            os.link(path, tmp_path / path.name)
    memory = place_bank(tmp_path, "cpu", ON_DISK)
    for path in tmp_path.glob("chunks-*"):
        path.unlink()
    with pytest.raises(BankFormatError, match="load it again"):
        gathered(memory, 1, list(range(PARTS)))
