"""Train the routers of a checkpoint against every passage there is, the layers below them as they are.

    python scripts/real_corpus.py --base build/real/base --work build/real --initial build/real/routers.pt

Behind `train_real.py routers`, whose pools hold a few thousand passages: all passages are encoded once, and every
question; then every step scores its questions against all passages. Writes a checkpoint as `routers` does, which
`train_real.py adapter` and `eval_real.py` take, and others part of the way: what is trained for all passages finds a
little less among few.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model import encode_all, fresh_model, shown, trained_weights
from real_pools import Pools, shares_of
from real_rows import Flat, device, load, log
from torch import Tensor
from train_real import begin_from, save_checkpoint

from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import Temperatures
from msa_hf.training.corpus import CorpusRouters, CorpusStates, corpus_loss, corpus_states, question_states
from msa_hf.training.weights import TrainedWeights

KINDS = ("labeled", "asked", "spans")


class Questions:
    """The questions of a run as their routers read them, the gold passages and the teacher's best beside them.

    Attributes:
        states: memory layer -> [Q, hidden]. `gold`: [Q, 6] rows of the corpus, -1 behind them.
        near: [Q, n] rows that the teacher finds best. `share`: [Q] float32, the teacher's part of a target.
        of_kind: kind -> numbers among these questions, [n] int64; of labeled ones by set.
    """

    def __init__(self, arguments: argparse.Namespace, pools: Pools, corpus: CorpusStates, ask: Any) -> None:
        self.near_rows = pools.near[corpus.order]
        where = self.near_rows.device
        pick = random.Random(arguments.seed)
        labeled = {name: list(numbers) for name, numbers in pools.of_set.items()}
        cut = pools.asked >= pools.cut_out
        drawn = []
        for numbers, count in ((pools.asked[~cut], arguments.asked), (pools.asked[cut], arguments.cut)):
            drawn.append(numbers[torch.randperm(len(numbers), device=where)[:count]])
        known = torch.tensor([number for numbers in labeled.values() for number in numbers], device=where)
        self.numbers = torch.cat([known, *drawn])
        self.states = ask(pools.questions, self.numbers)
        wanted = [pick.sample(pools.wanted[number], min(len(pools.wanted[number]), 6)) for number in known.tolist()]
        places = torch.tensor([(row + 6 * [-1])[:6] for row in wanted], device=where)
        behind = pools.place_of_asked[self.numbers[len(known) :] - pools.labeled][:, None]
        places = torch.cat([places, torch.nn.functional.pad(behind, (0, 5), value=-1)])
        self.gold = corpus.rows[places.clamp(min=0)].masked_fill(places < 0, -1)
        ends = np.cumsum([0, *(len(numbers) for numbers in labeled.values())]).tolist()
        self.of_set = {
            name: torch.arange(start, stop, device=where)
            for name, start, stop in zip(labeled, ends[:-1], ends[1:], strict=True)
        }
        shares = {"labeled": arguments.soft_labeled, "asked": arguments.soft_asked, "spans": arguments.soft_spans}
        counts = {"labeled": len(known), "asked": len(drawn[0]), "spans": len(drawn[1])}
        self.share = torch.cat([torch.full((counts[kind],), shares[kind], device=where) for kind in KINDS])
        starts = np.cumsum([0, *counts.values()]).tolist()
        self.of_kind = {
            kind: torch.arange(start, stop, device=where)
            for kind, start, stop in zip(counts, starts[:-1], starts[1:], strict=True)
        }
        self.asked_near = pools.questions_near[self.numbers]
        excluded = ~pools.allowed[corpus.order]
        self.near = torch.cat(
            [
                (some @ self.near_rows.T).masked_fill_(excluded, -1).topk(min(arguments.near, len(excluded)), 1).indices
                for some in self.asked_near.split(1024)
            ]
        )

    def draw(self, counts: dict[str, int]) -> Tensor:
        """Numbers of so many questions of each kind, labeled ones by the shares of their sets."""
        names = list(self.of_set)
        weights = torch.tensor(shares_of(names))
        of_set = torch.multinomial(weights, counts["labeled"], replacement=True).bincount(minlength=len(names)).tolist()
        parts = [_some(self.of_set[name], count) for name, count in zip(names, of_set, strict=True)]
        parts += [_some(self.of_kind[kind], counts[kind]) for kind in KINDS[1:]]
        return torch.cat(parts)

    def teacher(self, numbers: Tensor, temperature: float) -> Any:
        """The teacher's logits of the passages at rows [Q, C]."""

        def logits(rows: Tensor) -> Tensor:
            return torch.einsum("qd,qcd->qc", self.asked_near[numbers], self.near_rows[rows]).float() / temperature

        return logits


def _some(numbers: Tensor, count: int) -> Tensor:
    if not len(numbers):
        return numbers
    return numbers[torch.randint(len(numbers), (count,), device=numbers.device)]


