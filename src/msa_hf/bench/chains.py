"""Chains: questions whose facts lie in several documents, far from each other, and twins that nothing answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..evaluation.metrics import exact_match
from ..generation import PromptProtocol
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..model.tokenizing_msa import tokenize_texts
from ..retrieval import FusionWeights
from ..synthetic.chain_corpora import ChainCorpus, ChainQuestion, make_chain_corpus
from ..synthetic.corpora import UNANSWERABLE
from ..synthetic.kinds import CHAIN_KINDS, HOPS, ChainKind
from .asking import Ask, Outcome, put, round_options
from .facts import digest_of, model_facts, run_facts
from .named import ENTITY, without_names
from .result import Axis, Result, Trial

NAME = "chains"
NO_ANSWER = "unanswerable"  # the kind of twins
TABLES = (("kind",), ("tokens",), ("hops", "tokens"), ("kind", "tokens"), ("kind", "distance"), ("twin_of", "tokens"))
MAPS = (("tokens", "distance"),)
ROUNDS = 6  # of retrieval: two more than the longest chain takes
SAMPLED = 256  # documents from which the tokens of a document are estimated
PLANTED = 0.3  # of a corpus at most, about; a small one takes turns in several corpora
PER_QUESTION = 4.2  # documents that a question and its twin take together, about
BLOCK = 4096  # documents made at a time


@dataclass(frozen=True)
class ChainSettings:
    """Settings that the questions and documents of a run depend on.

    Attributes:
        sizes: of corpora, in tokens as the model encodes them, about.
        kinds: of questions, among `CHAIN_KINDS`.
        distances: tokens from one fact of a chain to the next, about, those of a document at least. A size gets those
            up to its half; where there is none, its quarter.
        questions: of each kind, distance and size; as many twins besides.
        prose_share: of the documents.
        refusal: the answer to what the memory does not hold.
        max_new_tokens: of an answer.
        rounds: options of Memory Interleave; `max_rounds` is 6 unless given.
    """

    sizes: Sequence[int] = (16_000, 100_000, 1_000_000)
    kinds: Sequence[ChainKind] = CHAIN_KINDS
    distances: Sequence[int] = (16_000, 256_000, 1_000_000, 10_000_000, 50_000_000)
    questions: int = 10
    seed: int = 0
    prose_share: float = 0.2
    refusal: str = UNANSWERABLE
    max_new_tokens: int = 32
    rounds: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sizes", "kinds", "distances"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty.")
        if min(*self.sizes, *self.distances, self.questions) < 1:
            raise ValueError("Sizes, distances and questions must be at least one each.")

    def distances_in(self, tokens: int) -> list[int]:
        """The distances that fit into a corpus of so many tokens."""
        return [distance for distance in self.distances if distance <= tokens // 2] or [tokens // 4]


@dataclass(frozen=True)
class _World:
    """A corpus of a size, and the place of its questions among all of that size."""

    tokens: int
    number: int
    corpus: ChainCorpus
    mean: float

    def id(self, place: int) -> str:
        question = self.corpus.questions[place]
        return f"{self.tokens} {self.number} {place // 2} {question.kind}{' twin' * (question.broken is not None)}"


def run_chains(
    settings: ChainSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    prose: Sequence[str] = (),
    path: str | Path | None = None,
    *,
    source: str = "",
    name: str = "",
    fusion: FusionWeights | None = None,
    batch_size: int = 8,
    batch_tokens: int = 16384,
    show_progress: bool = True,
) -> Result:
    """Put questions of several hops and kinds to corpora of every size, each with its twin.

    A corpus of a size is encoded once; where the questions do not fit into a small one, there are several. What is
    wrong is asked again with the documents forced and with their texts; the first hop that was not read is noted.

    Args:
        prose: real texts between the invented documents; reprinted where they run out. Those that name an entity that
            is asked about are left out.
        path: of the result, which a run that ended early goes on with.
        source: what the prose is, for the result.
        name: of the model, for the result.
        fusion: weights that the selector "hybrid" fuses by.
        batch_size: questions at a time.
        batch_tokens: tokens encoded at a time.

    Raises:
        ValueError: for settings out of range, sizes too small for the questions, and a file that is of another run.
    """
    given = len(prose)
    worlds, prose = _with_prose(settings, tokenizer, protocol, prose)
    described = {**asdict(settings), "source": source, "prose": digest_of(prose), "prose_texts": len(prose)}
    facts, needed = model_facts(model, tokenizer, protocol, name, fusion), ("tokens", "hop", "stopped", "broke")
    with Result.begin(NAME, described, facts, run_facts(model.device), path, needed) as result:
        result.notes |= {"prose left out": given - len(prose)} if given > len(prose) else {}
        for world in worlds:  # before the first is encoded, which can take hours
            _left(result, world, settings)
        total = sum(len(world.corpus.questions) for world in worlds)
        with tqdm(total=total, unit="question", disable=not show_progress) as progress:
            for world in worlds:
                progress.set_description(f"{world.tokens:,} tokens")
                left = _left(result, world, settings)
                progress.update(len(world.corpus.questions) - len(left))
                if not left:
                    continue
                documents = _documents(world.corpus, protocol)
                rows = documents if protocol is None else protocol.encode_corpus(documents, tokenizer)
                bank = model.encode_documents(rows, tokenizer, batch_tokens=batch_tokens, show_progress=show_progress)
                result.notes[f"corpus {world.tokens} {world.number}"] = {
                    "documents": len(bank),
                    "tokens": bank.num_tokens,
                }
                for trials in _asked(world, left, settings, model, tokenizer, protocol, bank, batch_size, fusion):
                    result.add(trials)
                    progress.update(len(trials))
    return result


def _with_prose(
    settings: ChainSettings,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    prose: Sequence[str],
) -> tuple[list[_World], Sequence[str]]:
    """All corpora, and the prose in them, in which nothing stands about what is asked."""
    while True:
        worlds = [
            world
            for tokens in sorted(set(settings.sizes))
            for world in _worlds(settings, tokens, tokenizer, protocol, prose)
        ]
        kept = without_names(prose, {name for world in worlds for name in _asked_names(world.corpus)})
        if len(kept) == len(prose):
            return worlds, prose
        prose = kept  # by its mean length corpora have other numbers of documents, hence other names


def _asked_names(corpus: ChainCorpus) -> set[str]:
    """The names in questions, of their documents, and in these where the document that comes next is missing."""
    texts = [question.text for question in corpus.questions]
    names = set[str]()
    for question in corpus.questions:
        for place in question.positives:
            names.update(filter(None, corpus.names(place, place + 1)))
            if question.broken == "removed":
                texts += corpus.texts(place, place + 1)
    return names.union(*map(ENTITY.findall, texts))


def _worlds(
    settings: ChainSettings,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    prose: Sequence[str],
) -> Iterator[_World]:
    """Corpora that together have all questions of a size."""
    shape: dict[str, Any] = {"split": "test", "prose": prose, "prose_share": settings.prose_share if prose else 0.0}
    sample = make_chain_corpus(SAMPLED, {}, seed=settings.seed, **shape).texts()
    if protocol is not None:
        sample = [protocol.document.format(id=place, text=text) for place, text in enumerate(sample)]
    mean = sum(map(len, tokenize_texts(tokenizer, sample))) / len(sample)
    if min(settings.distances) < mean and any(HOPS.get(kind) != 1 for kind in settings.kinds):
        raise ValueError(
            f"A distance of {min(settings.distances):,} tokens is less than one document, and each fact has a document "
            f"of its own: the smallest possible is {math.ceil(mean)}. Ask for larger distances."
        )
    documents = round(tokens / mean)
    apart = [max(round(distance / mean), 1) for distance in settings.distances_in(tokens)]
    units = sum(len(apart) if HOPS.get(kind) != 1 else 1 for kind in settings.kinds)
    most = max(int(documents * (1 - shape["prose_share"]) * PLANTED / (PER_QUESTION * units)), 1)
    number, left = 0, settings.questions
    while left:
        count = min(left, most)
        try:
            corpus = make_chain_corpus(
                documents, dict.fromkeys(settings.kinds, count), apart, seed=settings.seed * 1009 + number, **shape
            )
        except ValueError as error:
            if count == 1:
                raise ValueError(
                    f"A corpus of {tokens:,} tokens has {documents} documents, too few for a question of each kind and "
                    f"distance ({str(error).rstrip('.')}). Ask for larger sizes, fewer kinds or fewer distances."
                ) from error
            most = count - 1
            continue
        yield _World(tokens, number, corpus, mean)
        number, left = number + 1, left - count


def _documents(corpus: ChainCorpus, protocol: PromptProtocol | None) -> Iterator[dict[str, object]]:
    for start in range(0, len(corpus), BLOCK):
        for place, text in enumerate(corpus.texts(start, min(start + BLOCK, len(corpus))), start):
            yield {"key": str(place), "text": text}


def _left(result: Result, world: _World, settings: ChainSettings) -> list[int]:
    """The places of the questions that were not asked yet."""
    return [
        place
        for place, question in enumerate(world.corpus.questions)
        if not result.done(world.id(place), question.text, _expected(question, settings))
    ]


def _expected(question: ChainQuestion, settings: ChainSettings) -> tuple[str]:
    return (settings.refusal if question.broken else question.answer,)


def _asked(
    world: _World,
    places: Sequence[int],
    settings: ChainSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    bank: MemoryBank,
    batch_size: int,
    fusion: FusionWeights | None,
) -> Iterator[list[Trial]]:
    """The trials of one batch after the other."""
    questions = [world.corpus.questions[place] for place in places]
    asked = [Ask(question.text, _expected(question, settings), question.rounds) for question in questions]
    rounds = round_options(settings.rounds, fusion)
    if protocol is not None:
        rounds = {"max_rounds": ROUNDS, **rounds}
    starts = list(accumulate((document.tokens for document in bank.documents), initial=0))
    options: dict[str, Any] = {"batch_size": batch_size, "max_new_tokens": settings.max_new_tokens, **rounds}
    outcomes = put(model, tokenizer, bank, protocol, asked, _right, **options)
    rest = iter(zip(places, questions, asked, strict=True))
    for batch in outcomes:
        yield [
            _trial(world.id(place), world, question, ask, outcome, starts)
            for (place, question, ask), outcome in zip(islice(rest, len(batch)), batch, strict=True)
        ]


def _right(answer: str, expected: Sequence[str]) -> bool:
    return all(exact_match(answer, item) for item in expected)


def _trial(id: str, world: _World, question: ChainQuestion, ask: Ask, outcome: Outcome, starts: Sequence[int]) -> Trial:
    gold = question.positives
    axes: dict[str, Axis] = {"tokens": world.tokens}
    if question.distance is not None:
        axes["distance"] = round(question.distance * world.mean)
    if question.broken is not None:
        axes["twin_of"] = question.kind
    elif question.kind in HOPS:
        axes["hops"] = question.hops
    missing = [hop for hop, place in enumerate(gold, 1) if place not in outcome.read]
    if missing and question.kind not in HOPS:
        missing = [len(gold) - len(missing) + 1]
    detail = {
        "broke": outcome.broke,
        "hop": missing[0] if missing else 0,
        "stopped": bool(missing) and len(outcome.read) < len(gold),
        "read": list(outcome.read),
        "gold": list(gold),
        "tokens_apart": [abs(starts[b] - starts[a]) for a, b in pairwise(gold)],
        **({"lacks": question.broken, "lacks_hop": question.broken_hop} if question.broken else {}),
        **outcome.rungs,
    }
    kind = question.kind if question.broken is None else NO_ANSWER
    return Trial(id, kind, axes, question.text, ask.expected, outcome.answer, outcome.right, detail)


def broken_hops(result: Result) -> list[list[str]]:
    """Rows of a table of the hops at which wrong answers broke, by kind; the header alone where nothing was wrong.

    Two entities and two editions have no order: theirs is the first or the second document that was read.
    """
    rows = [["kind", "wrong", "first document missed", "reading stopped there", "rung"]]
    counts: Counter[tuple[str, int, str]] = Counter()
    stopped: Counter[tuple[str, int, str]] = Counter()
    for trial in result.trials:
        if not trial.right and trial.kind != NO_ANSWER:
            key = (trial.kind, trial.detail["hop"], trial.detail["broke"])
            counts[key] += 1
            stopped[key] += trial.detail["stopped"]
    for (kind, hop, broke), count in sorted(counts.items()):
        rows.append([kind, str(count), str(hop) if hop else "none", str(stopped[kind, hop, broke]), broke])
    return rows


def in_words(result: Result) -> list[str]:
    """The outcome of a run in words: a sentence for each size, kind and what broke most."""
    lines = []
    for cell in result.cells("tokens"):
        (tokens,) = cell.values
        answered = [trial for trial in result.trials if trial.axes["tokens"] == tokens and trial.kind != NO_ANSWER]
        twins = [trial for trial in result.trials if trial.axes["tokens"] == tokens and trial.kind == NO_ANSWER]
        lines.append(
            f"{tokens:,} tokens: {sum(trial.right for trial in answered)} of {len(answered)} questions answered, "
            f"{sum(trial.right for trial in twins)} of {len(twins)} twins recognized as unanswerable."
        )
    for kind in CHAIN_KINDS:
        asked = [trial for trial in result.trials if trial.kind == kind]
        wrong = [trial for trial in asked if not trial.right]
        if not wrong:
            continue
        hop, missed = Counter(trial.detail["hop"] for trial in wrong).most_common(1)[0]
        ended = sum(trial.detail["stopped"] for trial in wrong if trial.detail["hop"] == hop)
        how = f", in {ended} of them because reading had stopped" if ended else ""
        where = f"document {hop} was not read{how}" if hop else "all documents were read, and the answer was another"
        lines.append(f"{kind}: {len(wrong)} of {len(asked)} wrong; most often ({missed}) {where}.")
    return lines
