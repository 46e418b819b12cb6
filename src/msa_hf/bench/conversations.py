"""Questions about long conversations, put to a model that has them in a store and a bank, in a bank alone, or not."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..bank import BankStore
from ..evaluation.lexical import BM25, require_bm25s
from ..evaluation.prompting import Writer
from ..generation import PromptProtocol
from ..generation.asking import asker_of
from ..hybrid.conversation import Conversation, SessionMemory, remember_turns
from ..hybrid.store import SQLiteStore
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..retrieval import FusionWeights
from ..synthetic.conversations import NEVER_SAID, LongConversation, TalkQuestion, make_conversation
from ..synthetic.conversations.statements import pin_of
from ..synthetic.corpora import UNANSWERABLE
from .asking import INVENTED, RUNGS, holds, index_words, round_options
from .facts import digest_of, model_facts, run_facts
from .named import without_names
from .report import short
from .result import Result, Trial

SESSION = "talk"
LONGER = 1.5  # times the tokens that were asked for: so much longer a conversation is told of
TABLES = (("arm", "tokens"), ("arm", "tokens", "kind"), ("arm", "sort"))
MAPS = (("tokens", "arm"),)
REFUSALS = (NEVER_SAID, UNANSWERABLE, "I do not know", "I don't know")
ARMS = {
    "store": "pinned facts and recent turns from the store, older ones from the bank",
    "bank": "the bank alone, by the model's routers or as --select says",
    "lexical": "the turns that BM25 ranks highest",
    "none": "the question alone",
    "gold": "the turns that hold the answer, and no others: what the reader can do",
}
# What went wrong, besides `INVENTED`.
NOT_FOUND = "not found"  # turns that hold the answer were not read
STALE = "stale"  # an answer that held once
MISREAD = "misread"  # they were read, and another answer was given
REASONS = {
    NOT_FOUND: "turns that hold the answer were not read",
    STALE: "a value that held once, or was taken back",
    MISREAD: "all turns that hold the answer were read, and another one was given",
    INVENTED: RUNGS[INVENTED],
}


@dataclass(frozen=True)
class ConversationSettings:
    """Settings by which a conversation is made and asked about.

    Attributes:
        seed, asked: of `make_conversation`.
        sizes: of conversations, in tokens.
        arms: names in `ARMS`.
        k: older turns that "store" adds to a prompt, and turns that "lexical" reads.
        budget: tokens of the prompt that "store" makes.
        mode: how "store" searches its bank: "router", "lexical" or "hybrid".
        refusals: answers that say that the memory does not hold what is asked.
        max_new_tokens: of an answer.
        rounds: options of Memory Interleave, for the arm "bank".

    Raises:
        ValueError: for an unknown arm.
    """

    sizes: tuple[int, ...] = (100_000,)
    seed: int = 0
    asked: int = 10
    arms: tuple[str, ...] = ("store", "bank", "lexical", "none", "gold")
    k: int = 4
    budget: int = 768
    mode: str = "router"
    refusals: tuple[str, ...] = REFUSALS
    max_new_tokens: int = 64
    rounds: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.arms if name not in ARMS]:
            raise ValueError(f"`arms` must be among {', '.join(ARMS)}, got {unknown[0]!r}.")


class Kept:
    """A conversation as a model keeps it: its turns in a store, and each of them in a bank.

    Args:
        folder: where the store lies; the bank lies in memory.
        budget: tokens of the prompts of the arm "store", which must have room for every question; None: no such arm.

    Attributes:
        bank: the turns, and only they.
        places: number of a turn -> positions of its documents.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        protocol: PromptProtocol | None,
        talk: LongConversation,
        folder: str | Path,
        batch_tokens: int = 16384,
        show_progress: bool = False,
        budget: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.protocol, self.talk = model, tokenizer, protocol, talk
        self.store = SQLiteStore(Path(folder) / "store.sqlite")
        conversation = Conversation(self.store, SESSION)
        for turn in tqdm(list(talk.turns()), "Storing", unit="turn", disable=not show_progress):
            conversation.append(turn.role, turn.text)
            if (pin := pin_of(turn.text)) is not None:
                conversation.pin(*pin)
        options = {"batch_tokens": batch_tokens, "show_progress": show_progress}
        self.opened = BankStore(model, None, tokenizer, protocol, device=model.device, encode_options=options)
        if budget is not None:  # said before all is encoded, which can take hours
            asked = SessionMemory(self.store, SESSION, self.opened, tokenizer, budget=budget)
            asked.check_budget(max((question.text for question in talk.questions), key=len))
        remember_turns(self.store, self.opened)
        self.bank: MemoryBank = self.opened.snapshot()
        self.places: dict[int, list[int]] = {}
        for position, document in enumerate(self.bank.documents):
            self.places.setdefault(number_of(document.metadata), []).append(position)
        self.pinned = {pin[1]: turn.number for turn in talk.turns() if (pin := pin_of(turn.text)) is not None}

    def close(self) -> None:
        """Close store and bank."""
        self.opened.close()
        self.store.close()


