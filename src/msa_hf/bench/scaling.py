"""The scaling curve: the same questions, answered in banks of every size, and what is lost from first to last."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..bank import place_bank
from ..bank.tiered.plan import PlacementOptions
from ..evaluation.metrics import exact_match
from ..evaluation.recall import JudgedFields
from ..generation import PromptProtocol
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..retrieval import FusionWeights
from ..synthetic.corpora import UNANSWERABLE, Corpus, Question, make_corpus
from .asking import Ask, Outcome, put, round_options
from .facts import digest_of, model_facts, run_facts
from .intervals import Z95, sign_test
from .named import ENTITY
from .nested import Filler, NestedDocuments, documents_of, encode_nested, first_documents
from .report import short
from .result import Result, Trial

TABLES = (("tokens",), ("kind", "tokens"))
MAPS = (("tokens", "kind"),)
KINDS = ("one_hop", "two_hop", "unanswerable")
TIMES = (2, 4, 16)  # as many questions are made, where some of them are the same
DOCUMENT = 110  # tokens of an invented document, or fewer
PAPER = 0.088  # lost from 16K to 100M tokens (MSA, arXiv 2603.23516)


@dataclass(frozen=True)
class AskedQuestion:
    """A question with its documents.

    Attributes:
        rounds: positions among the documents asked about, by the round of retrieval that should find them.
    """

    text: str
    answer: str
    kind: str
    rounds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AskedDocuments:
    """The documents that all banks have, and the questions about them.

    Attributes:
        names: of invented entities, which no filler may name.
    """

    texts: tuple[str, ...]
    questions: tuple[AskedQuestion, ...]
    names: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A name that tells these questions and documents from others."""
        return digest_of([*self.texts, *(repr(astuple(item)) for item in self.questions)])


@dataclass(frozen=True)
class ScalingSettings:
    """Settings that a run depends on.

    Attributes:
        sizes: of the banks in tokens, ascending; the first must hold all that is asked about.
        seed: of filler, numbers and invented questions.
        refusal: the answer to what the memory does not hold.
        max_new_tokens: of an answer.
        rounds: options of Memory Interleave.
        placement: where keys and content lie, as `PlacementOptions`; None: a bank in one place.
    """

    sizes: tuple[int, ...]
    seed: int = 0
    refusal: str = UNANSWERABLE
    max_new_tokens: int = 32
    rounds: Mapping[str, Any] = field(default_factory=dict)
    placement: PlacementOptions | None = None

    def __post_init__(self) -> None:
        if list(self.sizes) != sorted(set(self.sizes)) or not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"`sizes` must be numbers of tokens that ascend, got {list(self.sizes)}.")


