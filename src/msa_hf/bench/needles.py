"""Needles in haystacks: sentences planted at every depth of haystacks of every size, and asked for (RULER's family)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..generation import PromptProtocol
from ..model.modeling_msa import MSAForCausalLM
from ..synthetic.hashing import derive_key
from ..synthetic.needles import SEVERAL, TASKS, VALUES, NeedleTask, NeedleTasks
from .asking import RUNGS, Ask, put
from .banks import HaystackBanks
from .facts import model_facts, run_facts
from .haystack import Haystack, Plant, depths_of
from .result import Axis, Result, Trial

NAME = "needles"
MOST_PLANTED = 0.25  # of a bank's documents: in a small haystack the tasks take turns in several banks
TABLES = (("kind",), ("tokens",), ("kind", "tokens"), ("values",), ("values", "tokens"))
MAPS = (("tokens", "depth"),)


@dataclass(frozen=True)
class NeedleSettings:
    """What the questions and haystacks of a run depend on.

    Attributes:
        sizes: of haystacks, in tokens without what wraps the documents.
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


@dataclass(frozen=True)
class _Item:
    """A task with its place among the others."""

    name: str
    values: str
    depth: float
    repeat: int
    task: NeedleTask
    plants: tuple[Plant, ...]

    def id(self, tokens: int) -> str:
        return f"{self.name} {self.values} {tokens} {self.depth:g} {self.repeat}"


def run_needles(
    settings: NeedleSettings,
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    texts: Iterable[str],
    path: str | Path | None = None,
    *,
    source: str = "",
    name: str = "",
    batch_size: int = 8,
    batch_tokens: int = 16384,
    show_progress: bool = True,
) -> Result:
    """Plant needles at every depth of haystacks of every size, and ask for them.

    The haystack is encoded once; a smaller one is its beginning. The needles of a size lie in banks of its own, so that
    they disturb no other size, and the same tasks are put at every size.

    Args:
        texts: of the haystack, in order; no more are read than the largest size takes.
        path: of the result, which a run that ended early goes on with.
        source: what the texts are, for the result.
        name: of the model, for the result.
        batch_size: questions at a time.
        batch_tokens: tokens encoded at a time.

    Raises:
        ValueError: for settings out of range, texts that are too few, and a file that is of another run.
    """
    items = list(_items(settings))
    sizes = sorted(settings.sizes)
    least = max(len(item.plants) for item in items)
    haystack = Haystack(texts, tokenizer, sizes[-1], settings.document_tokens)
    if (first := haystack.documents(sizes[0])) * MOST_PLANTED < least:
        raise ValueError(
            f"A haystack of {sizes[0]} tokens has {first} documents, too few for {least} needles; ask for larger ones."
        )
    described = {**asdict(settings), "source": source, "haystack": _digest(haystack.texts)}
    facts = model_facts(model, tokenizer, protocol, name)
    result = Result.begin(NAME, described, facts, run_facts(model.device), path)
    pending = [tokens for tokens in sizes if any(not result.done(item.id(tokens)) for item in items)]
    if not pending:
        return result
    started = time.monotonic()
    documents = haystack.documents(pending[-1])
    banks = HaystackBanks(model, tokenizer, protocol, haystack, documents, batch_tokens, show_progress)
    result.notes[f"encoding {pending[-1]} tokens"] = {
        "seconds": round(time.monotonic() - started, 1),
        "documents": documents,
        "tokens_with_wrapping": banks.whole.num_tokens,
    }
    with tqdm(total=len(items) * len(sizes), unit="question", disable=not show_progress) as progress:
        for tokens in sizes:
            progress.set_description(f"{tokens:,} tokens")
            documents = haystack.documents(tokens)
            for group in _groups(items, int(documents * MOST_PLANTED)):
                left = [item for item in group if not result.done(item.id(tokens))]
                if left:
                    for trials in _asked(left, group, settings, haystack, documents, tokens, banks, batch_size):
                        result.add(trials)
                        progress.update(len(trials))
                progress.update(len(group) - len(left))
            result.save()
    result.save()
    return result