def number_of(metadata: dict[str, object] | None) -> int:
    """The number of the turn that a document is of."""
    return int(str((metadata or {})["turn"]))


class Arm(Protocol):
    """A way of answering a question about a conversation that is kept."""

    def __call__(self, kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
        """The answer, and the numbers of the turns that were read for it, in order."""


def _written(kept: Kept, writer: Writer, question: TalkQuestion, numbers: Sequence[int]) -> tuple[str, list[int]]:
    """An answer from the texts of these turns and no memory."""
    numbers = [number for number in dict.fromkeys(numbers) if number in kept.places]
    positions = [position for number in numbers for position in kept.places[number]]
    prompt, left_out = writer.prompt(question.text, [positions] if positions else [])
    (answer,) = writer.write([prompt])
    shown = set(positions[: len(positions) - left_out])
    return answer, [number for number in numbers if shown.issuperset(kept.places[number])]


class StoreArm:
    """Pinned facts and recent turns from the store, older turns from the bank: what a `SessionMemory` shows."""

    def __init__(self, kept: Kept, settings: ConversationSettings) -> None:
        self.memory = SessionMemory(
            kept.store,
            SESSION,
            kept.opened,
            kept.tokenizer,
            budget=settings.budget,
            k=settings.k,
            mode=settings.mode,
        )

    def __call__(self, kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
        context = self.memory.context(question.text)
        pinned = [kept.pinned[text] for text in context.pins.values()]
        # The nearest to the question last; pinned turns first, as they stand in the prompt of a chat model.
        numbers = [*pinned, *(item.number for item in context.remembered), *(turn.number for turn in context.recent)]
        return _written(kept, writer, question, numbers)


class BankArm:
    """The bank alone: turns are selected as the settings' rounds say, by default by the model's routers, and read."""

    def __init__(self, kept: Kept, settings: ConversationSettings, fusion: FusionWeights | None = None) -> None:
        options = {**round_options(settings.rounds, fusion), "max_new_tokens": settings.max_new_tokens}
        index_words(kept.bank, settings.rounds)
        self.asker = asker_of(kept.model, kept.tokenizer, kept.bank, kept.protocol, **options)

    def __call__(self, kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
        answer = self.asker.ask(question.text)
        numbers = [number_of(kept.bank.documents[source.position].metadata) for source in answer.documents]
        return answer.text, list(dict.fromkeys(numbers))


class LexicalArm:
    """The turns that BM25 ranks highest, in their order."""

    def __init__(self, kept: Kept, settings: ConversationSettings) -> None:
        self.k = settings.k
        self.numbers = [turn.number for turn in kept.talk.turns()]
        self.ranking = BM25([turn.text for turn in kept.talk.turns()])

    def __call__(self, kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
        best = sorted(self.numbers[place] for place in self.ranking.best(question.text, self.k))
        return _written(kept, writer, question, best)


def _from_nothing(kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
    return _written(kept, writer, question, ())


def _from_gold(kept: Kept, writer: Writer, question: TalkQuestion) -> tuple[str, list[int]]:
    return _written(kept, writer, question, question.evidence)


def _arm(name: str, kept: Kept, settings: ConversationSettings, fusion: FusionWeights | None) -> Arm:
    if name == "store":
        return StoreArm(kept, settings)
    if name == "bank":
        return BankArm(kept, settings, fusion)
    if name == "lexical":
        return LexicalArm(kept, settings)
    return _from_gold if name == "gold" else _from_nothing


def expected_of(question: TalkQuestion, refusals: Sequence[str]) -> tuple[str]:
    """The answer that a trial names: the first of the refusals where there is none."""
    return (refusals[0] if question.answer is None else question.answer,)


def judged(question: TalkQuestion, answer: str, read: Sequence[int], refusals: Sequence[str]) -> tuple[bool, str]:
    """Judge whether an answer is right, and what broke if it is not.

    An answer that names a value of a former time beside the right one is wrong: nothing says which of them it means.
    Where the question names that value itself, an answer may repeat it; unless it names the right one too, to choose.
    """
    choice = question.answer is not None and holds(question.text, question.answer)
    others = [value for value in question.stale if choice or not holds(question.text, value)]
    old = any(holds(answer, value) for value in others)
    if question.answer is None:
        right = any(holds(answer, text) for text in refusals)
        return right, "" if right else STALE if old else INVENTED
    if holds(answer, question.answer) and not old:
        return True, ""
    if not set(question.evidence) <= set(read):
        return False, NOT_FOUND
    stale = not choice and any(holds(answer, value) for value in question.stale)
    return False, STALE if stale else MISREAD


def run_conversations(
    settings: ConversationSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    filler: Sequence[str] = (),
    path: str | Path | None = None,
    *,
    source: str = "generated",
    name: str = "",
    fusion: FusionWeights | None = None,
    batch_tokens: int = 16384,
    show_progress: bool = False,
) -> Result:
    """Make conversations of all sizes, and put every question in every arm.

    Args:
        filler: of `make_conversation`; `source` says what it is. Texts that name somebody who is asked about are left
            out.
        path: of the result, which goes on where an earlier run ended.
        name: of the model.
        fusion: weights that the arm "bank" fuses by, with the selector "hybrid".

    Raises:
        ImportError: for the arm "lexical" where bm25s is missing.
        ResultError: for a file of another run.
    """
    if "lexical" in settings.arms:
        require_bm25s()  # said before the work
    given, filler = len(filler), without_names(filler, _asked_about(settings))
    kept_settings = {**asdict(settings), "filler": source, "filler_texts": digest_of(filler)}
    facts = model_facts(model, tokenizer, protocol, name, fusion)
    needed = ("tokens", "arm", "broke")
    with Result.begin("conversations", kept_settings, facts, run_facts(model.device), path, needed) as result:
        result.notes |= {"texts left out": given - len(filler)} if given > len(filler) else {}
        for tokens in settings.sizes:
            _measure(tokens, settings, model, tokenizer, protocol, filler, result, batch_tokens, show_progress, fusion)
    return result


def _asked_about(settings: ConversationSettings) -> set[str]:
    """The people in questions, who are the same at every size."""
    questions = make_conversation(1, settings.seed, settings.asked).questions
    return {person for question in questions for person, _ in question.seen}


def _measure(
    tokens: int,
    settings: ConversationSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    filler: Sequence[str],
    result: Result,
    batch_tokens: int,
    show_progress: bool,
    fusion: FusionWeights | None,
) -> None:
    """Add a trial of a conversation of about so many tokens for each question and arm that has none."""
    talk = make_conversation(tokens, settings.seed, settings.asked, filler)
    wanted = [
        (name, number)
        for name in settings.arms
        for number, question in enumerate(talk.questions)
        if not result.done(f"{tokens} {name} {number}", question.text, expected_of(question, settings.refusals))
    ]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder, evaluating(model):
        budget = settings.budget if any(name == "store" for name, _ in wanted) else None
        kept = Kept(model, tokenizer, protocol, talk, folder, batch_tokens, show_progress, budget)
        try:
            result.notes[f"conversation of {tokens}"] = {
                "sessions": len(talk.sessions),
                "turns": sum(1 for _ in talk.turns()),
                "tokens": kept.bank.num_tokens,
            }
            writer = Writer(model, tokenizer, kept.bank, protocol, settings.max_new_tokens)
            for trial in _trials(kept, writer, tokens, wanted, settings, show_progress, fusion):
                result.add([trial])
        finally:
            kept.close()


def _trials(
    kept: Kept,
    writer: Writer,
    tokens: int,
    wanted: Sequence[tuple[str, int]],
    settings: ConversationSettings,
    show_progress: bool,
    fusion: FusionWeights | None,
) -> Iterator[Trial]:
    arms: dict[str, Arm] = {}
    for name, number in tqdm(wanted, f"Asking, {tokens} tokens", unit="question", disable=not show_progress):
        if name not in arms:
            arms = {name: _arm(name, kept, settings, fusion)}  # one at a time
        question = kept.talk.questions[number]
        answer, read = arms[name](kept, writer, question)
        right, broke = judged(question, answer, read, settings.refusals)
        found = sum(one in set(read) for one in question.evidence)
        yield Trial(
            f"{tokens} {name} {number}",
            question.kind,
            {"tokens": tokens, "arm": name, "sort": question.sort},
            question.text,
            expected_of(question, settings.refusals),
            answer,
            right,
            {"broke": broke, "evidence": len(question.evidence), "found": found, "read": list(read)},
        )


def in_words(result: Result) -> list[str]:
    """The outcome in words, a sentence for each arm and size."""
    sentences = []
    for cell in result.cells("tokens", "arm"):
        tokens, arm = cell.values
        wrong = [
            trial
            for trial in result.trials
            if not trial.right and (trial.axes["tokens"], trial.axes["arm"]) == cell.values
        ]
        broke = ", ".join(
            f"{count} {name}" for name, count in Counter(str(w.detail["broke"]) for w in wrong).most_common()
        )
        sentence = f"{short(tokens)} tokens, {ARMS[str(arm)]}: {cell} of {cell.asked} questions right"
        sentences.append(f"{sentence}; wrong: {broke}." if broke else f"{sentence}.")
    for tokens in (cell.values[0] for cell in result.cells("tokens")):
        found = result.notes.get(f"conversation of {tokens}", {}).get("tokens", 0)
        if found > LONGER * int(tokens):  # by a tokenizer of short pieces, or because the questions take as much
            sentences.append(f"The conversation of {short(tokens)} tokens has {found:,}, as this model encodes it.")
    return sentences
