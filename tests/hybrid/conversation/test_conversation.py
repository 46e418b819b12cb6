"""Turns, pinned texts and state, written by several at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from forking import ended, forked

from msa_hf.hybrid.conversation import Conversation, sessions
from msa_hf.hybrid.store import Item, ItemTooLarge, MemoryStore, StoreFormatError

Opener = Callable[..., MemoryStore]


def test_a_session_keeps_turns_pins_and_state(open_store: Opener) -> None:
    store = open_store()
    talk, other = Conversation(store, "ana"), Conversation(store, "ana#2")
    for number in range(1, 13):
        turn = talk.append("user" if number % 2 else "assistant", f"text {number}")
        assert turn.number == number
    other.append("user", "of another session")
    assert [turn.text for turn in talk.turns()] == [f"text {number}" for number in range(1, 13)]
    assert [turn.number for turn in talk.turns(last=3)] == [10, 11, 12]
    edited = talk.edit(11, "said better")
    assert edited.version > talk.turns()[9].version and talk.turns(last=2)[0] == edited
    talk.forget(12)
    assert [turn.text for turn in talk.turns(last=2)] == ["text 10", "said better"]
    assert [turn.text for turn in talk.all_turns()][-2:] == ["said better", None]
    for call in (lambda: talk.edit(12, "back"), lambda: talk.forget(12), lambda: talk.forget(13)):
        with pytest.raises(KeyError, match="has no turn 1"):
            call()
    assert Conversation(store, "ana").append("user", "after the forgotten one").number == 13

    talk.pin("name", "Ana")
    talk.pin("name", "Ana Silva")
    talk.pin("diet", "no nuts")
    assert talk.pins() == {"diet": "no nuts", "name": "Ana Silva"} and talk.unpin("diet") and not talk.unpin("diet")
    talk.set_state("step", {"at": [1, None]})
    talk.set_state("none", None)
    assert talk.state() == {"none": None, "step": {"at": [1, None]}} and talk.delete_state("none")
    assert (other.pins(), other.state(), len(other.turns())) == ({}, {}, 1)
    assert list(sessions(store)) == ["ana", "ana#2"]


def test_turns_of_many_writers_are_all_there_in_one_order(open_store: Opener) -> None:
    store = open_store()
    talk = Conversation(store, "busy")

    def talk_in(conversation: Conversation, name: str) -> None:
        for number in range(8):
            conversation.append("user", f"{name} {number}")

    children = [forked(lambda name=name: talk_in(Conversation(store, "busy"), name)) for name in ("c", "d")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(talk_in, [talk, Conversation(store, "busy")], "ab"))
    assert ended(*children) == [0, 0]
    turns = talk.turns()
    assert [turn.number for turn in turns] == list(range(1, 33))
    assert sorted(str(turn.text) for turn in turns) == sorted(f"{name} {n}" for name in "abcd" for n in range(8))
    for name in "abcd":  # those of one writer in its order
        own = [turn.text for turn in turns if str(turn.text).startswith(name)]
        assert own == [f"{name} {number}" for number in range(8)]


def test_no_change_of_the_state_is_lost(open_store: Opener) -> None:
    talk = Conversation(open_store(), "shop")

    def add(number: int) -> None:
        talk.update_state("cart", lambda cart: [*(cart if isinstance(cart, list) else []), number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(16)))
    cart = talk.state()["cart"]
    assert isinstance(cart, list) and sorted(cart) == list(range(16))


def test_turns_expire(open_store: Opener) -> None:
    now = 1000.0
    store = open_store(clock=lambda: now)
    talk = Conversation(store, "short", ttl=10)
    first = talk.append("user", "first")
    now = 1005.0
    talk.append("user", "second")
    now = 1010.0
    assert [turn.text for turn in talk.turns()] == ["second"]
    now = 1100.0
    again = Conversation(store, "short", ttl=10).append("user", "the first again")
    assert (again.number, talk.turns()) == (1, [again]) and again.version > first.version


def test_mistakes_are_named(open_store: Opener) -> None:
    store = open_store()
    for name in ("", "x" * 901):
        with pytest.raises(ValueError, match="`session` must be a name"):
            Conversation(store, name)
    talk = Conversation(store, "s")
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="`text` must be a text that is not empty"):
            talk.append("user", text)
    with pytest.raises(ValueError, match="`role` must be one of"):
        talk.append("robot", "text")
    with pytest.raises(ItemTooLarge, match="Split it"):
        talk.append("user", "x" * 500_000)
    with pytest.raises(ItemTooLarge):
        talk.pin("x" * 2000, "text")
    with pytest.raises(ValueError, match="as JSON"):
        talk.set_state("object", object())
    assert talk.turns() == [] and talk.state() == {}
    store.put(Item("session#s", "turn#000000000001", "turn", {"words": 3}))
    with pytest.raises(StoreFormatError, match="is no turn"):
        talk.turns()
