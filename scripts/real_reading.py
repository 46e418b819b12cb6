"""Stages of `train_real.py`: rows that read texts and answer, of labeled and of asked questions, and their loss.

Labeled questions are few, and a reader that saw them several times knows their answers: with the gold text
`msa-hf-smollm2-135m` answered .80 of those that it was trained on and .56 of others. What the base asks is new, but
often wrong; so a reader that was trained before has to find each answer likely (`answers`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from contextlib import nullcontext
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_data import sets_among
from real_model import NOT_FOUND, PROTOCOL, load_start
from real_pools import SHARES, is_held_out, shares_of
from real_rows import Flat, device, load, log, rank, save, world
from torch import Tensor
from transformers import AutoTokenizer

from msa_hf.data.questions import IGNORED
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.reading import ReadingRow, answer_losses, plain_reading_loss, reading_loss, reading_row
from msa_hf.training.weights import add_gradients

LONGEST_ROW = 1024  # tokens
LONGEST_ANSWER = 60  # characters
NEAR = 8  # passages that the teacher finds nearest, of which some are read beside the right one

shared: tuple[list[str], Any]  # texts and tokenizer, in the processes of `row_makers`


class Transcript(NamedTuple):
    """A question, the places of the texts that are read, its answer, and the seed of the numbers that texts have."""

    question: str
    places: list[int]
    answer: str
    seed: int


def row_makers(texts: list[str], tokenizer: Any, workers: int | None) -> Pool:
    """Processes for `made_row`, one per core by default; forked, so before anything is on an accelerator."""
    return multiprocessing.get_context("fork").Pool(workers or os.cpu_count(), share, (texts, tokenizer))


def share(texts: list[str], tokenizer: Any) -> None:
    global shared
    shared = texts, tokenizer


def made_row(given: Transcript) -> ReadingRow:
    """The row of a transcript, in one of the processes of `row_makers`."""
    texts, tokenizer = shared
    read = [texts[place] for place in given.places]
    return reading_row(tokenizer, PROTOCOL, given.question, read, given.answer, random.Random(given.seed))


def prepare_reading(arguments: argparse.Namespace) -> None:
    """Rows that read, from what was prepared and what the teacher found; shard `--shard` of `--shards`."""
    work, where = Path(arguments.work), device()
    data, taught = load(work / "sets.pt"), load(work / "sets.teacher.pt")
    texts = load(work / "sets.texts")
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    with row_makers(texts, tokenizer, arguments.workers) as makers:
        passages = taught["passages"].to(where)
        count = min(12, len(passages))
        near = torch.cat(
            [(some.to(where) @ passages.T).topk(count, dim=1).indices.cpu() for some in taught["train"].split(512)]
        )
        pick = random.Random(1 + arguments.shard)
        made = labeled_transcripts(data, len(texts), near.tolist(), arguments.reading, arguments.unanswerable, pick)
        rows = [row for row in makers.map(made_row, made, chunksize=256) if fits(row)]
    write_rows(work / f"reading{arguments.shard}.pt", rows)
    log("prepared", len(rows), "rows that read")


def labeled_transcripts(
    data: dict[str, Any], texts: int, near: list[list[int]], count: int, unanswerable: float, pick: random.Random
) -> list[Transcript]:
    """Labeled questions with their gold passages among up to three others.

    Args:
        texts: how many there are.
        near: for every labeled question the passages that a teacher finds nearest; others are drawn from these, from
            the neighbors of the gold passage and from anywhere.
        unanswerable: share of transcripts without gold passages.
    """
    kept_out = set(data["held_out"].tolist())
    questions = data["train"]["questions"]
    made: list[Transcript] = []
    by_set = {
        name: [
            n
            for n, item in enumerate(questions)
            if item["set"] == name and not is_held_out(n, name) and any(map(str.strip, item["answers"]))
        ]
        for name in sets_among({item["set"] for item in questions}, SHARES)
    }
    names = [name for name in by_set if by_set[name]]
    if not names:
        raise SystemExit("No labeled question has an answer, so that there are no rows that read.")
    for _ in range(count):
        number = pick.choice(by_set[pick.choices(names, shares_of(names))[0]])
        question = questions[number]
        gold = [pick.choice(group) for group in question["wanted"]][:4]
        beside = [place for item in gold for place in range(item - 3, item + 4) if 0 <= place < texts]
        others = [*beside, *near[number], *near[number], *(pick.randrange(texts) for _ in range(4))]
        everything = {place for group in question["wanted"] for place in group}
        pick.shuffle(others)
        others = [place for place in dict.fromkeys(others) if place not in everything and place not in kept_out]
        chosen = others[: pick.choice((0, 1, 2, 2, 3))]
        answerable = pick.random() >= unanswerable
        if answerable:
            chosen += gold
        elif not chosen:
            chosen = others[:1]
        pick.shuffle(chosen)
        written = [answer for answer in question["answers"] if answer.strip()]
        answer = written[0] if answerable else NOT_FOUND
        made.append(Transcript(question["question"], chosen, answer, pick.getrandbits(32)))
    return made


def answers(arguments: argparse.Namespace) -> None:
    """Rows that read asked questions whose answers a trained reader finds likely; shard `--shard`."""
    work, where, start = Path(arguments.work), device(), time.time()
    made = load(work / f"asked{arguments.shard}.pt")
    sources = [load(work / f"{name}.texts") for name in made["names"]]
    starts = torch.tensor([0, *map(len, sources)]).cumsum(0)
    texts = [text for items in sources for text in items]
    questions, answers_of = made["texts"], made["answers"]
    places = (made["places"] + starts[made["sources"]]).tolist()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    with row_makers(texts, tokenizer, arguments.workers) as makers:
        said = [n for n, answer in enumerate(answers_of) if says(texts[places[n]], answer)]
        alone = [Transcript(questions[n], [places[n]], answers_of[n], n) for n in said]
        log(len(said), "of", len(places), "answers stand in their passages;", round(time.time() - start), "s")
        losses = answer_losses_of(makers.map(made_row, alone, chunksize=256), arguments, where)
        kept = [number for number, loss in zip(said, losses.tolist(), strict=True) if loss < arguments.likely]
        log(len(kept), "are likely enough;", round(time.time() - start), "s")
        near = nearest(work, arguments.shard, made["names"], kept, where).tolist()
        pick = random.Random(arguments.shard)
        given = []
        for number, close in zip(kept, near, strict=True):
            place, answer = places[number], answers_of[number]
            around = [other for other in range(place - 3, place + 4) if 0 <= other < len(texts)]
            others = [*around, *close, *(pick.randrange(len(texts)) for _ in range(2))]
            pick.shuffle(others)
            others = [other for other in dict.fromkeys(others) if other != place]
            answerable = pick.random() >= arguments.unanswerable
            # Another passage may say the same.
            if not answerable:
                others = [other for other in others if not says(texts[other], answer)]
            chosen = others[: pick.choice((0, 0, 1, 2, 3)) or int(not answerable)]
            if answerable:
                chosen.append(place)
            pick.shuffle(chosen)
            answer = answer if answerable else NOT_FOUND
            given.append(Transcript(questions[number], chosen, answer, number))
        rows = [row for row in makers.map(made_row, given, chunksize=256) if fits(row)]
    write_rows(work / f"answers{arguments.shard}.pt", rows)
    log("made", len(rows), "rows that read;", round(time.time() - start), "s; for example:")
    for number in pick.sample(kept, min(12, len(kept))):
        log("   ", questions[number], "->", answers_of[number])


def says(text: str, answer: str) -> bool:
    """Tell whether a passage has the words of an answer."""
    return 0 < len(answer) <= LONGEST_ANSWER and answer.lower() in text.lower()


def fits(row: ReadingRow) -> bool:
    return len(row.ids) <= LONGEST_ROW and any(row.routes)


def write_rows(path: Path, rows: list[ReadingRow]) -> None:
    """Write rows as `Reader` takes them."""
    flat = Flat.of([row.ids for row in rows])
    save(
        path,
        {
            "tokens": flat.tokens,
            "lengths": flat.lengths,
            "labels": Flat.of([row.labels for row in rows]).tokens,
            "routes": torch.tensor([len(row.routes) - 1 - row.routes[::-1].index(True) for row in rows]),
        },
    )


@torch.no_grad()
def answer_losses_of(rows: list[ReadingRow], arguments: argparse.Namespace, where: torch.device) -> Tensor:
    """[N] float32, minus the log likelihood of each row's answer by the trained reader, without a memory."""
    model = load_start(arguments.start, arguments.base, where)
    ids = Flat.of([row.ids for row in rows]).to(where)
    labels = Flat.of([row.labels for row in rows]).to(where)
    losses = torch.empty(len(rows), device=where)
    with compiled_layers(model) if arguments.compile else nullcontext():
        for places, items in ids.parts(torch.arange(len(rows), device=where), arguments.batch_tokens):
            wanted = labels.rows(places).ids.masked_fill(~items.mask, IGNORED)
            losses[places] = answer_losses(model, items.ids, wanted)
    return losses.cpu()


