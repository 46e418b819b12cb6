"""A bank has every living turn once, whatever happened to those that write and remember."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from fake_model import FakeModel, contents
from forking import ended, forked
from scripted import COMPACT, byte_tokenizer, memory_model

from msa_hf.bank import BankStore
from msa_hf.hybrid.conversation import Conversation, forget_lost_turns, remember_turns, sessions
from msa_hf.hybrid.store import MemoryStore, SQLiteStore


def texts(bank: BankStore) -> dict[str, str]:
    return {key: text for key, (text, *_) in contents(bank.snapshot()).items()} if len(bank) else {}


def expected(store: MemoryStore) -> dict[str, str]:
    return {
        f"{name}/{turn.number:012}/0000": str(turn.text)
        for name in sessions(store)
        for turn in Conversation(store, name).turns()
    }


def live(talks: list[Conversation], pick: random.Random, step: int) -> None:
    """A random event of a random session."""
    talk = pick.choice(talks)
    turns = talk.turns()
    action = pick.random()
    if action < 0.6 or not turns:
        talk.append("user", f"text {step} " + "x" * pick.randint(0, 9))
    elif action < 0.8:
        talk.edit(pick.choice(turns).number, f"edited in {step}")
    else:
        talk.forget(pick.choice(turns).number)


def test_a_bank_follows_sessions_and_doing_it_again_changes_nothing(fast_path: Path) -> None:
    pick = random.Random(1)
    store = SQLiteStore(fast_path / "store.db")
    talks = [Conversation(store, name) for name in ("a", "a/000000000001", "é")]
    model = FakeModel()
    with BankStore(model, fast_path / "bank") as bank:
        bank.upsert("a/notes", "of somebody else")
        for step in range(80):
            live(talks, pick, step)
            if pick.random() < 0.3:
                remember_turns(store, bank, None if pick.random() < 0.5 else ["a", "a/000000000001", "é"])
                found = texts(bank)
                assert found.pop("a/notes") == "of somebody else" and found == expected(store)
                generation, encoded = bank.generation, len(model.encoded)
                assert remember_turns(store, bank) == 0
                assert (bank.generation, len(model.encoded)) == (generation, encoded)
        remember_turns(store, bank)
        turn = talks[0].append("assistant", "the last")
        assert remember_turns(store, bank) == 1
        document = bank.get(f"a/{turn.number:012}/0000")
        assert document is not None and document.version == turn.version
        assert document.metadata == {
            "session": "a",
            "turn": turn.number,
            "role": "assistant",
            "at": turn.at,
            "parts": 1,
        }


def test_killed_writers_and_rememberers_lose_nothing_and_remember_nothing_twice(fast_path: Path) -> None:
    """10 kills at random moments of one that writes turns and remembers them."""
    pick = random.Random(2)
    store = SQLiteStore(fast_path / "store.db")
    with BankStore(FakeModel(), fast_path / "bank"):
        pass

    def work(seed: int, pipe: int) -> None:
        mine, random_of_mine = SQLiteStore(fast_path / "store.db"), random.Random(seed)
        talks = [Conversation(mine, name) for name in ("a", "b")]
        with BankStore(FakeModel(), fast_path / "bank") as bank:
            os.write(pipe, b"x")
            for step in range(10_000):
                live(talks, random_of_mine, step)
                if step % 3 == 2:
                    remember_turns(mine, bank)

    behind = 0
    for seed in range(10):
        reader, writer = os.pipe()
        child = forked(lambda seed=seed, writer=writer: work(seed, writer))
        os.read(reader, 1)
        time.sleep(pick.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        ended(child)
        os.close(reader)
        os.close(writer)
        with BankStore(FakeModel(), fast_path / "bank") as bank:
            behind += texts(bank) != expected(store)
            remember_turns(store, bank)  # those that announced a write are all that have news
            assert texts(bank) == expected(store)
    assert behind > 1 and len(expected(store)) > 10


def test_a_session_stays_announced_until_its_write_must_have_happened(fast_path: Path) -> None:
    now = 1000.0
    store = SQLiteStore(fast_path / "store.db", clock=lambda: now)
    talk = Conversation(store, "s")
    talk.append("user", "first")
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        assert remember_turns(store, bank, grace=60) == 1
        now = 1060.0
        assert (remember_turns(store, bank, grace=60), [item.sort for item in store.query("pending")]) == (0, ["s"])
        now = 1060.1
        assert (remember_turns(store, bank, grace=60), list(store.query("pending"))) == (0, [])
        talk.append("user", "second")
        assert remember_turns(store, bank) == 1


def test_long_turns_become_documents_and_shorter_ones_leave_none_behind(fast_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    store = SQLiteStore(fast_path / "store.db")
    talk = Conversation(store, "s")
    long = " ".join(f"Sentence {number} is here." for number in range(40))
    talk.append("user", long)
    with BankStore(model, fast_path / "bank", tokenizer, COMPACT) as bank:
        remember_turns(store, bank, part_tokens=100)
        found = {document.key: document.text or "" for document in bank.documents}
        assert len(found) > 5 and "".join(found[key] for key in sorted(found)) == long
        assert max(document.tokens for document in bank.documents) < 130
        talk.edit(1, long[:150])
        remember_turns(store, bank, part_tokens=100)
        found = {document.key: document.text or "" for document in bank.documents}
        assert len(found) == 2 and "".join(found[key] for key in sorted(found)) == long[:150]
        talk.forget(1)
        remember_turns(store, bank, part_tokens=100)
        assert len(bank) == 0
    with BankStore(FakeModel(), fast_path / "other") as other, pytest.raises(ValueError, match="with its tokenizer"):
        Conversation(store, "s").append("user", long)
        remember_turns(store, other, part_tokens=100)


def test_turns_that_the_store_lost_are_forgotten(fast_path: Path) -> None:
    now = 1000.0
    store = SQLiteStore(fast_path / "store.db", clock=lambda: now)
    Conversation(store, "short", ttl=10).append("user", "gone soon")
    Conversation(store, "long").append("user", "stays")
    with BankStore(FakeModel(), fast_path / "bank") as bank:
        bank.upsert("short/book", "no turn", metadata={"session": "short", "turn": 1})
        remember_turns(store, bank)
        assert forget_lost_turns(store, bank) == 0
        now = 1020.0
        assert forget_lost_turns(store, bank) == 1
        assert set(texts(bank).values()) == {"no turn", "stays"}
