"""Questions put to a model over a bank, and for those it gets wrong the rung that broke."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import normalize_answer
from ..evaluation.prompting import Writer
from ..generation import PromptProtocol
from ..generation.asking import asker_of
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.modes_msa import evaluating
from ..retrieval import FusionWeights, add_lexical_index

# What went wrong, as `Outcome.broke` says it; in the order in which a question meets them.
ROUTING = "routing"  # right once the documents that hold the answer are forced
DISTRACTORS = "distractors"  # these were read, but others beside them
MEMORY = "memory"  # wrong with them forced, right with their texts alone in the prompt and no memory
READER = "reader"  # wrong even then: the model does not read such sentences
INVENTED = "invented"  # there was no answer, and it gave one
RUNGS = {
    ROUTING: "the documents were not found; with them forced the answer is right",
    DISTRACTORS: "the documents were found, but what was read beside them misled",
    MEMORY: "wrong over the memory even with the documents forced, right with their texts and no memory",
    READER: "wrong even with the texts in the prompt: the model does not read such sentences",
    INVENTED: "an answer to what the memory does not hold",
}

Judge = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True)
class Ask:
    """A question to a bank.

    Attributes:
        expected: what the answer must hold, all of it; for what cannot be answered, the refusal.
        rounds: positions of the documents that hold the answer, by the round of retrieval that should find them; none
            where it cannot be answered.
    """

    question: str
    expected: tuple[str, ...]
    rounds: tuple[tuple[int, ...], ...] = ()

    @property
    def gold(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(position for found in self.rounds for position in found))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a question.

    Attributes:
        found: how many of the expected texts the answer holds.
        read: positions of the documents that were read, in order; of a checkpoint without protocol, attended to.
        broke: "" where it is right, else a key of `RUNGS`.
        rungs: what was answered on the rungs that were tried: "forced_gold", "gold_text".
    """

    answer: str
    right: bool
    found: int
    read: tuple[int, ...]
    broke: str = ""
    rungs: dict[str, str] = field(default_factory=dict)


def holds(answer: str, expected: str) -> bool:
    """Tell whether an answer holds a text as whole words, without case, articles and punctuation, as RULER counts."""
    wanted = normalize_answer(expected)
    return bool(wanted) and f" {wanted} " in f" {normalize_answer(answer)} "


def holds_all(answer: str, expected: Sequence[str]) -> bool:
    """Tell whether an answer holds every one of these texts."""
    return all(holds(answer, item) for item in expected)


def round_options(rounds: Mapping[str, Any], fusion: FusionWeights | None) -> dict[str, Any]:
    """The options of Memory Interleave: those of a benchmark's settings, and the fusion weights, if there are any."""
    return dict(rounds) if fusion is None else {**rounds, "fusion": fusion}


def index_words(bank: MemoryBank, rounds: Mapping[str, Any]) -> None:
    """Give a bank in memory the lexical index that the selector "hybrid" asks; for other selectors nothing is made.

    The index is made of the bank's own texts (9 MB of text a second on one core), so that it is right whatever was
    planted in them.

    Raises:
        ImportError: where tantivy is missing.
    """
    if rounds.get("select") == "hybrid" and "lexical" not in bank.indexes:
        add_lexical_index(bank)


def put(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    bank: MemoryBank,
    protocol: PromptProtocol | None,
    questions: Sequence[Ask],
    judge: Judge = holds_all,
    *,
    ladder: bool = True,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    **options: Any,
) -> Iterator[list[Outcome]]:
    """Put questions, a batch at a time, and see what broke for those that come out wrong.

    Args:
        judge: whether an answer holds what was expected.
        ladder: ask what was wrong again with the gold documents forced, then with their texts and no memory.
        options: of Memory Interleave (`select`, `max_rounds`, `documents_per_round`, ...), where there is a protocol.
            A bank that "hybrid" is to read from is given its lexical index here.

    Yields:
        The outcomes of a batch, in order.

    Raises:
        ValueError: for a question that is too long, and options that make no sense here.
    """
    index_words(bank, options)
    asker = asker_of(model, tokenizer, bank, protocol, max_new_tokens=max_new_tokens, **options)
    writer = Writer(model, tokenizer, bank, protocol, max_new_tokens)
    with evaluating(model):
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            answers = asker.ask([item.question for item in part], batch_size=batch_size)
            outcomes = []
            for item, answer in zip(part, answers, strict=True):
                read = tuple(source.position for source in answer.documents)
                found = sum(judge(answer.text, [wanted]) for wanted in item.expected)
                outcomes.append(Outcome(answer.text, judge(answer.text, item.expected), found, read))
            yield _laddered(writer, part, outcomes, judge) if ladder else outcomes


def _laddered(writer: Writer, asked: Sequence[Ask], outcomes: Sequence[Outcome], judge: Judge) -> list[Outcome]:
    """The outcomes, with the rung that broke for those that are wrong."""
    wrong = [place for place, item in enumerate(outcomes) if not item.right and asked[place].gold]
    climbed = {place: dict[str, str]() for place in wrong}
    broke = {place: INVENTED for place, item in enumerate(outcomes) if not item.right and not asked[place].gold}
    for place, text in _written(writer, asked, wrong, memory=True):
        climbed[place]["forced_gold"] = text
        if judge(text, asked[place].expected):
            missing = set(asked[place].gold) - set(outcomes[place].read)
            broke[place] = ROUTING if missing else DISTRACTORS
    left = [place for place in wrong if place not in broke]
    for place, text in _written(writer, asked, left, memory=False):
        climbed[place]["gold_text"] = text
        broke[place] = MEMORY if judge(text, asked[place].expected) else READER
    return [
        Outcome(item.answer, item.right, item.found, item.read, broke.get(place, ""), climbed.get(place, {}))
        for place, item in enumerate(outcomes)
    ]


def _written(writer: Writer, asked: Sequence[Ask], places: Sequence[int], memory: bool) -> Iterator[tuple[int, str]]:
    """The model's answer behind the gold texts; with the memory, over the gold documents and no others.

    A checkpoint without protocol reads no texts over a memory, so that it gets the documents alone there.
    """
    if not places:
        return
    texts = not memory or writer.protocol is not None
    prompts = [writer.prompt(asked[place].question, asked[place].rounds if texts else ())[0] for place in places]
    forced = [list(asked[place].gold) for place in places] if memory else None
    yield from zip(places, writer.write(prompts, memory, forced), strict=True)
