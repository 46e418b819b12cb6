"""A bank that is in the memory of a host once, and answers the questions of several processes there."""

import gc
import importlib
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from connected import together
from setups import Setup, assert_same, batch_of, setup, tokens
from torch import Tensor

from msa_hf.bank import RankFailed, host_bank, place_bank, shard_bank
from msa_hf.bank.tiered import bank as tiered
from msa_hf.bank.tiered.hardware import Tiers
from msa_hf.bank.tiered.plan import DoesNotFit, PlacementOptions, Reserves
from msa_hf.bank.tiered.sources import source_of

TIERS = Tiers(None, 10**12, 10**12)
module: Any = importlib.import_module("msa_hf.bank.host_bank")  # the package has a function of this name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Setup, Path]:
    """A model, and its bank in a directory, in several files."""
    made = setup("qwen3", "sdpa", documents=tokens(5, 13, 8, 20, 3, 11, seed=2), top_k=3)
    directory = tmp_path_factory.mktemp("bank")
    made.bank.save_pretrained(directory, max_shard_size=4000)
    return made, directory


def mappings() -> dict[range, tuple[str, str]]:
    """Addresses of this process that several may share -> device and number of the memory there."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, device, number, *name = line.split()
        if "s" in rights and "memfd:msa-hf" in " ".join(name):
            first, end = (int(edge, 16) for edge in addresses.split("-"))
            found[range(first, end)] = device, number
    return found


def place_of(tensor: Tensor) -> tuple[str, str, int]:
    """The memory that a tensor lies in, the same in all processes, and where it begins there."""
    ((addresses, memory),) = ((key, value) for key, value in mappings().items() if tensor.data_ptr() in key)
    return *memory, tensor.data_ptr() - addresses.start


@torch.no_grad()
def answer(model: Any, memory: Any, seed: int) -> tuple[Tensor, dict[int, Tensor]]:
    output = model(**batch_of(tokens(4 + seed, 6, seed=seed)), memory=memory)
    return output.logits, {layer: found.documents for layer, found in output.routing.items()}


def test_content_is_there_once_and_every_process_answers_its_own_questions(made: tuple[Setup, Path]) -> None:
    """As one process that has the bank alone; also where they share the routing. Nothing is left of it in the end."""
    setup_, directory = made

    def work(rank: int) -> Any:
        bank = host_bank(directory, model=setup_.model)
        places = [
            place_of(tensor) for layer in bank.layers.values() for tensor in (layer.routing_keys, layer.pooled_kv)
        ]
        placed = place_bank(bank, tiers=TIERS, model=setup_.model)
        for layer, memory in placed.layers.items():
            assert memory.pooled_kv.rows.whole is not None
            assert memory.pooled_kv.rows.whole.data_ptr() == bank.layers[layer].pooled_kv.data_ptr()
        answers = [answer(setup_.model, placed, seed) for seed in range(rank, 2 + 2 * rank)]
        with shard_bank(bank, content="replicated", inputs="different") as shared:
            answers += [answer(setup_.model, shared, seed) for seed in range(rank, 2 + 2 * rank)]
            content = [place_of(layer.pooled_kv) for layer in shared.layers.values()]
        assert content == places[1::2]
        del bank, placed, shared, memory
        gc.collect()
        return places, answers, mappings()

    results = together(2, work)
    assert results[0][0] == results[1][0] and len(set(results[0][0])) == 2 * len(setup_.bank.layers)
    for rank, (_, answers, left) in enumerate(results):
        assert not left
        for (logits, documents), seed in zip(answers, [*range(rank, 2 + 2 * rank)] * 2, strict=True):
            expected = answer(setup_.model, setup_.bank, seed)
            assert_same(logits, expected[0])
            assert all(torch.equal(documents[layer], expected[1][layer]) for layer in documents)


def test_the_bank_is_the_one_in_the_directory(made: tuple[Setup, Path]) -> None:
    """Tensors, documents and prefix, in one process that is not connected."""
    setup_, directory = made
    bank = host_bank(directory, model=setup_.model)
    assert bank.home == setup_.model.load_memory(directory).home
    assert [item.key for item in bank.documents] == [item.key for item in setup_.bank.documents]
    for layer, memory in setup_.bank.layers.items():
        assert torch.equal(bank.layers[layer].routing_keys, memory.routing_keys)
        assert torch.equal(bank.layers[layer].pooled_kv, memory.pooled_kv)
        assert torch.equal(bank.prefix[layer][0], setup_.bank.prefix[layer][0])


def test_a_bank_without_documents(tmp_path: Path) -> None:
    made = setup("qwen3", "sdpa", top_k=3)
    with made.model.open_memory(tmp_path):
        pass
    assert len(host_bank(tmp_path, model=made.model)) == 0


def test_what_one_process_cannot_read_is_told_to_all(made: tuple[Setup, Path], tmp_path: Path) -> None:
    setup_, directory = made
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = max(tmp_path.glob("layer-*"))
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)

    def work(rank: int) -> str:
        with pytest.raises((ValueError, RankFailed)) as caught:
            host_bank(tmp_path, model=setup_.model)
        return str(caught.value)

    assert all(last.name in message for message in together(2, work))


def test_a_device_that_one_process_alone_does_not_have_is_told_to_all(made: tuple[Setup, Path]) -> None:
    def work(rank: int) -> str:
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            host_bank(made[1], device="cuda:99" if rank else None, timeout=timedelta(seconds=30))
        return str(caught.value)

    told, own = together(2, work)
    assert own.splitlines()[0] in told and "Process 1 of this shared memory failed" in told


def copies_around_a_commit(setup_: Setup, directory: Path) -> list[Path]:
    """Two copies of a bank, between which a document became another one of as many chunks, in the same row."""
    before, after = directory / "before", directory / "after"
    with setup_.model.open_memory(before) as store:
        store.add([{"key": str(place), "input_ids": item} for place, item in enumerate(setup_.documents)])
    shutil.copytree(before, after)
    with setup_.model.open_memory(after) as store:
        store.delete("5")
        store.add([{"key": "5", "input_ids": setup_.documents[5][::-1]}])
        store.compact()
    return [before, after]


@pytest.mark.parametrize("read", [host_bank, shard_bank])
def test_one_bank_of_two_commits_is_refused(read: Any, made: tuple[Setup, Path], tmp_path: Path) -> None:
    """Its parts would be of both."""
    copies = copies_around_a_commit(made[0], tmp_path)

    def work(rank: int) -> str:
        with pytest.raises(ValueError, match="different banks") as caught:
            read(copies[rank], model=made[0].model)
        return str(caught.value)

    together(2, work)


def test_a_commit_between_two_processes_is_read_by_both(
    made: tuple[Setup, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that looked before it looks again."""
    before, after = copies_around_a_commit(made[0], tmp_path)
    look, looks = module.open_bank, list[int]()

    def opened(place: Path, *args: Any) -> Any:
        looks.append(1)
        return look(before if len(looks) == 1 else after, *args)

    def work(rank: int) -> tuple[int, bool]:
        if rank == 0:
            monkeypatch.setattr(module, "open_bank", opened)
        bank, wanted = host_bank(after, model=made[0].model), made[0].model.load_memory(after)
        same = all(torch.equal(bank.layers[layer].pooled_kv, wanted.layers[layer].pooled_kv) for layer in bank.layers)
        return len(looks), same

    assert together(2, work) == [(2, True), (0, True)]


