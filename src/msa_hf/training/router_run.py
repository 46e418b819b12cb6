"""Routers trained on pools of a user's passages: the steps, the measurements, and what is saved.

A step is a pool of passages, as many as memory holds, for the questions that `pairs` makes of them
(`contrastive_step`). Every so many steps all passages are encoded, to measure on held-out ones and to find what the
router takes for the answer and is not.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..data.questions import IGNORED
from ..json_object import JsonObject
from ..model.attention_msa import NotFiniteError
from .asked_questions import ask_about
from .centering import center_routers
from .compiling import compiled_layers, decoder_layers
from .contrastive import PoolResult, Temperatures, TokenRows, contrastive_step, soft_targets
from .mining import (
    EncodedCorpus,
    LexicalIndex,
    TokenStore,
    WrongPassages,
    best_passages,
    encode_corpus,
    in_parts,
    padded,
    recall_of,
)
from .monitor import CollapsedError, CollapseGuard
from .pools import Pool, PoolDrawer, Round
from .progress import phase
from .reading import reading_loss, reading_row
from .router_report import Reporter, plot_curve, read_curve, write_curve
from .router_saving import adapter_expression, save_adapter
from .router_sizes import Sizes, choose_sizes
from .router_time import Work, describe_time, seconds_per_token
from .settings import SettingError, TrainingError
from .teacher import Teacher, load_teacher
from .unlabeled import CHECKPOINT_FILE, SETTINGS_FILE, PreparedRouters
from .weights import TrainedWeights, add_gradients

CURVE_FILE, PLOT_FILE = "training_curve.jsonl", "training_curve.png"
UPPER_RANK = 8  # of low-rank updates from the last memory layer on, which only readers train
WHITENING_SAMPLE = 4_096
TAUGHT = {"cuda": 8_192, "cpu": 256}  # passages that a teacher embeds at a time
CODED = 1_000  # passages tokenized at a time
SPOKEN_EVERY = 60.0  # seconds from one line on the steps to the next, where no bar shows them
FOUND = 10  # passages counted as found
LEXICAL, MINED = 2, 4  # wrong passages kept of a seed, by its words and by the router
CANDIDATES = 12  # looked at for them
MOST_LEXICAL = 4_000  # seeds of a round that BM25 looks at
MINING_WORK = {"cuda": 2e11, "cpu": 5e8}  # question tokens times chunks, in a search for mistakes
TEACHER_TEMPERATURE = 0.04
TEMPERATURE_RATE = 0.01
DOCUMENT_WEIGHT = 0.2
READ, READ_WEIGHT, LONGEST_READ = 16, 0.3, 1_024  # rows that read in a step, the weight of their loss, their tokens
UNANSWERABLE = 0.1  # share of them
NOT_FOUND = "not in memory"


@dataclass(frozen=True)
class RoutersResult:
    """The outcome of a run.

    Attributes:
        measurements: the first of the routers as they were given, the second of those that training began with.
        summary: in words.
        loading: the expression that brings the result back.
        output: directory of the result.
    """

    measurements: list[JsonObject]
    summary: str
    loading: str
    output: Path

    def __str__(self) -> str:
        return f"{self.summary}\nsaved to {self.output}; load it with\n  {self.loading}"


def train_routers(
    prepared: PreparedRouters,
    guard: CollapseGuard | None = None,
    after_step: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> RoutersResult:
    """Train, measure and save.

    Args:
        prepared: the run.
        guard: judges the measurements; default one with its own defaults.
        after_step: called with the number of steps done, after a checkpoint was written.
        say: gets lines on how it goes; default they are printed to stderr.

    Raises:
        TrainingError: where a library or memory is lacking.
        CollapsedError: where the guard ends the run; the curve and the last checkpoint are kept.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    run = None
    try:
        run = _Run(prepared, CollapseGuard() if guard is None else guard, say or _say)
        return run.train(after_step)
    except ImportError as error:
        raise TrainingError(str(error)) from error
    except NotFiniteError as error:
        if run is None or not run.step:
            raise  # the base's own
        raise CollapsedError(f"The run has collapsed at step {run.step}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise TrainingError("out of memory; take a smaller --pool, --part-tokens or --corpus") from error
    finally:
        torch.set_float32_matmul_precision(precision)
        if run is not None:
            run.close()


def _say(line: str) -> None:
    tqdm.write(f"msa-hf: {line}", file=sys.stderr)


class _Run:
    """The state of a run."""

    def __init__(self, prepared: PreparedRouters, guard: CollapseGuard, say: Callable[[str], None]) -> None:
        self.prepared, self.guard, self.say = prepared, guard, say
        self.settings, self.model = prepared.settings, prepared.model
        self.output = Path(self.settings.output)
        self.reporter: Reporter | None = None
        self.ahead = ThreadPoolExecutor(1)
        self.rows: list[JsonObject] = []
        checkpoint = prepared.checkpoint
        self.step = 0 if checkpoint is None else int(checkpoint["step"])

        coder, texts = prepared.coder, prepared.corpus
        self.skipped = coder.skipped
        self.store = TokenStore(self._coded(texts))
        self.measured_rows = coder.questions([item.query for item in prepared.measured])
        torch.manual_seed(self.settings.seed)
        self.weights = TrainedWeights(self.model, self._ranks(), self._whole())
        self.temperatures = Temperatures(len(self.model.config.memory_layers)).to(self.model.device)
        lengths = [len(row) for row in self.measured_rows]
        if checkpoint is None:
            self.sizes = choose_sizes(
                self.settings, self.model, float(self.store.lengths.mean()), sum(lengths) / len(lengths)
            )
        else:
            self.sizes = Sizes(**checkpoint["sizes"])
        self.teacher: Teacher | None = None
        if self.settings.teacher is not None:
            try:
                self.teacher = load_teacher(self.settings.teacher, self.model.device)
            except (OSError, ValueError) as error:
                raise SettingError("teacher", "{} {}: {}", self.settings.teacher, error) from None
        self.index = LexicalIndex(texts)
        self.wrong = WrongPassages(texts)
        held_out = {item.gold[-1] for item in prepared.measured if item.kind != "question"}
        self.corpus = self._corpus(held_out)
        asked = ask_about(self.settings, self.output, texts, held_out, self.model.device)
        self.drawer = PoolDrawer(
            prepared.maker,
            self.store,
            coder,
            held_out,
            prepared.labeled,
            asked,
            self.sizes.pool,
            self.sizes.question_tokens,
            self.settings.seed,
        )
        if not self.drawer.seeds(0, 1):
            raise TrainingError("the documents are too short to make questions of: nothing is left to train on")
        parts = [
            (self.weights.low_rank_parameters(), self.settings.learning_rate),
            (self.weights.whole_parameters(), self.settings.router_learning_rate),
            (list(self.temperatures.parameters()), TEMPERATURE_RATE),
        ]
        self.rates = [rate for parameters, rate in parts if parameters]
        groups = [{"params": parameters, "lr": rate} for parameters, rate in parts if parameters]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=0.0, fused=self.model.device.type == "cuda"
        )
        self.others: dict[str, float] = {}
        self.round = Round(0, [], np.zeros((0, 0), dtype=np.int64))

    def close(self) -> None:
        self.ahead.shutdown(cancel_futures=True)
        if self.reporter is not None:
            self.reporter.close()

    def _coded(self, texts: Sequence[str]) -> Iterator[list[int]]:
        with phase("tokenizing passages", len(texts), "passages") as done:
            for start in range(0, len(texts), CODED):
                numbers = range(start, min(start + CODED, len(texts)))
                yield from self.prepared.coder.documents(texts[start : start + CODED], numbers)
                done(len(numbers))

    # What is trained --------------------------------------------------------------------------------------------------

    def _ranks(self) -> dict[str, int]:
        """Linear layers below the last memory layer, and above it where rows that read train them -> rank."""
        names = {module: name for name, module in self.model.named_modules()}
        last = self.model.config.memory_layers[-1]
        upper = UPPER_RANK if self.prepared.labeled else 0
        ranks = {}
        for index, layer in decoder_layers(self.model).items():
            for module in layer.modules():
                name = names[module]
                rank = self.settings.rank if index < last else upper
                if isinstance(module, torch.nn.Linear) and "router_" not in name and rank:
                    if not module.weight.is_floating_point():
                        raise TrainingError("the base is quantized; train the plain one, and quantize the result")
                    ranks[name] = min(rank, *module.weight.shape)
        return ranks

    def _whole(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters() if "router_" in name]

    def _say_time(self) -> None:
        """Tell how long the run will take, on a CPU."""
        if self.model.device.type != "cpu":
            return
        settings, lengths = self.settings, [len(row) for row in self.measured_rows]
        steps = settings.steps - self.step
        whitened = self.prepared.whiten and self.prepared.checkpoint is None
        chunks = (-(-self.store.lengths[self.corpus] // self.model.config.chunk_size)).sum()
        work = Work(
            steps,
            settings.eval_every or settings.steps,
            self.drawer.size,
            len(self.corpus),
            min(WHITENING_SAMPLE, len(self.store)) if whitened else 0,
            float(self.store.lengths.mean()),
            sum(lengths) / len(lengths),
            len(lengths),
            int(MINING_WORK["cpu"] * len(lengths) / (int(chunks) * max(sum(lengths), 1))),
        )
        if line := describe_time(work, seconds_per_token(self.model, self.store.lengths.tolist())):
            self.say(line)

    # Before the first step --------------------------------------------------------------------------------------------

    def _corpus(self, held_out: set[int]) -> list[int]:
        """Places of the passages that are encoded to measure: all, or those asked for and others at random."""
        count = len(self.store)
        wanted = held_out | {place for item in self.prepared.measured for place in item.gold}
        if count <= self.sizes.corpus:
            return list(range(count))
        pick = random.Random(f"{self.settings.seed}, corpus")
        others = [place for place in pick.sample(range(count), self.sizes.corpus) if place not in wanted]
        return sorted([*wanted, *others[: max(self.sizes.corpus - len(wanted), 0)]])

    def _start(self) -> None:
        """Set the routers that training starts from; what others find of the held-out passages."""
        measured = self.prepared.measured
        gold = [set(item.gold) for item in measured]
        found = self.index.best([item.query for item in measured], self._found)
        self.others["bm25"] = recall_of(found, gold, self._found)
        if self.teacher is not None:
            queries = self.teacher.embed([item.query for item in measured])
            texts = torch.cat(list(self._embedded(self.teacher)))
            best = (queries @ texts.T).topk(min(self._found, len(self.corpus)), dim=1).indices.cpu().numpy()
            self.others["teacher"] = recall_of(np.asarray(self.corpus)[best], gold, self._found)
        if self.prepared.whiten:
            self._measure(as_given=True)
            self._whiten()
            self.model.config.query_reduction = "mean"  # by the last token whitened routers find nothing

    def _embedded(self, teacher: Teacher) -> Iterator[Tensor]:
        """The teacher's embeddings of the corpus, in parts."""
        size = TAUGHT["cpu" if self.model.device.type == "cpu" else "cuda"]
        with phase("embedding passages", len(self.corpus), "passages") as done:
            for start in range(0, len(self.corpus), size):
                places = self.corpus[start : start + size]
                yield teacher.embed([self.prepared.corpus[place] for place in places])
                done(len(places))

    def _whiten(self) -> None:
        pick = random.Random(f"{self.settings.seed}, whitening")
        places = pick.sample(range(len(self.store)), min(WHITENING_SAMPLE, len(self.store)))
        config = self.model.config
        chunks = int((-(-self.store.lengths[places] // config.chunk_size)).sum())
        keys = self.model.get_parameter(next(name for name in self._whole() if "router_k_proj" in name)).shape[0]
        how = "whiten" if chunks >= keys else "center"
        if how == "center":
            self.say(
                f"{chunks} chunks are too few to whiten routers of {keys} directions: training starts from copies "
                "without the mean's direction"
            )
        with phase("whitening routers", len(places), "passages") as done:

            def rows() -> Iterator[TokenRows]:
                for part in in_parts(self.store.lengths[places], self.sizes.part_tokens):
                    yield padded([self.store.row(places[number]) for number in part], self.model.device)
                    done(len(part))

            center_routers(self.model, rows(), how)
        for weight, master in self.weights.whole.values():
            master.data.copy_(weight.data)

    # Measuring and mining ---------------------------------------------------------------------------------------------

    @property
    def _found(self) -> int:
        """Passages that count as found: ten, of fewer than a hundred a tenth."""
        return max(min(FOUND, len(self.corpus) // 10), 1)

    def _measure(self, as_given: bool = False, mine: bool = False) -> None:
        """Encode the corpus, see what is found of the held-out passages, and draw the next round's seeds."""
        if not all(bool(weight.isfinite().all()) for weight in self.weights.state_dict().values()):
            raise CollapsedError(f"The run has collapsed at step {self.step}: weights are no numbers.")
        self.weights.write()
        with phase("encoding passages", len(self.corpus), "passages") as done:
            encoded = encode_corpus(self.model, self.store, self.corpus, self.sizes.part_tokens, done)
        corpus = np.asarray(self.corpus)
        measured, count = self.prepared.measured, self._found
        layers, best = self._searched("measuring", encoded, self.measured_rows, count)
        found, total = {layer: corpus[places] for layer, places in layers.items()}, corpus[best]
        gold = [set(item.gold) for item in measured]
        kinds = sorted({item.kind for item in measured})
        recall = recall_of(total, gold, count)
        row: JsonObject = {
            "step": self.step,
            "recall": recall,
            "recall_at_1": recall_of(total, gold, 1),
            "k": count,
            "questions": len(measured),
            "wanted": len(set().union(*gold)),
            "passages": len(corpus),
            "chance": count / len(corpus),
            "layers": {layer: recall_of(best, gold, count) for layer, best in found.items()},
            "distinct": {layer: len(np.unique(best)) for layer, best in found.items()},
            "kinds": {
                kind: recall_of(
                    total[[item.kind == kind for item in measured]],
                    [set(item.gold) for item in measured if item.kind == kind],
                    count,
                )
                for kind in kinds
            },
            "others": self.others,
            **({"as_given": True} if as_given else {}),
        }
        self._note(row)
        name = "as given" if as_given else f"step {self.step}"
        beside = "".join(f", {key} {value:.3f}" for key, value in self.others.items())
        self.say(
            f"{name}: recall@{count} {recall:.3f} of {len(measured)} held-out questions among {len(corpus)} "
            f"passages{beside}, chance {row['chance']:.3f}"
        )
        if self.reporter is not None:
            others = {f"{key}_recall@{count}": value for key, value in self.others.items()}
            self.reporter.log(self.step, {f"{'untrained' if as_given else 'router'}_recall@{count}": recall, **others})
        if not as_given:
            self.guard.check(row, step=self.step)
        if mine:
            self._mine(encoded, corpus)

    def _searched(
        self, what: str, encoded: EncodedCorpus, questions: Sequence[Sequence[int]], count: int
    ) -> tuple[dict[int, NDArray[np.int64]], NDArray[np.int64]]:
        """`best_passages` of questions, shown as a phase."""
        with phase(what, len(questions), "questions") as done:
            return best_passages(self.model, encoded, questions, count, self.skipped, self.sizes.part_tokens, done)

    def _mine(self, encoded: Any, corpus: NDArray[np.int64]) -> None:
        """Draw the seeds of the next steps, and look for passages that are wrong for them."""
        every = self.settings.eval_every or self.settings.steps
        steps = min(every, self.settings.steps - self.step)
        chunks = int(encoded.layers[self.model.config.memory_layers[-1]].routing_keys.shape[0])
        tokens = max(sum(map(len, self.measured_rows)) / len(self.measured_rows), 1)
        work = MINING_WORK["cpu" if self.model.device.type == "cpu" else "cuda"]
        most = min(steps * self.drawer.seeds_per_pool, max(int(work / (chunks * tokens)), self.drawer.seeds_per_pool))
        seeds = self.drawer.seeds(self.step, most)
        rows = self.prepared.coder.questions([item.query for item in seeds])
        mistakes = corpus[self._searched("looking for mistakes", encoded, rows, CANDIDATES)[1]]
        lexical = self.index.best([item.query for item in seeds[:MOST_LEXICAL]], CANDIDATES)
        misses = np.full((len(seeds), LEXICAL + MINED), -1, dtype=np.int64)
        for number, item in enumerate(seeds):
            gold = set(item.gold)
            chosen = []
            if number < len(lexical):
                chosen = self.wrong.choose(item.query, gold, lexical[number].tolist(), LEXICAL)
            more = self.wrong.choose(item.query, gold | set(chosen), mistakes[number].tolist(), MINED)
            misses[number, : len(chosen) + len(more)] = [*chosen, *more]
        self.round = Round(self.step, seeds, misses)

    # Steps ------------------------------------------------------------------------------------------------------------

    def train(self, after_step: Callable[[int], None] | None) -> RoutersResult:
        settings, checkpoint = self.settings, self.prepared.checkpoint
        self.reporter = Reporter(settings.report_to, self.output, self.model, settings.steps)
        if checkpoint is None:
            record = json.dumps(self.prepared.record, indent=2) + "\n"
            (self.output / SETTINGS_FILE).write_text(record, encoding="utf-8")
        self._say_time()
        if checkpoint is None:
            self._start()
        else:
            self._resume(checkpoint)
        every = settings.eval_every or settings.steps
        logged = max(1, settings.steps // 50)
        sums: dict[str, float] = {}
        coming: Future[Pool] | None = None
        since, tokens = time.perf_counter(), 0
        spoken = since
        compiled = compiled_layers(self.model) if self._compiles else nullcontext()
        bar = tqdm(total=settings.steps, initial=self.step, desc="routers", unit="step", disable=None)
        with compiled, bar:
            while self.step < settings.steps:
                if self.step % every == 0:
                    self._measure(mine=True)
                    coming = None
                pool = self.drawer.draw(self.step, self.round) if coming is None else coming.result()
                coming = None
                if (self.step + 1) % every and self.step + 1 < settings.steps:
                    coming = self.ahead.submit(self.drawer.draw, self.step + 1, self.round)
                figures = self._step(pool)
                self.guard.check(loss=figures["loss"], step=self.step + 1)
                self.step += 1
                bar.update()
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value
                tokens += sum(map(len, pool.documents))
                if self.step % logged == 0 or self.step == settings.steps:
                    count = (self.step - 1) % logged + 1
                    means = {name: value / count for name, value in sums.items()}
                    speed = tokens / (time.perf_counter() - since)
                    self._note({"step": self.step, **means, "tokens_per_second": round(speed)})
                    self.reporter.log(self.step, {**means, "tokens_per_second": speed})
                    bar.set_postfix(loss=f"{means['loss']:.3f}", hits=f"{means['hits']:.2f}")
                    if bar.disable and time.perf_counter() - spoken > SPOKEN_EVERY:
                        self.say(f"step {self.step} of {settings.steps}: loss {means['loss']:.3f}")
                        spoken = time.perf_counter()
                    sums, since, tokens = {}, time.perf_counter(), 0
                if settings.save_every and self.step % settings.save_every == 0 and self.step < settings.steps:
                    self._write_checkpoint()
                if after_step is not None:
                    after_step(self.step)
            self._measure()
        loading = self._save()
        measurements = [row for row in self.rows if "recall" in row]
        plot_curve(self.output / PLOT_FILE, self.rows)
        (self.output / CHECKPOINT_FILE).unlink(missing_ok=True)
        return RoutersResult(measurements, self._summary(measurements), loading, self.output)

    @property
    def _compiles(self) -> bool:
        return self.settings.compile and self.model.device.type == "cuda"

    def _step(self, pool: Pool) -> dict[str, float]:
        """One step of the optimizer; what it says of the loss."""
        settings, device = self.settings, self.model.device
        progress = self.step / settings.steps
        warm = min((self.step + 1) / max(min(20, settings.steps // 10), 1), 1.0)
        shape = max(0.5 * (1 + math.cos(math.pi * progress)), 0.02) * warm
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * shape
        self.weights.write()
        columns = list(in_parts([len(row) for row in pool.documents], self.sizes.part_tokens))
        rows = list(in_parts([len(row) for row in pool.questions], self.sizes.part_tokens))
        order, asked = list(itertools.chain(*columns)), list(itertools.chain(*rows))
        targets = self._targets(pool)[asked][:, order]
        result = contrastive_step(
            self.model,
            [padded([pool.documents[place] for place in part], device) for part in columns],
            [padded([pool.questions[place] for place in part], device, skipped=self.skipped) for part in rows],
            targets.to(device),
            self.temperatures,
            document_weight=DOCUMENT_WEIGHT,
            held_tokens=self.sizes.part_tokens,
        )
        figures = {"loss": float(result.loss), "hits": float(result.hits)}
        if self.prepared.labeled and (read := self._read(pool, result)) is not None:
            figures["reading_loss"] = read
        self.weights.take_gradients()
        trained = [*self.weights.low_rank_parameters(), *self.weights.whole_parameters()]
        figures["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **figures,
            "temperature": float(self.temperatures()[0].detach()),
            "learning_rate": settings.learning_rate * shape,
        }

    def _targets(self, pool: Pool) -> Tensor:
        """[Q, N] the distribution over passages that each question should have."""
        if self.teacher is None:
            return soft_targets(pool.positives, None)
        questions = self.teacher.embed(pool.queries)
        passages = self.teacher.embed([self.prepared.corpus[place] for place in pool.places])
        logits = (questions @ passages.T).float().cpu() / TEACHER_TEMPERATURE
        return soft_targets(pool.positives, logits, self.settings.soft * (1 - 0.5 * pool.labeled.float()))

    def _read(self, pool: Pool, result: PoolResult) -> float | None:
        """Add the gradients of rows that read: labeled questions among wrong texts, some without the right ones."""
        pick = random.Random(f"{self.settings.seed}, reading {self.step}")
        texts, rows = self.prepared.corpus, []
        for item in pick.sample(self.prepared.labeled, min(READ, len(self.prepared.labeled))):
            gold = list(item.gold[:2])
            place = gold[-1]
            near = range(int(self.drawer.first[place]), int(self.drawer.last[place]))
            others = [*near[max(place - near.start - 3, 0) : place - near.start + 4], *pick.sample(pool.places, 4)]
            others = self.wrong.choose(item.query, set(item.gold), others, len(others))
            chosen = pick.sample(others, min(pick.randint(0, 3), len(others)))
            answerable = pick.random() >= UNANSWERABLE or not others
            chosen = chosen + gold if answerable else chosen or others[:1]
            pick.shuffle(chosen)
            answer = (item.answer or "") if answerable else NOT_FOUND
            row = reading_row(
                self.prepared.tokenizer, self.prepared.protocol, item.query, [texts[place] for place in chosen],
                answer, pick,
            )  # fmt: skip
            if len(row.ids) <= LONGEST_READ and any(row.routes):
                rows.append(row)
        if not rows:
            return None
        rows.sort(key=lambda row: len(row.ids))
        ids = padded([row.ids for row in rows], self.model.device)
        labels, routes = torch.full_like(ids.ids, IGNORED), torch.zeros_like(ids.mask)
        for number, row in enumerate(rows):
            labels[number, : len(row.ids)] = torch.tensor(row.labels)
            routes[number, : len(row.ids)] = torch.tensor(row.routes)
        loss = reading_loss(self.model, ids.ids, labels, routes, result.pool, result.lengths)
        add_gradients(self.model.parameters(), [READ_WEIGHT * loss])
        return float(loss.detach())

    def _note(self, row: JsonObject) -> None:
        self.rows.append(row)
        write_curve(self.output / CURVE_FILE, self.rows)

    # Interruptions and the end ----------------------------------------------------------------------------------------

    def _write_checkpoint(self) -> None:
        """Write all that the run needs to go on, at once."""
        path = self.output / CHECKPOINT_FILE
        new = path.with_name(path.name + ".new")
        state = {
            "step": self.step,
            "sizes": asdict(self.sizes),
            "weights": self.weights.state_dict(),
            "temperatures": self.temperatures.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "round": self.round.first,
            "seeds": len(self.round.seeds),
            "misses": torch.from_numpy(self.round.misses),
            "others": self.others,
            "query_reduction": self.model.config.query_reduction,
        }
        torch.save(state, new)
        os.replace(new, path)

    def _resume(self, checkpoint: JsonObject) -> None:
        self.weights.load_state_dict({name: value.float() for name, value in checkpoint["weights"].items()})
        self.temperatures.load_state_dict(checkpoint["temperatures"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.others = checkpoint["others"]
        self.model.config.query_reduction = checkpoint["query_reduction"]
        first = int(checkpoint["round"])
        seeds = self.drawer.seeds(first, int(checkpoint["seeds"]))
        self.round = Round(first, seeds, checkpoint["misses"].numpy())
        self.rows = read_curve(self.output / CURVE_FILE, self.step)
        every = self.settings.eval_every or self.settings.steps
        if self.step % every == 0:  # measured when that step began, and again now
            self.rows = [row for row in self.rows if "recall" not in row or row["step"] < self.step]
        for row in self.rows:
            if "recall" in row and not row.get("as_given"):
                for name in ("layers", "distinct"):
                    row[name] = {int(layer): value for layer, value in row[name].items()}
                self.guard.check(row, step=row["step"])
        self.say(f"goes on from step {self.step}")

    def _save(self) -> str:
        """Save the result; the expression that loads it."""
        model, output = self.model, self.output
        model.config.routers_trained = True
        if self.settings.adapter:
            save_adapter(model, self.weights, self.settings.rank, output)
            loading = adapter_expression(model, self.settings.base, output, self.prepared.retrofit)
        else:
            model.save_pretrained(output)
            loading = f"MSAForCausalLM.from_pretrained({str(output)!r})"
        self.prepared.tokenizer.save_pretrained(output)
        self.prepared.protocol.save_pretrained(output)
        return loading

    def _summary(self, measurements: Sequence[JsonObject]) -> str:
        """Recall before and after, beside what it is compared to."""
        first, last = measurements[0], measurements[-1]
        begun = next(row for row in measurements if not row.get("as_given"))
        found = {"untrained router": first["recall"]}
        if begun is not first:
            found["router at first"] = begun["recall"]
        found |= {"trained router": last["recall"], **{name: value for name, value in self.others.items()}}
        found["chance"] = last["chance"]
        opening = (
            f"recall@{last['k']} of {last['questions']} held-out questions among {last['passages']} passages, after "
            f"{last['step']} steps of {self.sizes.pool} passages:"
        )
        lines = [f"{name:>18} {value:>6.3f}" for name, value in found.items()]
        return "\n".join([opening, *lines, "by kind: " + ", ".join(f"{k} {v:.3f}" for k, v in last["kinds"].items())])
