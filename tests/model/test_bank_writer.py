"""Saving a bank: what is written comes back exactly, and an interruption leaves the old bank or the new."""

import os
import random
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_files import ROW_BYTES, Maker, assert_equal, manifest_of, names, sign
from safetensors.torch import load_file

from msa_hf.model.bank_format_msa import BankFormatError, parse_size
from msa_hf.model.memory_msa import MemoryBank

# --- what is saved comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[], [1], [4], [5], [1, 1, 1], [3, 4, 5, 8, 9, 31]])
@pytest.mark.parametrize("size", ["4GB", 1])
def test_round_trip(tmp_path: Path, lengths: list[int], dtype: torch.dtype, size: int | str, make: Maker) -> None:
    bank = make(lengths, dtype)
    bank.save_pretrained(tmp_path / "new" / "bank", max_shard_size=size)
    for verify in (True, False):
        assert_equal(MemoryBank.from_pretrained(tmp_path / "new" / "bank", verify=verify), bank)


def test_random_sizes(tmp_path: Path, make: Maker) -> None:
    rng = random.Random(7)
    for seed in range(12):
        bank = make([rng.choice([1, 3, 4, 5, rng.randint(1, 60)]) for _ in range(rng.randint(1, 20))], seed=seed)
        bank.save_pretrained(tmp_path, max_shard_size=rng.randint(1, 40 * ROW_BYTES))
        loaded = MemoryBank.from_pretrained(tmp_path)
        assert_equal(loaded, bank)
        loaded.save_pretrained(tmp_path)  # over itself, from memory-mapped tensors and table
        assert_equal(MemoryBank.from_pretrained(tmp_path), bank)
        assert_equal(loaded, bank)


def test_shards_respect_the_limit_and_never_split_a_document(tmp_path: Path, make: Maker) -> None:
    bank = make([4, 8, 4, 40, 4, 4, 4, 4])  # 1, 2, 1, 10, 1, 1, 1, 1 chunks
    bank.save_pretrained(tmp_path, max_shard_size=3 * ROW_BYTES)
    ranges = [[0, 3], [3, 4], [4, 14], [14, 17], [17, 18]]
    shards = manifest_of(tmp_path)["segments"][0]["tensors"]
    assert [(shard["layer"], shard["chunks"]) for shard in shards] == [(i, rows) for i in (1, 3) for rows in ranges]
    content = load_file(tmp_path / shards[1]["file"])
    assert torch.equal(content["layers.1.content"], bank.layer(1).pooled_kv[3:4])
    assert_equal(MemoryBank.from_pretrained(tmp_path), bank)


def test_max_shard_size_units() -> None:
    sizes: dict[int | str, int] = {
        "4GB": 4 * 10**9,
        "1 MiB": 2**20,
        "10kb": 10_000,
        "3TB": 3 * 10**12,
        "12": 12,
        "7B": 7,
        5: 5,
    }
    assert {size: parse_size(size) for size in sizes} == sizes
    for wrong in ("", "GB", "-1", 0, "4 bytes", "1.5GB", None):
        with pytest.raises(ValueError, match="`max_shard_size` must be"):
            parse_size(wrong)  # type: ignore[arg-type]


def test_the_table_is_a_dataset(saved: Path, numbered: bool) -> None:
    datasets = pytest.importorskip("datasets")
    path = saved / manifest_of(saved)["segments"][0]["table"]["file"]
    rows = datasets.Dataset.from_file(str(path))
    further = ["id", "version", "digest"] if numbered else []
    assert rows.column_names == ["key", "text", "metadata", "tokens", "chunks", *further]
    assert rows["tokens"][:] == [1, 9, 4, 6] and rows[1]["metadata"] == '{"n": [1, null]}'


# --- saving over a bank, and failing to -------------------------------------------------------------------------------


def test_overwriting_keeps_a_reader_alive_and_leaves_nothing_behind(saved: Path, make: Maker, numbered: bool) -> None:
    (saved / "README.md").write_text("not ours")
    reader, new = MemoryBank.from_pretrained(saved), make([5, 2], torch.bfloat16, seed=3)
    before = names(saved)
    new.save_pretrained(saved)
    assert_equal(reader, make([1, 9, 4, 6]))
    assert_equal(MemoryBank.from_pretrained(saved), new)
    assert names(saved) & before == {"README.md", "manifest.json"}
    assert len(names(saved)) == 2 + 4 + numbered  # two layers, prefix, table, index


def test_only_files_of_a_bank_are_ever_removed(saved: Path, make: Maker) -> None:
    manifest = manifest_of(saved)
    (saved / manifest["prefix"]["file"]).rename(saved / "model.safetensors")
    manifest["prefix"]["file"] = "model.safetensors"
    sign(saved, manifest)
    make([1]).save_pretrained(saved)
    assert (saved / "model.safetensors").exists()


@pytest.mark.parametrize(("function", "after"), [("replace", False), ("replace", True), ("fsync", False)])
def test_an_interrupted_save_leaves_the_old_bank_or_the_new(
    saved: Path,
    function: str,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
    make: Maker,
    numbered: bool,
) -> None:
    before = {name: (saved / name).read_bytes() for name in names(saved)}
    original = getattr(os, function)
    old_kept = 0
    for fails_at in range(1, 20):
        calls = 0

        def failing(*arguments: Any, fails_at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls != fails_at or after:
                original(*arguments)
            if calls == fails_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, function, failing)
        with suppress(KeyboardInterrupt):
            make([8, 3], seed=9).save_pretrained(saved)
        monkeypatch.setattr(os, function, original)
        if manifest_of(saved)["counts"]["documents"] == 2:  # past the commit
            break
        assert {name: (saved / name).read_bytes() for name in names(saved)} == before
        old_kept += 1
    assert_equal(MemoryBank.from_pretrained(saved), make([8, 3], seed=9))
    # Four data files, an index and the manifest are renamed; these and the directory are flushed before the commit.
    assert old_kept == {"replace": 4 if after else 5, "fsync": 6}[function] + numbered


def test_data_are_flushed_before_the_manifest_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("flush", "directory" if path == tmp_path else path.name))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(("rename", target.name if ("flush", source.name) in events else "unflushed"))
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    make([8, 3]).save_pretrained(tmp_path)
    assert ("rename", "unflushed") not in events
    assert events[-3:] == [("flush", "directory"), ("rename", "manifest.json"), ("flush", "directory")]
    assert {name for kind, name in events if kind == "rename"} == names(tmp_path)


def test_a_directory_that_cannot_be_read_is_not_overwritten(tmp_path: Path, make: Maker) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(BankFormatError, match=r"not overwritten.*Save elsewhere"):
        make([1]).save_pretrained(tmp_path)
    assert names(tmp_path) == {"manifest.json"}


def test_dtypes_without_a_place_in_the_format(tmp_path: Path, make: Maker) -> None:
    with pytest.raises(ValueError, match=r"A bank of torch.float64 cannot be saved.*bank.to\(dtype"):
        make([1], torch.float64).save_pretrained(tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_files_have_the_usual_permissions(tmp_path: Path, make: Maker) -> None:
    (tmp_path / "plain").touch()
    make([1]).save_pretrained(tmp_path / "bank")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "bank").iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}
