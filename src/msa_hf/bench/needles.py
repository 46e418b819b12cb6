"""Needles in haystacks: sentences planted at every depth of haystacks of every size, and asked for (RULER's family)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.memory_msa import MemoryBank
from ..model.modeling_msa import MSAForCausalLM
from ..retrieval import FusionWeights
from ..synthetic.hashing import derive_key
from ..synthetic.needles import SEVERAL, TASKS, VALUES, NeedleTask, NeedleTasks
from .asking import round_options
from .banks import HaystackBanks, haystack_of
from .facts import model_facts, run_facts
from .haystack import Haystack, Plant, depths_of
from .planting import Asking, Question, Task, ask_tasks, asked_before, check_room
from .report import broken_in_words
from .result import Axis, Result

NAME = "needles"
TABLES = (("kind",), ("tokens",), ("kind", "tokens"), ("values",), ("values", "tokens"))
MAPS = (("tokens", "depth"),)


@dataclass(frozen=True)
class NeedleSettings:
    """Settings that the questions and haystacks of a run depend on.

    Attributes:
        sizes: of haystacks, in tokens without what wraps the documents; of a bank, with it.
        tasks, values: among those of `msa_hf.synthetic.needles`.
        depths: how many, from the first document to the last.
        repeats: tasks for each kind, kind of values and depth; the same ones at every size.
        document_tokens: of a haystack's documents at most.
        max_new_tokens: of an answer, for each value that is asked for.
        rounds: options of Memory Interleave.
    """

    sizes: Sequence[int] = (16_000, 64_000, 256_000, 1_000_000)
    tasks: Sequence[str] = TASKS
    values: Sequence[str] = VALUES
    depths: int = 5
    repeats: int = 4
    seed: int = 0
    document_tokens: int = 112
    max_new_tokens: int = 64
    rounds: Mapping[str, Any] = field(default_factory=dict)


def run_needles(
    settings: NeedleSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    texts: Iterable[str] | MemoryBank,
    path: str | Path | None = None,
    *,
    source: str = "",
    name: str = "",
    fusion: FusionWeights | None = None,
    batch_size: int = 8,
    batch_tokens: int = 16384,
    show_progress: bool = True,
) -> Result:
    """Plant needles at every depth of haystacks of every size, and ask for them.

    The haystack is encoded once; a smaller one is its beginning. The needles of a size lie in banks of its own, so that
    they disturb no other size, and the same tasks are put at every size.

    Args:
        texts: of the haystack, in order; no more are read than the largest size takes. Or a bank in memory that the
            model made, with its texts, whose documents are not cut: for several runs over one haystack.
        path: of the result, which a run that ended early goes on with.
        source: what the texts are, for the result.
        name: of the model, for the result.
        fusion: weights that the selector "hybrid" fuses by.
        batch_size: questions at a time.
        batch_tokens: tokens encoded at a time.

    Raises:
        ValueError: for settings out of range, texts that are too few, and a file that is of another run.
    """
    sizes = sorted(set(settings.sizes))
    _check(settings)
    if isinstance(texts, MemoryBank):
        haystack = haystack_of(texts, sizes[-1])
    else:
        haystack = Haystack(texts, tokenizer, sizes[-1], settings.document_tokens, show_progress=show_progress)
    taken = NeedleTasks(settings.seed).keys_in(haystack.texts)
    tasks = {tokens: list(needle_tasks(settings, tokens, taken)) for tokens in sizes}
    check_room(haystack, sizes[0], max(len(task.plants) for task in tasks[sizes[0]]))
    described = {**asdict(settings), "source": source, "haystack": haystack.digest}
    facts = model_facts(model, tokenizer, protocol, name, fusion)
    needed = ("tokens", "found", "of")
    with Result.begin(NAME, described, facts, run_facts(model.device), path, needed) as result:
        pending = [tokens for tokens in sizes if not all([asked_before(result, task) for task in tasks[tokens]])]
        if not pending:
            return result
        if isinstance(texts, MemoryBank):
            banks = HaystackBanks(model, tokenizer, protocol, haystack, texts, batch_tokens)
        else:
            wanted = haystack.documents(pending[-1])
            banks = HaystackBanks.encode(model, tokenizer, protocol, haystack, wanted, batch_tokens, show_progress)
        result.notes["encoding"] = banks.facts
        asking = Asking(batch_size, settings.max_new_tokens, round_options(settings.rounds, fusion))
        with tqdm(total=sum(map(len, tasks.values())), unit="question", disable=not show_progress) as progress:
            for tokens in sizes:
                progress.set_description(f"{tokens:,} tokens")
                ask_tasks(result, tasks[tokens], haystack.documents(tokens), banks, asking, progress)
    return result


def _check(settings: NeedleSettings) -> None:
    wanted = len(settings.tasks) * len(settings.values) * settings.depths * settings.repeats
    if wanted < 1 or not settings.sizes or min(settings.sizes) < 1:
        raise ValueError("Sizes, tasks, kinds of values, depths and repeats must be at least one each.")
    if wanted > (keys := len(NeedleTasks(settings.seed))):
        raise ValueError(f"{wanted} tasks were asked for at each size, and there are keys for {keys}: ask for fewer.")


def needle_tasks(settings: NeedleSettings, tokens: int, taken: Collection[str] = ()) -> Iterator[Task]:
    """All tasks at one size, the kinds in turns, so that a run that is cut short has some of each.

    Args:
        taken: keys that stand in the haystack, of which no task is made.

    Raises:
        ValueError: where too few keys are left.
    """
    tasks = NeedleTasks(settings.seed)
    numbers = (number for number in range(len(tasks)) if not set(taken).intersection(tasks.keys(number)))
    for repeat in range(settings.repeats):
        for depth in depths_of(settings.depths):
            for values in settings.values:
                for name in settings.tasks:
                    if (number := next(numbers, None)) is None:
                        raise ValueError(f"{len(taken)} keys stand in the texts, and too few are left: ask for fewer.")
                    made = tasks.task(name, values, number)
                    id = f"{name} {values} {tokens} {depth:g} {repeat}"
                    axes: dict[str, Axis] = {"tokens": tokens, "depth": depth, "values": values}
                    gold = tuple(range(len(made.answers)))
                    question = Question(id, name, axes, made.question, made.answers, gold)
                    yield Task(_plants(made, depth, derive_key("plants", settings.seed, number)), (question,))


def _plants(task: NeedleTask, depth: float, key: int) -> tuple[Plant, ...]:
    """The places of needles: the first at the depth, others spread over the rest, each somewhere in its document."""
    count = len(task.needles)
    return tuple(
        Plant(
            needle.sentence,
            (depth + number / count) % 1.0 if number else depth,
            derive_key("place", key, number) % 1001 / 1000,
        )
        for number, needle in enumerate(task.needles)
    )


def score(result: Result, **axes: object) -> float:
    """RULER's score of the trials with these axes or kind: the mean share of the expected values in an answer.

    Raises:
        ValueError: where there are none.
    """
    shares = [
        trial.detail["found"] / trial.detail["of"]
        for trial in result.trials
        if all({**trial.axes, "kind": trial.kind}.get(name) == value for name, value in axes.items())
    ]
    if not shares:
        raise ValueError(f"No trials with {axes}.")
    return sum(shares) / len(shares)


def in_words(result: Result) -> list[str]:
    """The outcome of a run in words: a sentence for each size, and what broke most."""
    lines = []
    for cell in result.cells("tokens"):
        (tokens,) = cell.values
        lines.append(
            f"{tokens:,} tokens: {cell.right} of {cell.asked} questions answered in full ({cell}), "
            f"RULER's score {score(result, tokens=tokens):.3f}."
        )
    lines += broken_in_words(result)
    several = [item for item in result.cells("kind") if item.values[0] in ("multi_value", "multi_query")]
    if several:
        lines.append(f"An answer to multi_value and multi_query counts as right with all {SEVERAL} values alone.")
    return lines
