"""Banks on the Hub: what is sent, what comes back, and what is said where nothing does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, point_to
from huggingface_hub import constants
from scripted import COMPACT, TEXTS, bank_of

from msa_hf import MemoryBank
from msa_hf.bank import BankError, BankFormatError, BankStore, BankUnavailable, bank_directory, place_bank
from msa_hf.cli import main, mcp
from msa_hf.cli.command_line import parser
from msa_hf.model import hub_msa, publishing_msa
from msa_hf.retrieval import search

NOBODY = "http://127.0.0.1:9"  # discard; nothing listens there


def same(one: MemoryBank, other: MemoryBank) -> bool:
    pairs = [(one.layers[layer], other.layers[layer]) for layer in one.layers]
    equal = all(torch.equal(a.routing_keys, b.routing_keys) and torch.equal(a.pooled_kv, b.pooled_kv) for a, b in pairs)
    texts = [[(item.key, item.text, item.metadata) for item in bank.documents] for bank in (one, other)]
    return equal and texts[0] == texts[1] and list(one.layers) == list(other.layers)


def test_a_bank_comes_back_as_it_was(hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    info = bank.push_to_hub("user/bank", private=True, commit_message="First notes")
    there = hub.dataset("user/bank")
    assert there.private and there.messages[-1] == "First notes" and there.branches["main"] == info.oid
    assert {"manifest.json", "README.md"} < set(there.files()) and ".lock" not in there.files()
    loaded = model.load_memory("user/bank", tokenizer)
    assert same(loaded, bank)
    assert same(MemoryBank.from_pretrained("user/bank"), bank)
    placed = place_bank("user/bank", model=model, tokenizer=tokenizer)
    assert placed.home.directory == loaded.home.directory
    with BankStore(model, "user/bank", tokenizer, read_only=True) as store:
        assert same(store.snapshot(), bank) and "0" in store


def test_only_a_banks_files_are_fetched_and_none_of_another_models(
    hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any
) -> None:
    bank.push_to_hub("user/bank")
    there = hub.dataset("user/bank")
    there.commit({**there.files(), "model.safetensors": b"x", "layer-9/notes.bin": b"x", "train.py": b"x"}, "more")
    model.load_memory("user/bank", tokenizer)
    assert not {"model.safetensors", "notes.bin", "train.py", ".gitattributes"} & set(hub.downloads())

    router = model.model.layers[1].self_attn.router_k_proj.weight
    there.commit({**there.files(), "README.md": b"edited"}, "another commit")
    hub.requests.clear()
    with torch.no_grad():
        kept = router.clone()
        router += 1.0
        try:
            with pytest.raises(ValueError, match="not made with this model"):
                model.load_memory("user/bank", tokenizer)
        finally:
            router.copy_(kept)
    assert not [name for name in hub.downloads() if name.endswith((".safetensors", ".arrow"))], "refused before"


def test_revisions(hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    first = bank.push_to_hub("user/bank").oid
    fewer = bank_of(model, tokenizer, COMPACT, TEXTS[:3])
    draft = fewer.push_to_hub("user/bank", revision="draft").oid
    assert len(MemoryBank.from_pretrained("user/bank")) == len(TEXTS)
    for revision in ("draft", draft):
        assert len(model.load_memory("user/bank", tokenizer, revision=revision)) == 3
    fewer.push_to_hub("user/bank")
    assert len(MemoryBank.from_pretrained("user/bank")) == 3, "the cache is asked again"
    assert len(MemoryBank.from_pretrained("user/bank", revision=first)) == len(TEXTS)
    manifest = hub.dataset("user/bank").files()["manifest.json"].decode()
    left = [name for name in hub.dataset("user/bank").files() if name.endswith((".safetensors", ".arrow"))]
    assert all(name in manifest for name in left), "files of the bank before are removed"
    with pytest.raises(BankUnavailable, match="has no revision 'v9': give one of its branches"):
        MemoryBank.from_pretrained("user/bank", revision="v9")


def test_deleted_documents_are_not_sent(hub: FakeHub, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with BankStore(model, tmp_path / "bank", tokenizer) as store:
        store.upsert("kept", "The heron stands in the reeds.")
        store.upsert("gone", "The password is swordfish.", metadata={"of": "swordfish"})
        store.delete("gone")
        store.push_to_hub("user/bank", license="cc-by-4.0", model_id="user/model")
        store.upsert("later", "An otter came by.")
        snapshot = store.snapshot()
    assert not [name for name, data in hub.dataset("user/bank").files().items() if b"swordfish" in data]
    found = model.load_memory("user/bank", tokenizer)
    assert [item.key for item in found.documents] == ["kept"]
    snapshot.push_to_hub("user/bank")
    assert [item.key for item in model.load_memory("user/bank", tokenizer).documents] == ["kept", "later"]
    (copy := tmp_path / "copy").mkdir()
    found.save_pretrained(copy)
    with BankStore(model, copy, tokenizer) as store:  # the remedy that a bank in the cache names
        store.upsert("new", "A new one.")
        assert len(store) == 2


def test_a_folder_that_was_uploaded_by_hand_opens_too(hub: FakeHub, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with BankStore(model, tmp_path / "bank", tokenizer) as store:
        store.upsert("one", "The heron stands in the reeds.")
        store.upsert("two", "An otter came by.")
    files = {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}
    assert any(name.startswith("commit-") for name in files)
    there = hub.make("dataset", "user/log", files)
    assert len(model.load_memory("user/log", tokenizer)) == 2
    model.load_memory("user/log", tokenizer).push_to_hub("user/log")
    assert not [name for name in there.files() if name.startswith("commit-")], "they were of the bank before"
    assert len(model.load_memory("user/log", tokenizer)) == 2


def test_the_card(hub: FakeHub, bank: MemoryBank) -> None:
    bank.push_to_hub("user/bank", model_id="user/model")
    card = hub.dataset("user/bank").files()["README.md"].decode()
    for said in ("license: unknown", "viewer: false", "- msa_hf", "user/model", 'load_memory("user/bank", tokenizer)'):
        assert said in card
    assert f"| documents | {len(bank)} |" in card and f"| tokens | {bank.num_tokens:,} |" in card
    assert bank.origin.model_fingerprint in card and "| format version | 1 |" in card

    bank.push_to_hub("user/bank", license="cc-by-4.0")
    changed = hub.dataset("user/bank").files()["README.md"].decode()
    assert "license: cc-by-4.0" in changed, "ours is brought up to date"
    for edited in (changed.replace("cc-by-4.0", "mit"), "# Mine\n", changed + "\nMy notes.\n"):
        there = hub.dataset("user/bank")
        there.commit({**there.files(), "README.md": edited.encode()}, "by hand")
        bank.push_to_hub("user/bank", license="other")
        assert there.files()["README.md"].decode() == edited, "a person's stays"


def test_one_commit_has_all_of_a_bank(
    hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.push_to_hub("user/bank")
    assert len(hub.dataset("user/bank").commits) == 2  # with that of the repository
    fewer = bank_of(model, tokenizer, COMPACT, TEXTS[:3])
    monkeypatch.setattr(publishing_msa, "MANY_FILES", 1)  # as a large bank
    fewer.push_to_hub("user/bank")
    for commit in list(hub.dataset("user/bank").commits)[1:]:
        assert len(MemoryBank.from_pretrained("user/bank", revision=commit)) in (3, len(TEXTS))
    assert same(MemoryBank.from_pretrained("user/bank"), fewer)


def test_who_comes_in_between_is_seen(hub: FakeHub, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.push_to_hub("user/bank")
    asked = publishing_msa._card_is_ours

    def meanwhile(*args: Any) -> bool:
        there = hub.dataset("user/bank")
        there.commit({**there.files(), "theirs.txt": b""}, "theirs")
        return asked(*args)

    monkeypatch.setattr(publishing_msa, "_card_is_ours", meanwhile)
    with pytest.raises(BankUnavailable, match="changed by somebody else meanwhile: do it again"):
        bank.push_to_hub("user/bank", license="mit")
    assert "theirs.txt" in hub.dataset("user/bank").files()


def test_offline(hub: FakeHub, bank: MemoryBank, patch: pytest.MonkeyPatch, cache: Path, caplog: Any) -> None:
    bank.push_to_hub("user/bank")
    with pytest.raises(BankUnavailable, match=r"cache has no complete copy .* was not asked"):
        MemoryBank.from_pretrained("user/bank", local_files_only=True)
    MemoryBank.from_pretrained("user/bank")
    hub.requests.clear()
    assert same(MemoryBank.from_pretrained("user/bank", local_files_only=True), bank)
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(MemoryBank.from_pretrained("user/bank"), bank)
    with pytest.raises(BankUnavailable, match=r"no directory 'user/other' here, .* HF_HUB_OFFLINE is set; unset it"):
        MemoryBank.from_pretrained("user/other")
    with pytest.raises(BankUnavailable, match="needs the Hub, but HF_HUB_OFFLINE is set"):
        bank.push_to_hub("user/bank")
    assert hub.requests == [] and not caplog.records

    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(patch, NOBODY, cache)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert same(MemoryBank.from_pretrained("user/bank"), bank)
    assert "cannot be reached (ConnectError" in caplog.text and "looked for in the cache" in caplog.text
    with pytest.raises(BankUnavailable, match="give a directory of this machine"):
        MemoryBank.from_pretrained("user/other")
    with pytest.raises(BankUnavailable, match=r"cannot be reached .*Check the connection and HF_ENDPOINT"):
        bank.push_to_hub("user/bank")
    assert time.monotonic() - start < 5, "nothing is tried for long"


def test_a_hub_that_does_not_answer(
    hub: FakeHub, bank: MemoryBank, patch: pytest.MonkeyPatch, cache: Path, caplog: Any
) -> None:
    bank.push_to_hub("user/bank")
    MemoryBank.from_pretrained("user/bank")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(patch, f"http://127.0.0.1:{silent.getsockname()[1]}", cache)
        patch.setattr(hub_msa, "SECONDS", 0.3)
        assert same(MemoryBank.from_pretrained("user/bank"), bank)
        assert "ReadTimeout" in caplog.text
        with pytest.raises(BankUnavailable, match=r"cannot be reached .*ReadTimeout"):
            bank.push_to_hub("user/bank")


def test_an_interrupted_download_is_no_copy(hub: FakeHub, bank: MemoryBank, patch: pytest.MonkeyPatch) -> None:
    bank.push_to_hub("user/bank")
    directory = bank_directory("user/bank")
    lost = next(directory.glob("layer-*"))
    lost.unlink()
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((BankUnavailable, BankFormatError), match=r"complete copy|cannot be read"):
        MemoryBank.from_pretrained("user/bank")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert same(MemoryBank.from_pretrained("user/bank"), bank)
    blob = next(directory.glob("layer-*")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(BankFormatError, match="corrupted"):
        MemoryBank.from_pretrained("user/bank")
    assert same(MemoryBank.from_pretrained("user/bank", force_download=True), bank)


def test_who_may_see_what(hub: FakeHub, bank: MemoryBank, patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bank.push_to_hub("user/bank", private=True)
    for token, said in (
        ("hf_stranger", "there is no dataset 'user/bank' on the Hub that you may see.*if it is private, log in"),
        ("hf_nonsense", "answered 401.*was refused: log in with `hf auth login`, or pass `token=`"),
    ):
        with pytest.raises(BankUnavailable, match=said):
            MemoryBank.from_pretrained("user/bank", token=token)
    patch.delenv("HF_TOKEN")
    with pytest.raises(BankUnavailable, match="if it is private, log in"):
        MemoryBank.from_pretrained("user/bank")
    assert len(MemoryBank.from_pretrained("user/bank", token="hf_owner")) == len(bank)
    with pytest.raises(BankUnavailable, match="log in"):
        bank.push_to_hub("user/bank")
    with pytest.raises(BankUnavailable, match=r"403|may see"):
        bank.push_to_hub("user/bank", token="hf_stranger")
    hub.dataset("user/bank").private, hub.dataset("user/bank").gated = False, True
    for options in ({"force_download": True}, {"cache_dir": tmp_path / "empty"}):
        with pytest.raises(BankUnavailable, match=r"granted by its owner: ask for it on its page.*, then log in"):
            MemoryBank.from_pretrained("user/bank", token="hf_stranger", **options)


def test_what_is_to_be_private_is_not_sent_where_all_may_see_it(hub: FakeHub, bank: MemoryBank) -> None:
    bank.push_to_hub("user/bank", private=False)
    before = dict(hub.dataset("user/bank").commits)
    with pytest.raises(BankUnavailable, match="is public, so `private=True` would not hold"):
        bank.push_to_hub("user/bank", private=True, license="mit")
    assert hub.dataset("user/bank").commits == before
    hub.dataset("user/bank").private = True
    bank.push_to_hub("user/bank", private=True, license="mit")


def test_what_is_no_bank_on_the_hub(hub: FakeHub, bank: MemoryBank) -> None:
    with pytest.raises(BankUnavailable, match="no directory 'user/nothing' here, and there is no dataset"):
        MemoryBank.from_pretrained("user/nothing")
    hub.make("model", "user/model", {"config.json": b"{}"})
    with pytest.raises(BankUnavailable, match="there is no dataset 'user/model'"):
        MemoryBank.from_pretrained("user/model")
    hub.make("dataset", "user/rows", {"train.parquet": b"x" * 100})
    with pytest.raises(BankUnavailable, match=r"has no manifest.json, so it is no bank"):
        MemoryBank.from_pretrained("user/rows")
    assert "train.parquet" not in hub.downloads()
    hub.make("dataset", "user/other", {"manifest.json": b'{"format": "webmanifest"}'})
    with pytest.raises(BankFormatError, match="not the manifest of a bank"):
        MemoryBank.from_pretrained("user/other")
    hub.fail["/api/datasets/user/bank"] = 503
    with pytest.raises(BankUnavailable, match="no complete copy"):
        MemoryBank.from_pretrained("user/bank")


def test_a_download_that_was_damaged_is_made_again(hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    bank.push_to_hub("user/bank")
    name = next(name for name in hub.dataset("user/bank").files() if name.startswith("layer-"))
    data = hub.dataset("user/bank").files()[name]
    digest = hashlib.sha256(data).hexdigest()

    class Damaging(dict[str, bytes]):
        def __getitem__(self, asked: str) -> bytes:
            whole = super().__getitem__(asked)
            return whole[:-1] + bytes([whole[-1] ^ 1]) if asked == digest else whole

    stored, hub.stored = hub.stored, Damaging(hub.stored)
    for _ in range(2):  # the cache keeps it
        with pytest.raises(BankError, match=r"is corrupted: .* Download the bank again: .* force_download=True"):
            model.load_memory("user/bank", tokenizer)
        hub.stored = stored
    assert len(model.load_memory("user/bank", tokenizer, force_download=True)) == len(bank)
    assert len(model.load_memory("user/bank", tokenizer)) == len(bank)


def test_a_path_that_is_here_is_never_looked_for(
    hub: FakeHub, bank: MemoryBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bank.save_pretrained("user/bank")
    assert same(MemoryBank.from_pretrained("user/bank"), bank)
    with pytest.raises(ValueError, match="`revision` is of a bank on the Hub"):
        MemoryBank.from_pretrained("user/bank", revision="main")
    for path in (
        "nothing",
        "./user/nothing",
        "a/b/c",
        "/user/nothing",
        "../user",
        "user/",
        "user/a..b",
        Path("user/no"),
    ):
        with pytest.raises(BankFormatError, match="this is not a bank"):
            MemoryBank.from_pretrained(path)
    assert hub.requests == []


def test_a_bank_in_the_cache_is_not_written_to(hub: FakeHub, bank: MemoryBank, model: Any, tokenizer: Any) -> None:
    bank.push_to_hub("user/bank")
    directory = model.load_memory("user/bank", tokenizer).home.directory
    before = sorted(directory.iterdir())
    match = re.escape("is a snapshot in the Hub's cache") + ".*save_pretrained.*read_only=True"
    for sole_writer in (False, True):
        with pytest.raises(RuntimeError, match=match):
            BankStore(model, directory, tokenizer, sole_writer=sole_writer)
        with pytest.raises(RuntimeError, match=match):
            bank.save_pretrained(directory, sole_writer=sole_writer)
    assert sorted(directory.iterdir()) == before
    hits = search("user/bank", "cedar", 2, "router", model=model, tokenizer=tokenizer, protocol=COMPACT)
    assert len(hits) == 2


def test_a_placed_bank_is_not_sent(hub: FakeHub, bank: MemoryBank) -> None:
    with pytest.raises(ValueError, match="push the one that it was made from"):
        place_bank(bank, "cpu").push_to_hub("user/bank")
    assert hub.requests == []


@pytest.mark.parametrize("command", ["serve", "mcp"])
def test_servers_read_a_bank_on_the_hub_and_write_to_none(
    hub: FakeHub,
    bank: MemoryBank,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    capsys: Any,
    patch: pytest.MonkeyPatch,
    command: str,
) -> None:
    pytest.importorskip("fastapi" if command == "serve" else "mcp")
    bank.push_to_hub("user/bank")
    for item in (model, tokenizer, COMPACT):
        item.save_pretrained(tmp_path / "model")
    models = [str(tmp_path / "model")] if command == "serve" else []

    def arguments(*options: str) -> list[str]:
        return [command, *models, *options]

    for name, options, said in (
        ("user/bank", [], "user/bank: no bank there"),
        ("user/nosuch", ["--read-only"], "the Hub has no such dataset"),
    ):
        assert main(arguments(name, *options)) == 2
        assert said in capsys.readouterr().err
    found = []
    if command == "serve":
        patch.setattr("msa_hf.serving.running.serve", lambda app, *rest: found.append(len(app.service.store)) or 0)
        assert main(arguments("user/bank", "--read-only", "--port", "0")) == 0
    else:
        given = parser([command]).parse_args(arguments("user/bank", "--read-only"))
        mcp.check(given)
        found.append(mcp.open_bank(given).stat()["documents"])
    assert found == [len(bank)]


def test_commands_and_the_variables_of_the_hub(hub: FakeHub, bank: MemoryBank, cache: Path) -> None:
    bank.push_to_hub("user/bank")
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_owner"}
    command = [sys.executable, "-m", "msa_hf", "inspect", "user/bank", "--json"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == len(bank) and list(cache.glob("datasets--user--bank"))
