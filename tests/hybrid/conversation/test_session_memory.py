"""What stands in a prompt: the pinned, the state and the last turns always, the older ones that fit; nobody else's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from scripted import COMPACT, byte_tokenizer, memory_model
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.evaluation import exact_match, make_corpus
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.hybrid.chat import PromptTooLong
from msa_hf.hybrid.conversation import (
    Conversation,
    SessionContext,
    SessionMemory,
    Turn,
    count_tokens,
    remember_turns,
)
from msa_hf.hybrid.conversation.context import LEFT_OUT
from msa_hf.hybrid.conversation.session_memory import _largest
from msa_hf.hybrid.store import SQLiteStore

pytest.importorskip("tantivy")
TOKENIZER = byte_tokenizer()
MODEL = memory_model(TOKENIZER, COMPACT)
TINY = Path(__file__).parents[3] / "model_cards" / "msa-hf-tiny"


def words(context: SessionContext) -> int:
    return len(context.text().split())


@pytest.fixture
def store(tmp_path: Path) -> SQLiteStore:
    return SQLiteStore(tmp_path / "store.db")


def memory_of(store: SQLiteStore, session: str, bank: BankStore, **options: object) -> SessionMemory:
    return SessionMemory(store, session, bank, count=words, mode="lexical", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_budgets_hold_and_what_must_be_there_is_there(store: SQLiteStore, seed: int) -> None:
    pick = random.Random(seed)
    vocabulary = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath"]
    with BankStore(MODEL, None, TOKENIZER) as bank:
        talk = Conversation(store, "s")
        for number in range(pick.choice([0, 1, 3, 25])):
            talk.append("user" if number % 2 else "assistant", " ".join(pick.choices(vocabulary, k=pick.randint(1, 9))))
        for name in pick.sample(vocabulary, pick.randint(0, 2)):
            talk.pin(name, f"always {name}")
            talk.set_state(name, {"of": name})
        turns = talk.turns()
        for budget in (3, 12, 25, 40, 60, 120, 1000):
            least = pick.randint(0, 3)
            memory = memory_of(store, "s", bank, budget=budget, least_recent=least, k=3, recent_share=pick.random())
            question = f"where is {pick.choice(vocabulary)}?"
            must = SessionContext(question, talk.pins(), talk.state(), turns[len(turns) - min(least, len(turns)) :])
            if words(must) > budget:
                with pytest.raises(PromptTooLong, match=f"{words(must)} tokens, the budget is {budget}"):
                    memory.context(question)
                continue
            context = memory.context(question)
            assert context.tokens == words(context) <= budget and context.missing == ()
            text = context.text()
            for name, pinned in talk.pins().items():
                assert f"{name}: {pinned}" in text and f'{name} = {{"of": "{name}"}}' in text
            recent = len(context.recent)
            assert recent >= len(must.recent) and list(context.recent) == turns[len(turns) - recent :]
            older = {turn.number: turn.text for turn in turns[: len(turns) - recent]}
            assert all(older[item.number] == item.text for item in context.remembered)
            assert len(context.remembered) <= 3 and text.endswith(question)
            if words(SessionContext(question, talk.pins(), talk.state(), turns)) <= budget:
                assert recent == len(turns)
            partition = memory.partition(context)
            assert {document.text for document in partition.documents} == set(older.values())


def test_what_fits_is_found_without_asking_for_much_more() -> None:
    for most in range(20):
        for least in range(most + 1):
            for limit in range(least, most + 2):
                asked: list[int] = []

                def fits(count: int, limit: int = limit, asked: list[int] = asked) -> bool:
                    asked.append(count)
                    return count <= limit

                assert _largest(fits, least, most) == min(limit, most)
                assert max(asked, default=0) <= 2 * max(limit, 1) + 1 and least not in asked


def test_older_turns_are_remembered_as_they_are_now(store: SQLiteStore) -> None:
    with BankStore(MODEL, None, TOKENIZER) as bank:
        talk = Conversation(store, "s")
        talk.append("user", "My cat is called Birch.")
        talk.append("assistant", "What a fine name for a cat.")
        for number in range(10):
            talk.append("user", f"Something else, for the {number}th time, to fill the room that there is.")
        memory = memory_of(store, "s", bank, budget=60)
        context = memory.context("What is the name of my cat?")
        assert {item.number for item in context.remembered} == {1, 2}
        (message,) = context.messages()  # all of the user's
        assert message.content.startswith("Something else") and message.content.endswith("name of my cat?")
        assert "\n\nFrom earlier turns:\n[turn 1, user] My cat is called Birch.\n[turn 2, assi" in message.content
        talk.edit(1, "My cat is called Cedar.")
        talk.forget(2)
        context = memory.context("What is the name of my cat?")
        assert [item.text for item in context.remembered] == ["My cat is called Cedar."]
        assert "Birch" not in str([document.text for document in bank.documents])


def test_sessions_do_not_see_each_other(store: SQLiteStore) -> None:
    with BankStore(MODEL, None, TOKENIZER) as bank:
        names = {"a": "Amber", "a/1": "Birch", "b": "Cedar"}
        for session, name in names.items():
            talk = Conversation(store, session)
            talk.append("user", f"My secret word is {name}.")
            talk.pin("word", f"pinned {name}")
            for number in range(4):
                talk.append("user", f"More of {name}, for the {number}th time.")
        remember_turns(store, bank)
        bank.upsert("document", "The secret word of the company is Dune.")
        for session, name in names.items():
            for mode in ("lexical", "router"):
                memory = memory_of(store, session, bank, budget=40, k=20)
                memory.mode = mode
                context = memory.context("What is my secret word?")
                others = [other for other in [*names.values(), "Dune"] if other != name]
                assert f"My secret word is {name}." in context.text()
                assert not [other for other in others if other in context.text()]
                assert len(memory.partition()) == 5


def test_a_reader_says_what_it_cannot_see_yet(
    store: SQLiteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    talk = Conversation(store, "s")
    for number in range(6):
        talk.append("user", f"Turn {number} says amber or birch or cedar.")
    with BankStore(MODEL, tmp_path / "bank", TOKENIZER) as writer:
        reader = BankStore(MODEL, tmp_path / "bank", TOKENIZER, read_only=True)
        memory = memory_of(store, "s", reader, budget=40)
        context = memory.context("amber?")
        assert context.missing == (1, 2, 3, 4) and not context.remembered
        assert "4 older turns are not in the bank yet" in caplog.text
        assert remember_turns(store, writer) == 6
        context = memory.context("amber?")
        assert context.missing == () and context.remembered


def test_mistakes_are_named(store: SQLiteStore) -> None:
    with BankStore(MODEL, None, TOKENIZER) as bank:
        with pytest.raises(ValueError, match="Name the `tokenizer`"):
            SessionMemory(store, "s", bank)
        for name in ("budget", "k", "part_tokens"):
            with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
                memory_of(store, "s", bank, **{name: 0})
        with pytest.raises(ValueError, match="`recent_share`"):
            memory_of(store, "s", bank, recent_share=1.5)


def test_roles_of_messages_alternate() -> None:
    turns = [Turn(number, role, f"t{number}", 0.0, 1) for number, role in enumerate(["assistant", "user", "user"], 4)]

    def roles(*turns: Turn, **pins: str) -> str:
        return " ".join(message.role[0] for message in SessionContext("q", pins, {}, turns).messages())

    assert roles(*turns) == "u a u" and roles(*turns, name="Ana") == "s u a u" and roles() == "u"
    context = SessionContext("q", {}, {}, turns)
    assert [message.content for message in context.messages()] == [LEFT_OUT, "t4", "t5\n\nt6\n\nq"]
    greeting = Turn(1, "assistant", "hello", 0.0, 1)
    assert roles(greeting, turns[1]) == "a u"


def test_tokens_are_counted_as_the_model_gets_them() -> None:
    context = SessionContext("Why?", {"name": "Ana"}, {"n": 1}, ())
    tokenizer = byte_tokenizer()
    assert count_tokens(tokenizer)(context) == len(tokenizer(context.text())["input_ids"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ids = tokenizer.apply_chat_template(
        [item.to_dict() for item in context.messages()], add_generation_prompt=True, return_dict=False
    )
    assert count_tokens(tokenizer)(context) == len(ids) > 40


def test_the_shipped_model_answers_from_the_turns_of_the_session_alone(tmp_path: Path, store: SQLiteStore) -> None:
    """Forty facts about invented entities, told to two sessions in turn, and eight questions."""
    model = MSAForCausalLM.from_pretrained(TINY, dtype="float32").eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(TINY), PromptProtocol.from_pretrained(TINY)
    corpus = make_corpus(40, seed=5, split="test")
    told = list(corpus.texts())
    talks = [Conversation(store, name) for name in ("ana", "ben")]
    for number, text in enumerate(told):
        talks[number % 2].append("user", text)
    questions = corpus.questions(8, "one_hop")
    right = found = 0
    with BankStore(model, tmp_path / "bank", tokenizer, protocol) as bank:
        for question in questions:
            number = question.positives[0]
            for half, talk in enumerate(talks):
                memory = SessionMemory(store, talk.session, bank, tokenizer, budget=600, k=2)
                context = memory.context(question.text)
                assert (told[number] in context.text()) <= (number % 2 == half)
                if number % 2 != half:
                    continue
                found += told[number] in context.text()
                asker = MemoryInterleave(
                    model, tokenizer, memory.partition(), protocol, documents_per_round=1, max_rounds=1
                )
                answer = asker.ask(question.text)
                assert all(source.key.startswith(f"{talk.session}/") for source in answer.documents)
                right += exact_match(answer.text, question.answer) > 0
        assert len(bank) == 40
    assert found >= 7 and right >= 5