def _items(settings: NeedleSettings) -> Iterator[_Item]:
    """All tasks, the kinds in turns, so that a run that is cut short has some of each."""
    tasks = NeedleTasks(settings.seed)
    depths = depths_of(settings.depths)
    wanted = len(settings.tasks) * len(settings.values) * len(depths) * settings.repeats
    if not wanted or not settings.sizes or min(settings.sizes) < 1:
        raise ValueError("Sizes, tasks, kinds of values and repeats must be at least one each.")
    if wanted > len(tasks):
        raise ValueError(
            f"{wanted} tasks were asked for at each size, and there are keys for {len(tasks)}: ask for fewer."
        )
    number = 0
    for repeat in range(settings.repeats):
        for depth in depths:
            for values in settings.values:
                for name in settings.tasks:
                    task = tasks.task(name, values, number)
                    plants = _plants(task, depth, derive_key("plants", settings.seed, number))
                    yield _Item(name, values, depth, repeat, task, plants)
                    number += 1


def _plants(task: NeedleTask, depth: float, key: int) -> tuple[Plant, ...]:
    """Where the needles go: the first at the depth, the others spread over the rest, each somewhere in its document."""
    count = len(task.needles)
    return tuple(
        Plant(
            needle.sentence,
            (depth + number / count) % 1.0 if number else depth,
            derive_key("place", key, number) % 1001 / 1000,
        )
        for number, needle in enumerate(task.needles)
    )


def _groups(items: Sequence[_Item], most: int) -> Iterator[list[_Item]]:
    """The tasks in groups of at most so many needles, each for a bank of its own."""
    group: list[_Item] = []
    planted = 0
    for item in items:
        if group and planted + len(item.plants) > most:
            yield group
            group, planted = [], 0
        group.append(item)
        planted += len(item.plants)
    yield group


def _asked(
    asked: Sequence[_Item],
    planted: Sequence[_Item],
    settings: NeedleSettings,
    haystack: Haystack,
    documents: int,
    tokens: int,
    banks: HaystackBanks,
    batch_size: int,
) -> Iterator[list[Trial]]:
    """Trials over the bank of a size in which the needles of a group lie, those of tasks done already among them."""
    plants = [plant for item in planted for plant in item.plants]
    places = haystack.place(documents, plants)
    bank = banks.bank(documents, haystack.planted(places, plants))
    rest = iter(places)
    positions = {item.id(tokens): [next(rest) for _ in item.plants] for item in planted}
    for answers in sorted({len(item.task.answers) for item in asked}):
        alike = [item for item in asked if len(item.task.answers) == answers]
        questions = [
            Ask(
                item.task.question,
                item.task.answers,
                tuple((place,) for place in positions[item.id(tokens)][: len(item.task.answers)]),
            )
            for item in alike
        ]
        limit = settings.max_new_tokens * answers
        found = put(
            banks.model,
            banks.tokenizer,
            bank,
            banks.protocol,
            questions,
            batch_size=batch_size,
            max_new_tokens=limit,
            **settings.rounds,
        )
        done = 0
        for outcomes in found:
            trials = []
            for item, ask, outcome in zip(alike[done:], questions[done:], outcomes, strict=False):
                detail = {
                    "found": outcome.found,
                    "of": len(ask.expected),
                    "broke": outcome.broke,
                    "gold_read": len(set(ask.gold) & set(outcome.read)),
                    "read": list(outcome.read)[:16],
                    "gold": list(ask.gold),
                    **outcome.rungs,
                }
                axes: dict[str, Axis] = {"tokens": tokens, "depth": item.depth, "values": item.values}
                trials.append(
                    Trial(
                        item.id(tokens),
                        item.name,
                        axes,
                        ask.question,
                        ask.expected,
                        outcome.answer,
                        outcome.right,
                        detail,
                    )
                )
            done += len(outcomes)
            yield trials


def _digest(texts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\0")
    return total.hexdigest()[:16]


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
    """What a run comes to: a sentence for each size, and what broke most."""
    lines = []
    for cell in result.cells("tokens"):
        (tokens,) = cell.values
        lines.append(
            f"{tokens:,} tokens: {cell.right} of {cell.asked} questions answered in full ({cell}), "
            f"RULER's score {score(result, tokens=tokens):.3f}."
        )
    broke: dict[str, int] = {}
    for trial in result.trials:
        if not trial.right:
            broke[trial.detail["broke"]] = broke.get(trial.detail["broke"], 0) + 1
    for rung, number in sorted(broke.items(), key=lambda item: -item[1]):
        lines.append(f"{number} of the wrong ones: {RUNGS[rung]}.")
    several = [item for item in result.cells("kind") if item.values[0] in ("multi_value", "multi_query")]
    if several:
        lines.append(f"An answer to multi_value and multi_query counts as right with all {SEVERAL} values alone.")
    return lines
