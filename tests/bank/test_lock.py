"""One writer at a time: who holds a bank, and when it lets go."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from helpers.fake_model import FakeModel, contents

from msa_hf.bank import BankLocked, BankStore
from msa_hf.model.bank_writer_msa import BankWriter


@pytest.mark.parametrize("task", ["upsert", "compact"])
def test_closing_waits_for_the_commit_of_another_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    bank = BankStore(FakeModel(), tmp_path)
    for text in ("first", "second"):
        bank.upsert(text, text)
    inside, go_on = threading.Event(), threading.Event()
    commit = BankWriter.commit

    def waiting(writer: BankWriter, manifest: object) -> None:
        inside.set()
        assert go_on.wait(10)
        commit(writer, manifest)  # type: ignore[arg-type]

    monkeypatch.setattr(BankWriter, "commit", waiting)
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