def nearest(work: Path, shard: int, names: list[str], numbers: list[int], where: torch.device) -> Tensor:
    """[N, NEAR] places of the passages that the teacher finds nearest to questions."""
    passages = torch.cat([load(work / f"{name}.teacher.pt") for name in names]).to(where)
    questions = load(work / f"asked{shard}.teacher.pt")[numbers].to(where)
    count = min(NEAR, len(passages))
    found = [(some @ passages.T).topk(count, dim=1).indices.cpu() for some in questions.split(512)]
    return torch.cat(found) if found else torch.empty(0, count, dtype=torch.long)


class Reader:
    """Rows that read, half of them with the step's pool as a memory, half with nothing but their texts."""

    def __init__(self, arguments: argparse.Namespace, work: Path, where: torch.device) -> None:
        self.count, self.weight, self.tokens = arguments.read, arguments.read_weight, arguments.read_tokens
        self.asked = arguments.read_asked
        # Every shard of a run of fewer processes, and one each of a run of more.
        shards = range(rank() % arguments.shards, arguments.shards, world())
        labeled = [load(work / f"reading{shard}.pt") for shard in shards] if self.count else []
        asked = [load(work / f"answers{shard}.pt") for shard in shards] if self.count and self.asked else []
        files = [*labeled, *asked]
        if files:
            self.labeled = sum(len(data["routes"]) for data in labeled)  # rows; those of asked questions stand behind
            self.ids = Flat.joined([Flat(data["tokens"], data["lengths"]) for data in files]).to(where)
            self.labels = Flat.joined([Flat(data["labels"], data["lengths"]) for data in files]).to(where)
            self.routes = torch.cat([data["routes"] for data in files]).to(where)

    def step(self, model: Any, result: Any) -> float:
        """Add the gradients of one batch; its mean loss."""
        half = max(self.count // 2, 1)
        total = torch.zeros((), device=self.routes.device)  # looked at in the end: until then nothing waits for it
        for attends in (True, False):
            chosen = self.draw(half)
            labels = self.labels.at(chosen).tokens
            counted = (labels != IGNORED).sum()
            # Rows of like length together: padded to the longest of all, most of a batch would be padding.
            for places, items in self.ids.parts(chosen, self.tokens):
                wanted = self.labels.rows(places).ids.masked_fill(~items.mask, IGNORED)
                if attends:
                    routes = torch.zeros_like(items.mask)
                    routes[torch.arange(len(places), device=routes.device), self.routes[places]] = True
                    loss = reading_loss(model, items.ids, wanted, routes, result.pool, result.lengths)
                else:
                    loss = plain_reading_loss(model, items.ids, wanted)
                loss = loss * (wanted != IGNORED).sum() / counted
                add_gradients(model.parameters(), [0.5 * self.weight * loss])
                total += loss.detach()
        return float(total) / 2

    def draw(self, count: int) -> Tensor:
        """[count] int64 places of rows."""
        labeled = round(count * (1 - self.asked))
        where = self.routes.device
        drawn = [torch.randint(self.labeled, (labeled,), device=where)]
        if labeled < count:
            drawn.append(torch.randint(self.labeled, len(self.routes), (count - labeled,), device=where))
        return torch.cat(drawn)