def test_memory_out_of_reach_says_what_to_do(made: tuple[Setup, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> str:
        if rank == 1:
            opened = os.open

            def refuses(path: Any, *args: Any) -> int:
                if str(path).startswith("/proc/"):
                    raise PermissionError(13, "Permission denied", path)
                return opened(path, *args)

            monkeypatch.setattr(os, "open", refuses)
        with pytest.raises((PermissionError, RankFailed)) as caught:
            host_bank(made[1], model=made[0].model)
        return str(caught.value)

    assert all("out of reach (Permission denied): run all" in message for message in together(2, work))


def test_what_is_no_whole_bank_is_not_shared(made: tuple[Setup, Path]) -> None:
    with shard_bank(made[0].bank) as part, pytest.raises(ValueError, match="ShardedBank is shared or placed already"):
        shard_bank(part, content="replicated")
    with pytest.raises(ValueError, match="TieredBank is shared or placed already"):
        shard_bank(place_bank(made[0].bank, tiers=TIERS))
    with pytest.raises(TypeError, match="a BankStore or a directory, got list"):
        shard_bank([made[0].bank])


def test_what_is_locked_in_host_memory_needs_no_room_there(
    made: tuple[Setup, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan for a GPU counts content as there already; of a bank that is not locked it does not."""
    source, gpu, choice = source_of(made[0].bank), torch.device("cuda", 0), PlacementOptions(content_on="host")
    monkeypatch.setattr(tiered, "measured_tiers", lambda *_: Tiers(10**9, 100, 10**9))
    with pytest.raises(DoesNotFit):
        tiered._planned(source, gpu, choice, None, Reserves(0, 0, 0, 0, 0))
    monkeypatch.setattr(Tensor, "is_pinned", lambda *_: True)
    assert tiered._planned(source, gpu, choice, None, Reserves(0, 0, 0, 0, 0)).content_on == "host"


def test_replicated_content_stays_where_it_is(made: tuple[Setup, Path]) -> None:
    """Where routing keys go elsewhere or become others."""
    with shard_bank(made[0].bank, content="replicated") as shared:
        moved = shared.to(dtype=torch.bfloat16)
    for layer, memory in moved.layers.items():
        assert memory.routing_keys.dtype == torch.bfloat16
        assert memory.pooled_kv is made[0].bank.layers[layer].pooled_kv