def invented_questions(tokens: int, asked: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> AskedDocuments:
    """Questions of each kind about an invented corpus of at most so many tokens, in which all their documents are.

    Raises:
        ValueError: for fewer tokens than questions need, and where they have not so many different ones.
    """
    count = tokens // DOCUMENT
    if count < 20:
        raise ValueError(f"The smallest bank must have at least {20 * DOCUMENT} tokens, got {tokens}.")
    corpus = make_corpus(count, seed=seed, split="test", prose_share=0.0)
    questions = [
        AskedQuestion(item.text, item.answer, item.kind, item.rounds if item.kind != "unanswerable" else ())
        for kind in kinds
        for item in _different(corpus, asked, kind, seed)
    ]
    names = {*filter(None, corpus.names()), *(name for item in questions for name in ENTITY.findall(item.text))}
    return AskedDocuments(tuple(corpus.texts()), tuple(questions), tuple(sorted(names)))


def _different(corpus: Corpus, asked: int, kind: str, seed: int) -> list[Question]:
    """Questions of which no two are the same, as small corpora have them: one put twice would count as two.

    Raises:
        ValueError: where the corpus has fewer.
    """
    for times in (1, *TIMES):
        found = {item.text: item for item in corpus.questions(times * asked, kind, seed=seed)}  # type: ignore[arg-type]
        if len(found) >= asked:
            return list(found.values())[:asked]
    raise ValueError(
        f"The smallest bank has {len(corpus)} documents, which have {len(found)} different questions of the kind "
        f"{kind}, and {asked} were asked for: ask fewer (--asked), or make the smallest size larger (--sizes)."
    )


def given_questions(questions: Sequence[JudgedFields], texts: Mapping[str, str]) -> AskedDocuments:
    """Questions of a user, and the documents that they are about.

    Args:
        questions: with `answer`; `positives` or `rounds` are keys of documents, none where nothing answers.
        texts: of documents, by key.

    Raises:
        ValueError: for a question without an answer, and a document that is not there.
    """
    places: dict[str, int] = {}
    made = []
    for number, item in enumerate(questions):
        keys = item.get("rounds") or [[key] for key in item.get("positives", ())]
        answer = item.get("answer")
        if keys and answer is None:
            raise ValueError(f"Question {number} ({item['question']!r:.60}) has documents but no `answer`.")
        for key in (key for group in keys for key in group):
            if key not in texts:
                raise ValueError(f"Question {number} is about the document {key!r}, which is not among the documents.")
            places.setdefault(key, len(places))
        rounds = tuple(tuple(places[key] for key in group) for group in keys)
        kind = item.get("kind") or ("answerable" if rounds else "unanswerable")
        made.append(AskedQuestion(item["question"], answer or "", kind, rounds))
    return AskedDocuments(tuple(texts[key] for key in places), tuple(made))


def run_scaling(
    settings: ScalingSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    asked: AskedDocuments,
    filler: Filler,
    path: str | Path | None = None,
    *,
    source: str = "invented",
    name: str = "",
    fusion: FusionWeights | None = None,
    batch_size: int = 8,
    batch_tokens: int = 16384,
    workers: int = 0,
    show_progress: bool = False,
) -> Result:
    """Encode the largest bank, and put all questions to each of its beginnings.

    Args:
        filler: what stands behind the documents asked about; `source` says what it is.
        path: of the result, which goes on where an earlier run ended.
        fusion: weights that the selector "hybrid" fuses by.
        workers: processes that make texts and tokens.

    Raises:
        HaystackTooSmall: where the filler ends before the largest size.
        ValueError: where the documents asked about do not fit the smallest size.
        ResultError: for a file of another run.
    """
    facts = model_facts(model, tokenizer, protocol, name, fusion)
    documents = NestedDocuments(tokenizer, protocol, asked.texts, filler, settings.sizes[-1], settings.seed, workers)
    if not documents.fit_into(settings.sizes[0]):  # said before the largest bank is encoded, which can take hours
        raise ValueError(
            f"The {len(asked.texts)} documents asked about have more than {settings.sizes[0]:,} tokens, the smallest "
            "size. Ask for larger sizes, or fewer questions."
        )
    kept = {
        **asdict(settings),
        "filler": source,
        "filler_texts": filler.digest,
        "asked": asked.digest,
        "questions": len(asked.questions),
        "documents": len(asked.texts),
    }
    with Result.begin("scaling", kept, facts, run_facts(model.device), path, ("tokens",)) as result:
        left = {size: _left(result, asked, size) for size in settings.sizes}
        if not any(left.values()):
            return result
        placed = settings.placement is not None
        start = time.monotonic()
        whole = encode_nested(
            model,
            tokenizer,
            documents,
            batch_tokens=batch_tokens,
            bank_device="cpu" if placed else None,
            show_progress=show_progress,
        )
        seconds = round(time.monotonic() - start, 1)
        result.notes["encoding"] = {"seconds": seconds, "tokens": whole.num_tokens, "documents": len(whole)}
        for size, questions in left.items():
            if questions:
                bank = first_documents(whole, documents_of(whole, size))
                _ask(
                    settings,
                    model,
                    tokenizer,
                    protocol,
                    asked,
                    bank,
                    size,
                    questions,
                    result,
                    batch_size,
                    show_progress,
                    fusion,
                )
    return result


def _left(result: Result, asked: AskedDocuments, size: int) -> list[int]:
    return [number for number, item in enumerate(asked.questions) if not result.done(f"{size} {number}", item.text)]


def _ask(
    settings: ScalingSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    asked: AskedDocuments,
    bank: MemoryBank,
    size: int,
    numbers: Sequence[int],
    result: Result,
    batch_size: int,
    show_progress: bool,
    fusion: FusionWeights | None,
) -> None:
    """Put questions to a bank, and keep what came of each."""
    memory: Any = bank
    if settings.placement is not None:
        memory = place_bank(bank, model.device, settings.placement, model=model, tokenizer=tokenizer)
    asks = [_asked(asked.questions[number], settings.refusal) for number in numbers]
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, **round_options(settings.rounds, fusion)}
    start = time.monotonic()
    batches = put(model, tokenizer, memory, protocol, asks, _right, batch_size=batch_size, **options)
    place = 0
    with tqdm(total=len(asks), desc=f"Asking, {short(size)} tokens", disable=not show_progress) as progress:
        for batch in batches:
            result.add(_trials(asked, numbers[place : place + len(batch)], asks[place:], batch, size))
            place += len(batch)
            progress.update(len(batch))
    result.notes[f"bank of {size}"] = {
        "tokens": bank.num_tokens,
        "documents": len(bank),
        "seconds for a question": round((time.monotonic() - start) / len(asks), 3),
        "placement": "one place" if settings.placement is None else str(memory.plan),
    }


