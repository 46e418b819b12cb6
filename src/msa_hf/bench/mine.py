"""Blind spots of a model and its memory on a user's documents: facts planted in them, asked for, and gone again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..retrieval import FusionWeights
from ..synthetic.corpora import UNANSWERABLE
from ..synthetic.hashing import derive_key
from .asking import holds, holds_all, round_options
from .banks import HaystackBanks, haystack_of
from .facts import model_facts, run_facts
from .haystack import Haystack, Plant, depths_of
from .intervals import fisher_test
from .invented import CHAINS, MOST_HOPS, Chain, Chains
from .planting import MOST_PLANTED, Asking, Question, Task, ask_tasks, asked_before
from .report import broken_in_words, short
from .result import Axis, Cell, Result
from .style import insert_in_style, own_terms, own_words

NAME = "mine"
# Each by the kind: a model that answers nothing has all twins right, which is half of the questions.
TABLES = (("kind",), ("kind", "tokens"), ("kind", "hops"), ("kind", "distance"), ("kind", "depth"))
MAPS = (("tokens", "depth"),)
PARTS = (16, 4, 1)  # sizes, if none are given: the whole corpus, and these parts of it
DISTANCES = (0.05, 0.5)  # if none are given
WANTED = 0.9  # a share below it is a blind spot, if its interval is
UNDECIDED = "too few questions to tell (--repeats asks more)"
TWIN = ", unanswerable"
# Each of a term and a number.
TERM_SENTENCES = (
    "The reference number of {term} is {value}.",
    "The reference number {value} belongs to {term}.",
    "Note that {term} has the reference number {value}.",
)
TERM_QUESTIONS = ("What is the reference number of {term}?", "Which reference number does {term} have?")
# What models say that find no answer, besides the refusal that they were trained on.
REFUSALS = (
    *("do not know", "don t know", "no answer", "not mentioned", "not stated", "not provided", "not specified"),
    *("not given", "not say", "unknown", "unanswerable", "cannot be answered", "no information", "does not hold"),
)


@dataclass(frozen=True)
class MineSettings:
    """Settings that the questions of a run depend on, besides the documents.

    Attributes:
        sizes: in tokens, of the first documents; none: the whole corpus, a quarter and a sixteenth of it, those that
            have room for the hops and the distances.
        hops: most facts that a question follows.
        depths: how many places of the first fact, from the first document to the last.
        distances: between a fact and the next, as shares of the size, a document at least; none: a twentieth and a
            half, or the half alone where a size that is asked for, or the corpus, has fewer than 20 documents. Chains
            turn back at the ends, and where neither way is long enough go to the end that is farther away.
        repeats: questions of each kind at each place, each with an unanswerable twin.
        document_tokens: of a document at most; longer ones are cut where a paragraph or sentence ends.
        refusal: what the model says where there is no answer.
        max_new_tokens: of an answer.
        rounds: options of Memory Interleave.
    """

    sizes: Sequence[int] = ()
    hops: int = 3
    depths: int = 3
    distances: Sequence[float] = ()
    repeats: int = 2
    seed: int = 0
    document_tokens: int = 112
    refusal: str = UNANSWERABLE
    max_new_tokens: int = 48
    rounds: Mapping[str, Any] = field(default_factory=dict)


def run_mine(
    settings: MineSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    documents: Sequence[str] | MemoryBank,
    path: str | Path | None = None,
    *,
    source: str = "",
    name: str = "",
    fusion: FusionWeights | None = None,
    batch_size: int = 8,
    batch_tokens: int = 16384,
    show_progress: bool = True,
) -> Result:
    """Plant facts in copies of documents, ask for them, and for what no document states.

    Kinds: `term`, the number of a term made of the documents' own words; `fact`, about an invented entity; `chain`, of
    two facts or more, each about what the one before names; and of each an unanswerable twin, which asks the same of
    what was not planted. A sentence takes the shape of its surroundings: an item of a list, one more in a paragraph.

    Neither files nor bank are changed: planted documents are encoded apart, and banks in memory are put together of
    these and of the rows of all others.

    Args:
        documents: their texts, or a bank of them in memory that this model made, with its texts.
        path: of the result, which a run that ended early goes on with.
        source: what the documents are, for the result.
        name: of the model, for the result.
        fusion: weights that the selector "hybrid" fuses by.

    Raises:
        ValueError: for settings out of range, documents that are too few, and a file that is of another run.
    """
    _check(settings)
    if isinstance(documents, MemoryBank):
        haystack = haystack_of(documents)
    else:
        options: dict[str, Any] = {"least_tokens": 1, "show_progress": show_progress}
        haystack = Haystack(documents, tokenizer, None, settings.document_tokens, **options)
    settings = _fitted(replace(settings, sizes=_sizes(settings, haystack)), haystack, bool(settings.sizes))
    terms = own_terms(own_words(haystack.texts), haystack.texts, settings.depths * settings.repeats, settings.seed)
    chains = _new_chains(settings, haystack.texts)
    tasks = {tokens: list(_tasks(settings, tokens, terms, chains)) for tokens in settings.sizes}
    described = {**asdict(settings), "source": source, "haystack": haystack.digest}
    facts, needed = model_facts(model, tokenizer, protocol, name, fusion), ("tokens", "found", "of", "broke")

    def judge(answer: str, expected: Sequence[str]) -> bool:
        return refuses(answer, settings.refusal) if settings.refusal in expected else holds_all(answer, expected)

    with Result.begin(NAME, described, facts, run_facts(model.device), path, needed) as result:
        result.notes |= {"terms": len(terms), "terms wanted": settings.depths * settings.repeats}
        if all([asked_before(result, task) for made in tasks.values() for task in made]):
            return result
        if isinstance(documents, MemoryBank):
            banks = HaystackBanks(model, tokenizer, protocol, haystack, documents, batch_tokens)
        else:
            wanted = haystack.documents(settings.sizes[-1])
            banks = HaystackBanks.encode(model, tokenizer, protocol, haystack, wanted, batch_tokens, show_progress)
        result.notes["encoding"] = banks.facts
        asking = Asking(
            batch_size, settings.max_new_tokens, round_options(settings.rounds, fusion), judge, insert_in_style
        )
        count = sum(len(task.questions) for made in tasks.values() for task in made)
        with tqdm(total=count, unit="question", disable=not show_progress) as progress:
            for tokens, made in tasks.items():
                progress.set_description(f"{tokens:,} tokens")
                ask_tasks(result, made, haystack.documents(tokens), banks, asking, progress)
    return result


def refuses(answer: str, refusal: str) -> bool:
    """Tell whether an answer says that there is none: by the refusal, or as models usually do."""
    return any(holds(answer, text) for text in (refusal, *REFUSALS))


def _check(settings: MineSettings) -> None:
    if not 1 <= settings.hops <= MOST_HOPS:
        raise ValueError(f"`hops` must be 1 to {MOST_HOPS}, got {settings.hops}.")
    if settings.depths < 1 or settings.repeats < 1:
        raise ValueError("Depths and repeats must be at least one each.")
    if not all(0 <= distance <= 1 for distance in settings.distances):
        raise ValueError(f"`distances` are shares of the size, 0 to 1, got {list(settings.distances)}.")
    if any(size < 1 for size in settings.sizes):
        raise ValueError(f"`sizes` must be positive, got {list(settings.sizes)}.")
    if len({f"{distance:g}" for distance in settings.distances}) < len(settings.distances):  # as trials are named
        raise ValueError(f"`distances` has one twice, to six digits, got {list(settings.distances)}.")
    if not settings.refusal.strip():
        raise ValueError("`refusal` is empty: say what the model answers where there is no answer.")
    if (
        wanted := settings.depths * settings.repeats * (1 + settings.hops * len(settings.distances or DISTANCES))
    ) > CHAINS:
        raise ValueError(f"{wanted} questions were asked for at each size, and there are names for {CHAINS}.")


def _sizes(settings: MineSettings, haystack: Haystack) -> tuple[int, ...]:
    """Numbers of tokens, ascending: those asked for, or parts of the corpus that have room for a chain.

    Raises:
        ValueError: where the documents are too few, or fewer than asked for.
    """
    total, room = haystack.tokens(len(haystack)), settings.hops / MOST_PLANTED
    sizes = sorted({int(size) for size in settings.sizes or (total // part for part in PARTS)})
    if sizes[-1] > total:
        raise ValueError(f"The documents have {total:,} tokens, fewer than the {sizes[-1]:,} of `sizes`.")
    fitting = [size for size in sizes if size and haystack.documents(size) >= room]
    if not fitting or (settings.sizes and len(fitting) < len(sizes)):
        least = haystack.documents(sizes[0])
        raise ValueError(
            f"{least} documents, long ones cut, are too few to plant {settings.hops} facts, for which {round(room)} "
            "are needed: give more documents, larger sizes, fewer hops, or cut them shorter (a bank's when it is made)."
        )
    return tuple(fitting)


def _fitted(settings: MineSettings, haystack: Haystack, asked: bool) -> MineSettings:
    """The settings with sizes and distances that go together: facts lie in documents of their own, so that a distance
    is a document at least.

    Args:
        asked: whether the sizes were asked for; of others those go that are too small.

    Raises:
        ValueError: for a distance that was asked for and is less, naming the smallest possible.
    """
    distances = tuple(settings.distances or DISTANCES)

    def far(distance: float, size: int) -> bool:
        return settings.hops == 1 or distance * haystack.documents(size) > 1 - 1e-9

    sizes = [size for size in settings.sizes if far(min(distances), size)]
    if sizes and (not asked or len(sizes) == len(settings.sizes)):
        return replace(settings, sizes=tuple(sizes), distances=distances)
    if not settings.distances:
        usual = tuple(distance for distance in DISTANCES if far(distance, settings.sizes[0]))
        return replace(settings, distances=usual)
    size = settings.sizes[0 if asked else -1]
    documents = haystack.documents(size)
    digits = 10 ** (len(str(documents)) + 1)
    least = -(-digits // documents) / digits  # rounded up
    raise ValueError(
        f"A distance of {min(distances):g} is less than one of the {documents} documents that have {size:,} tokens, "
        f"and each fact has a document of its own: the smallest possible is {least:g}. Ask for larger distances, or "
        "larger sizes."
    )


def _new_chains(settings: MineSettings, texts: Sequence[str]) -> list[Chain]:
    """A chain for each question at a size, whose names are in no document: they could be there in an earlier report.

    Raises:
        ValueError: where the documents name too many.
    """
    wanted = [
        hops
        for _ in range(settings.repeats)
        for hops in range(1, settings.hops + 1)
        for _ in range(settings.depths * (len(settings.distances) if hops > 1 else 1))
    ]
    chains, whole, numbers, found = Chains(settings.seed), "\n".join(texts), iter(range(CHAINS)), list[Chain]()
    while len(found) < len(wanted):
        if (number := next(numbers, None)) is None:
            raise ValueError(f"The documents name nearly all entities of seed {settings.seed}; take another `seed`.")
        chain = chains.chain(number, wanted[len(found)])
        if not any(name in whole for name in chain.names):
            found.append(chain)
    return found


def _tasks(
    settings: MineSettings, tokens: int, terms: Sequence[tuple[str, str]], chains: Sequence[Chain]
) -> Iterator[Task]:
    """All tasks at one size, the kinds in turns; the same ones at every size."""
    number, term = 0, iter(terms)
    depths = depths_of(settings.depths)
    shapes = [(1, 0.0), *((hops, far) for hops in range(2, settings.hops + 1) for far in settings.distances)]
    for repeat in range(settings.repeats):
        # Depths in turns inside a kind, so that those that share a bank do not crowd at one of them.
        yield from (_term(settings, tokens, depth, repeat, pair) for depth, pair in zip(depths, term, strict=False))
        for hops, distance in shapes:
            for depth in depths:
                yield _chain(settings, tokens, depth, repeat, hops, distance, chains[number], number)
                number += 1


def _chain(
    settings: MineSettings,
    tokens: int,
    depth: float,
    repeat: int,
    hops: int,
    distance: float,
    made: Chain,
    number: int,
) -> Task:
    axes: dict[str, Axis] = {"tokens": tokens, "depth": depth, "hops": hops}
    depths = depths_apart(depth, distance, hops)
    if hops > 1:  # not what was asked for where there was no room for it
        axes["distance"] = round(min(abs(there - here) for here, there in pairwise(depths)) * tokens)
    steps = [None, *(there - here for here, there in pairwise(depths))]
    plants = tuple(
        Plant(sentence, place, _place(settings.seed, number, hop), step)
        for hop, (sentence, place, step) in enumerate(zip(made.sentences, depths, steps, strict=True))
    )
    kind = "fact" if hops == 1 else "chain"
    id = f"{kind} {hops} {tokens} {depth:g} {distance:g} {repeat}"
    gold = tuple(range(hops))
    return Task(
        plants,
        (
            Question(id, kind, axes, made.question, (made.answer,), gold),
            Question(f"{id}{TWIN}", kind + TWIN, axes, made.twin, (settings.refusal,), ()),
        ),
    )


def _term(settings: MineSettings, tokens: int, depth: float, repeat: int, terms: tuple[str, str]) -> Task:
    key = derive_key("term", settings.seed, *terms)
    value = str(10**6 + key % (9 * 10**6))
    sentence = TERM_SENTENCES[key % len(TERM_SENTENCES)].format(term=terms[0], value=value)
    question = TERM_QUESTIONS[key // 7 % len(TERM_QUESTIONS)]
    axes: dict[str, Axis] = {"tokens": tokens, "depth": depth, "hops": 1}
    id = f"term {tokens} {depth:g} {repeat}"
    return Task(
        (Plant(sentence, depth, _place(settings.seed, terms[0])),),
        (
            Question(id, "term", axes, question.format(term=terms[0]), (value,), (0,)),
            Question(f"{id}{TWIN}", "term" + TWIN, axes, question.format(term=terms[1]), (settings.refusal,), ()),
        ),
    )


def depths_apart(depth: float, distance: float, count: int) -> list[float]:
    """Depths from the first one on, each so far from the one before: on, or back where that would be beyond an end.

    Where both ways are too short, it is the end that is farther away.
    """
    depths, step = [depth], distance
    for _ in range(count - 1):
        following = [round(depths[-1] + one, 9) for one in (step, -step)]
        if not 0.0 <= following[0] <= 1.0:
            step = -step
        fitting = [place for place in following if 0.0 <= place <= 1.0]
        depths.append(fitting[0] if fitting else 0.0 if depths[-1] > 0.5 else 1.0)
    return depths


def _place(*parts: int | str) -> float:
    return derive_key("place", *parts) % 1001 / 1000


# In words ---------------------------------------------------------------------------------------------------------


def in_words(result: Result) -> list[str]:
    """The blind spots of a model and its memory in words: by kind, size, hops, distance, and what broke."""
    lines = [f"{cell.right} of {cell.asked} questions right, {cell}." for cell in result.cells()]
    for cell in result.cells("kind"):
        (kind,) = cell.values
        state = "blind" if cell.high < WANTED and cell.asked > 1 else "sees well" if cell.low >= WANTED else UNDECIDED
        lines.append(f"{kind}: {cell.right} of {cell.asked} right, {cell}: {state}.")
    answerable = [trial for trial in result.trials if not trial.kind.endswith(TWIN)]
    some = Result(result.benchmark, {}, {}, trials=answerable)
    for axis, words in (
        ("tokens", "size, {} tokens"),
        ("hops", "{} hops"),
        ("distance", "a distance of {} tokens between facts"),
        ("depth", "depth {}"),
    ):
        lines += _contrast(axis, words, some.cells(axis))
    lines += broken_in_words(result)
    terms, wanted = (result.notes.get(name) for name in ("terms", "terms wanted"))
    if isinstance(terms, int) and terms < (1 if wanted is None else wanted):
        lines.append(
            f"{terms or 'No'} terms were asked for{f', of {wanted} wanted' * bool(wanted)}: the documents have too few "
            "words of small letters of their own."
        )
    return lines


def _contrast(axis: str, words: str, cells: Sequence[Cell]) -> list[str]:
    """The effect of an axis on the answers: its best and worst values, if they differ by more than chance."""
    if len(cells) < 2:
        return []
    worst, best = min(cells, key=lambda cell: cell.share), max(cells, key=lambda cell: cell.share)
    pairs = len(cells) * (len(cells) - 1) / 2
    p = fisher_test(best.right, best.asked, worst.right, worst.asked) * pairs
    if p > 0.05:
        return [f"By {axis}: no difference beyond chance ({worst} to {best})."]
    said = [f"{words.format(short(cell.values[0]))}: {cell}" for cell in (best, worst)]
    return [f"By {axis}: best at {said[0]}; worst at {said[1]}; more than chance."]