class Recall:
    """Recall of development questions among all passages, and among those of the sets alone."""

    def __init__(self, corpus: CorpusStates, questions: list[dict[str, Any]], states: dict[int, Tensor], sets: int):
        self.corpus, self.states = corpus, states
        self.banks = {"sets": corpus.order >= sets, "all": torch.zeros_like(corpus.order, dtype=torch.bool)}
        self.wanted = [{place for group in item["wanted"] for place in group} for item in questions]
        self.sets = [item["set"] for item in questions]

    def of(self, routers: CorpusRouters) -> dict[str, dict[str, dict[str, float]]]:
        ranks: dict[str, list[int]] = {bank: [] for bank in self.banks}
        for some in torch.arange(len(self.sets), device=self.corpus.order.device).split(256):
            total = torch.stack(
                routers.scores(self.corpus, {layer: states[some] for layer, states in self.states.items()})
            ).sum(0)
            for bank, left_out in self.banks.items():
                scores = total.masked_fill(left_out, float("-inf"))
                best = self.corpus.order[scores.topk(min(10, scores.shape[1]), dim=1).indices].tolist()
                for number, row in zip(some.tolist(), best, strict=True):
                    wanted = self.wanted[number]
                    ranks[bank].append(next((rank for rank, place in enumerate(row) if place in wanted), 10))
        return {
            bank: {
                name: {
                    f"@{k}": float(np.mean([r < k for r, s in zip(found, self.sets, strict=True) if s == name]))
                    for k in (1, 10)
                }
                for name in dict.fromkeys(self.sets)
            }
            for bank, found in ranks.items()
        }


@dataclass
class Read:
    """The beginning of a run: a checkpoint's model and weights, and what its routers read.

    Attributes:
        excluded: [N] bool, rows of the corpus that training does not see.
    """

    model: Any
    weights: TrainedWeights
    temperatures: Temperatures
    corpus: CorpusStates
    questions: Questions
    recall: Recall
    excluded: Tensor


def read_all(arguments: argparse.Namespace) -> Read:
    """Encode all passages, and read all questions."""
    work, where = Path(arguments.work), device()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    start = time.time()
    model = fresh_model(arguments, where)
    weights = trained_weights(arguments, model)
    temperatures = Temperatures(len(model.config.memory_layers)).to(where)
    begin_from(arguments.start, weights, temperatures, where)
    arguments.words = False
    pools = Pools(arguments, where)
    data = load(work / "sets.pt")
    with compiled_layers(model) if arguments.compile else nullcontext():
        everything = torch.arange(len(pools.passages.lengths), device=where)
        corpus = corpus_states(model, pools.passages.parts(everything, arguments.part_tokens))
        log("encoded", len(everything), "passages,", sum(corpus.counts), "chunks;", round(time.time() - start), "s")
        among = pools.passages.at(everything[: arguments.among])
        pool = encode_all(model, among, arguments.part_tokens)

        def ask(questions: Flat, numbers: Tensor) -> dict[int, Tensor]:
            order = questions.lengths[numbers].argsort()
            parts = [
                question_states(model, questions.rows(numbers[some]), pool, among.lengths)
                for some in order.split(arguments.batch)
            ]
            back = order.argsort()
            return {layer: torch.cat([part[layer] for part in parts])[back] for layer in parts[0]}

        questions = Questions(arguments, pools, corpus, ask)
        dev = Flat(data["dev"]["tokens"], data["dev"]["lengths"]).to(where)
        dev_states = ask(dev, torch.arange(len(dev.lengths), device=where))
    recall = Recall(corpus, data["dev"]["questions"], dev_states, len(data["lengths"]))
    log("read", len(questions.numbers), "questions;", round(time.time() - start), "s")
    return Read(model, weights, temperatures, corpus, questions, recall, ~pools.allowed[corpus.order])