def _asked(question: AskedQuestion, refusal: str) -> Ask:
    answer = question.answer if question.rounds else refusal
    return Ask(question.text, (answer,), question.rounds)


def _right(answer: str, expected: Sequence[str]) -> bool:
    return all(exact_match(answer, item) for item in expected)


def _trials(
    asked: AskedDocuments, numbers: Sequence[int], asks: Sequence[Ask], outcomes: Sequence[Outcome], size: int
) -> Iterator[Trial]:
    for number, ask, outcome in zip(numbers, asks, outcomes, strict=False):
        found = sum(position in outcome.read for position in ask.gold)
        yield Trial(
            f"{size} {number}",
            asked.questions[number].kind,
            {"tokens": size},
            ask.question,
            ask.expected,
            outcome.answer,
            outcome.right,
            {"broke": outcome.broke, "gold": len(ask.gold), "found": found, **outcome.rungs},
        )


@dataclass(frozen=True)
class Loss:
    """The loss of right answers from the first size to the last, by the same questions.

    Attributes:
        first, last: shares.
        asked: questions.
        low, high: the 95 % interval of `first - last`, of pairs.
        p: the chance of so uneven a change, were both sizes alike (sign test).
    """

    sizes: tuple[int, int]
    first: float
    last: float
    asked: int
    low: float
    high: float
    p: float

    @property
    def relative(self) -> float:
        """The loss as a share of what the first size had, as the paper gives it; 0 where that is nothing."""
        return (self.first - self.last) / self.first if self.first else 0.0

    def __str__(self) -> str:
        told = (
            f"From {short(self.sizes[0])} to {short(self.sizes[1])} tokens {self.first:.3f} became {self.last:.3f} of "
            f"{self.asked} questions: "
        )
        if not self.first:
            return f"{told}none was right at first, so that none can be lost (p = {self.p:.2f})."
        # More than all cannot be lost, however wide the interval of a few questions is.
        low, high = (100 * min(points / self.first, 1.0) for points in (self.low, self.high))
        return f"{told}{100 * self.relative:.1f} % lost (95 %: {low:.1f} to {high:.1f}; p = {self.p:.2f})."


def loss(result: Result, kind: str | None = None) -> Loss | None:
    """The loss from the first to the last size, of all questions or of a kind; None for fewer than two sizes."""
    sizes = sorted({int(trial.axes["tokens"]) for trial in result.trials})
    if len(sizes) < 2:
        return None
    first, last = (
        {
            trial.id.partition(" ")[2]: trial.right
            for trial in result.trials
            if trial.axes["tokens"] == size and kind in (None, trial.kind)
        }
        for size in (sizes[0], sizes[-1])
    )
    both = sorted(first.keys() & last.keys())
    if not both:
        return None
    lost = sum(first[item] and not last[item] for item in both)
    gained = sum(last[item] and not first[item] for item in both)
    count, difference = len(both), (lost - gained) / len(both)
    # Of pairs that changed; half a pair on each side, so that no change at all is not taken for certain.
    spread = (lost + gained + 1 - (lost - gained) ** 2 / count) / count**2
    half = Z95 * math.sqrt(spread)
    shares = sum(first[item] for item in both) / count, sum(last[item] for item in both) / count
    low, high = max(difference - half, -1.0), min(difference + half, 1.0)
    return Loss((sizes[0], sizes[-1]), *shares, count, low, high, sign_test(gained, lost))


def in_words(result: Result) -> list[str]:
    """The outcome in words: the loss of all questions, and of each kind."""
    found = [("", loss(result))]
    found += [(f"{kind}: ", loss(result, kind)) for kind in dict.fromkeys(trial.kind for trial in result.trials)]
    lines = [f"{kind}{item}" for kind, item in found if item is not None]
    return [*lines, f"The paper lost {100 * PAPER:.1f} % from 16K to 100M tokens."] if lines else []