def train(arguments: argparse.Namespace, read: Read) -> None:
    """Train routers on what was read, measure and write them."""
    work, where, start = Path(arguments.work), read.excluded.device, time.time()
    corpus, questions, temperatures = read.corpus, read.questions, copy.deepcopy(read.temperatures)
    routers = CorpusRouters(read.model).to(where)
    groups = [
        {"params": list(routers.parameters()), "lr": arguments.rate},
        {"params": list(temperatures.parameters()), "lr": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=where.type == "cuda")
    rates = [item["lr"] for item in groups]
    counts = {"asked": round(arguments.step_questions * arguments.asked_share)}
    counts["spans"] = round(arguments.step_questions * arguments.cut_share) if arguments.spans else 0
    counts["labeled"] = arguments.step_questions - sum(counts.values())

    def report(step: int, **figures: Any) -> None:
        with (work / f"{arguments.name}.curve.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "seconds": round(time.time() - start, 1), **figures}) + "\n")

    def measured(step: int, blend: float = 1.0) -> None:
        found = read.recall.of(routers)
        for bank, figures in found.items():
            log(f"step {step}, {bank}, blend {blend:g}:", shown(figures))
        report(step, recall=found, blend=blend)

    before = [weight.detach().clone() for weight in routers.parameters()]
    measured(0)
    losses: list[float] = []
    hits: list[float] = []
    for step in range(arguments.steps):
        shape = 0.5 * (1 + np.cos(np.pi * step / arguments.steps)) * min((step + 1) / arguments.warmup, 1.0)
        for item, rate in zip(optimizer.param_groups, rates, strict=True):
            item["lr"] = rate * shape
        numbers = questions.draw(counts)
        loss, hit = corpus_loss(
            routers,
            corpus,
            {layer: states[numbers] for layer, states in questions.states.items()},
            questions.gold[numbers],
            temperatures(),
            questions.teacher(numbers, arguments.soft_temperature),
            questions.share[numbers],
            questions.near[numbers],
            read.excluded,
            arguments.candidates,
            arguments.sampled,
            arguments.layer_weight,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(routers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        hits.append(float(hit))
        if (step + 1) % arguments.log_every == 0:
            figures = {"loss": float(np.mean(losses)), "hits": float(np.mean(hits))}
            log(f"step {step + 1}:", {k: round(v, 3) for k, v in figures.items()}, f"{time.time() - start:.0f} s")
            report(step + 1, **figures, temperature=temperatures()[0].item())
            losses, hits = [], []
        if (step + 1) % arguments.measure_every == 0 and step + 1 < arguments.steps:
            measured(step + 1)
    trained = [weight.detach().clone() for weight in routers.parameters()]
    for blend in sorted({1.0, *(float(share) for share in arguments.blends.split(",") if share)}):
        with torch.no_grad():
            for weight, first, last in zip(routers.parameters(), before, trained, strict=True):
                weight.copy_(torch.lerp(first, last, blend))
        measured(arguments.steps, blend=blend)
        name = arguments.name if blend == 1 else f"{arguments.name}-{blend:g}"
        write(argparse.Namespace(**{**vars(arguments), "name": name}), read.weights, routers, temperatures)
        log("wrote", work / f"{name}.pt", f"{time.time() - start:.0f} s")


def write(
    arguments: argparse.Namespace, weights: TrainedWeights, routers: CorpusRouters, temperatures: Temperatures
) -> None:
    """Write a checkpoint with these projections in the place of its own."""
    projections = {f"router_{kind}_proj": parts for kind, parts in (("q", routers.queries), ("k", routers.keys))}
    for name, (_, master) in weights.whole.items():
        for projection, parts in projections.items():
            if f"{projection}.weight" in name:
                layer = int(name.partition("layers.")[2].partition(".")[0])
                master.data.copy_(parts[routers.layers.index(layer)])
    save_checkpoint(arguments, weights, temperatures, arguments.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--initial", dest="start", required=True, help="a checkpoint of `routers`, or an adapter")
    parser.add_argument("--name", default="finished")
    parser.add_argument("--shards", type=int, default=1, help="in which questions were asked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", default="14,19,24", help="memory layers of the checkpoint")
    parser.add_argument("--rank", type=int, default=28, help="of its updates")
    parser.add_argument("--upper-rank", type=int, default=28)
    parser.add_argument("--similarity", choices=("cosine", "dot"), default="cosine")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument(
        "--blends",
        default="0.5,0.75",
        help="shares of the way from the first weights to the last that are kept as well",
    )
    parser.add_argument("--step-questions", type=int, default=512)
    parser.add_argument("--asked", type=int, default=150_000, help="asked questions that are used")
    parser.add_argument("--asked-share", type=float, default=0.5, help="of a step's questions")
    parser.add_argument("--spans", action="store_true", help="the queries of `train_real.py spans` too")
    parser.add_argument("--cut", type=int, default=60_000, help="cut queries that are used")
    parser.add_argument("--cut-share", type=float, default=0.1)
    parser.add_argument("--drop", type=float, default=0.1, help="share of the asked questions that fit least")
    parser.add_argument("--soft-labeled", type=float, default=0.4, help="the teacher's share of a target")
    parser.add_argument("--soft-asked", type=float, default=0.8)
    parser.add_argument("--soft-spans", type=float, default=1.0)
    parser.add_argument("--soft-temperature", type=float, default=0.03)
    parser.add_argument("--near", type=int, default=32, help="of the teacher's best that gradients reach")
    parser.add_argument("--candidates", type=int, default=128, help="of the routers' own best, likewise")
    parser.add_argument("--sampled", type=int, default=8192, help="passages that stand for all others")
    parser.add_argument("--layer-weight", type=float, default=0.1)
    parser.add_argument("--among", type=int, default=90_000, help="passages to which questions attend meanwhile")
    parser.add_argument("--batch", type=int, default=256, help="questions read at a time")
    parser.add_argument("--part-tokens", type=int, default=300_000)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--measure-every", type=int, default=200)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    train(arguments, read_all(arguments))


if __name__ == "__main__":
    main()
