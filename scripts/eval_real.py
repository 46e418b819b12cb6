"""Measure trained routers on real text: recall and answers in banks of several sizes, beside BM25 and embeddings.

    python   scripts/real_lexical.py rank   --work build/real --parts 0-10
    torchrun --nproc-per-node 1 scripts/eval_real.py search --base build/real/base --work build/real --out OUT
    torchrun --nproc-per-node 1 scripts/eval_real.py rerank --base build/real/base --work build/real --out OUT
    python   scripts/eval_real.py fuse   --work build/real --out OUT
    torchrun --nproc-per-node 1 scripts/eval_real.py read   --base build/real/base --work build/real --out OUT
    python   scripts/eval_real.py report --work build/real --out OUT

The banks are nested: the passages of all question sets, then those of the further text in order, up to so many
million tokens. A passage counts as found where it belongs to a gold document. `search` ranks passages by the routers,
by BM25 (`real_lexical.py`) and by the teacher; `rerank` has the model read the best of them again (the likelihood of
the question behind each); `fuse` puts all of these together, with weights fitted on labeled questions that training
left out, and reads the best of them for their wording ("unread": not). `read` puts the three best passages of every
system before the same reader, and no text and the gold text beside them; where the reader refuses, it is asked again
and may not begin with the refusal's first word ("pressed"). `report` makes tables with intervals and plots of what
both wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_answers import READ, READ_SETS, answers_to, holding_place, prompt_row
from real_data import sets_among
from real_model import NOT_FOUND, PROTOCOL, encode_all, load_trained, total_scores
from real_rows import Flat, connect, device, load, log, rank, save, source_names, world
from real_systems import (
    AT,
    KEPT,
    CountedWords,
    Lists,
    asked_questions,
    bank_limits,
    fit_on,
    held_out_numbers,
    hit_groups,
    interval,
    lists_of,
    ranking_of,
    recalls,
    with_wording,
)
from torch import Tensor
from transformers import AutoTokenizer

from msa_hf.evaluation import exact_match
from msa_hf.evaluation.metrics import normalize_answer
from msa_hf.retrieval import FusionWeights, QueryLikelihood, fuse
from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import route_rows
from msa_hf.training.sharing import gather_rows

FEW = 20  # best passages kept of a ranking
AGAIN = 50  # of the three systems together that are read again, and as many of the routers alone
SYSTEMS = ("router", "bm25", "minilm")
HYBRIDS = {"hybrid": ("router", "bm25"), "hybrid with minilm": SYSTEMS}  # name -> what it puts together
READ_AGAIN = ("router", *HYBRIDS)  # what is put together with the scores of reading again


# search ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def search(arguments: argparse.Namespace) -> None:
    """Rank passages by every system, in banks of all sizes."""
    work, out, where = Path(arguments.work), Path(arguments.out), device()
    group = connect(where)
    out.mkdir(parents=True, exist_ok=True)
    names = source_names(arguments.parts)
    data = load(work / "sets.pt")
    loaded = [data, *(load(work / f"{name}.pt") for name in names[1:])]
    flat = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
    limits = bank_limits(flat.lengths.cpu().numpy(), len(data["lengths"]), arguments.sizes)
    questions = asked_questions(data)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = [tokenizer(item["question"] + "\n", add_special_tokens=False)["input_ids"] for item in questions]
    asked = Flat.of(rows).to(where)
    taught = load(work / "sets.teacher.pt")
    near = torch.cat([taught["passages"], *(load(work / f"{name}.teacher.pt") for name in names[1:])]).to(where)
    asked_near = torch.cat([taught["dev"], taught["train"][held_out_numbers(data)]]).to(where)
    lexical = dict(np.load(work / "lexical.npz"))
    model = load_trained(work / f"{arguments.name}.pt", arguments.base, where)
    start = time.time()
    with compiled_layers(model) if arguments.compile else nullcontext():
        pool = encode_all(model, flat, arguments.part_tokens, group)
        seconds = time.time() - start
        log("encoded", int(flat.lengths.sum()), "tokens in", round(seconds, 1), "s by", world(), "processes")
        mine = torch.arange(len(questions), device=where)[rank() :: world()]
        found: dict[str, list[Tensor]] = defaultdict(list)
        for some in mine.split(64):
            total = total_scores(route_rows(model, asked.rows(some), pool, flat.lengths))
            similar = (asked_near[some] @ near.T).float()
            for size, limit in limits.items():
                words = torch.from_numpy(lexical[f"{size} places"][some.cpu().numpy(), :KEPT]).to(where).long()
                values = torch.from_numpy(lexical[f"{size} scores"][some.cpu().numpy(), :KEPT]).to(where)
                found[f"{size} places"].append(candidates_of(total[:, :limit], similar[:, :limit], words))
                places = found[f"{size} places"][-1]
                found[f"{size} router"].append(total.gather(1, places.clamp(min=0)))
                found[f"{size} minilm"].append(similar.gather(1, places.clamp(min=0)))
                found[f"{size} bm25"].append(scores_at(places, words, values))
    whole = {}
    order = gather_rows(mine, group).argsort()
    for name, parts in found.items():
        whole[name] = gather_rows(torch.cat(parts), group)[order]
    if rank() == 0:
        report: dict[str, Any] = {}
        for size in limits:
            kept = {name: whole[f"{size} {name}"].float().cpu().numpy() for name in SYSTEMS}
            places = whole[f"{size} places"].cpu().numpy().astype(np.int32)
            np.savez_compressed(out / f"candidates_{size}.npz", places=places, **kept)
        ends = flat.lengths.cumsum(0)
        report["sizes"] = {name: {"passages": limit, "tokens": int(ends[limit - 1])} for name, limit in limits.items()}
        report["encoding"] = {"seconds": seconds, "processes": world()}
        report["bytes_per_token"] = bank_bytes(model, flat)
        (out / "search.json").write_text(json.dumps(report, indent=1))


def bank_bytes(model: Any, flat: Flat) -> float:
    """Bytes of bfloat16 routing keys and pooled keys and values per token of a bank."""
    config, size = model.config, model.config.chunk_size
    chunks = int(((flat.lengths + size - 1) // size).sum())
    width = config.num_key_value_heads * config.head_dim
    return chunks * len(config.memory_layers) * 3 * width * 2 / int(flat.lengths.sum())


def candidates_of(router: Tensor, similar: Tensor, words: Tensor) -> Tensor:
    """[Q, 3 KEPT] places that any system has among its best, each once, -1 behind them."""
    most = min(KEPT, router.shape[1])
    found = torch.cat([router.topk(most, dim=1).indices, words, similar.topk(most, dim=1).indices], dim=1)
    found = found.sort(1).values
    again = torch.zeros_like(found, dtype=torch.bool)
    again[:, 1:] = found[:, 1:] == found[:, :-1]
    return found.masked_fill(again, -1).sort(1, descending=True).values


def scores_at(places: Tensor, listed: Tensor, values: Tensor) -> Tensor:
    """[Q, C] the scores of `places` in a system's list; NaN for those that it does not list."""
    ordered, order = listed.sort(1)
    at = torch.searchsorted(ordered, places.contiguous()).clamp(max=ordered.shape[1] - 1)
    there = ordered.gather(1, at) == places
    return values.gather(1, order.gather(1, at)).masked_fill(~there, float("nan"))


# rerank ---------------------------------------------------------------------------------------------------------------


def rerank(arguments: argparse.Namespace) -> None:
    """Have the model read the best candidates again, each passage of a question once for all banks."""
    work, out, where = Path(arguments.work), Path(arguments.out), device()
    group = connect(where)
    names = source_names(arguments.parts)
    loaded = [load(work / f"{name}.pt") for name in names]
    passages = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded])
    questions = asked_questions(loaded[0])
    model = load_trained(work / f"{arguments.name}.pt", arguments.base, where)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    reader = QueryLikelihood(model, tokenizer, batch_tokens=arguments.batch_tokens)
    wanted: dict[str, list[list[int]]] = {}
    for size in json.loads((out / "search.json").read_text())["sizes"]:
        kept = dict(np.load(out / f"candidates_{size}.npz"))
        together = lists_of(kept, SYSTEMS)
        wanted[size] = [[place for place, _ in [*fuse(item)[:AGAIN], *item["router"][:AGAIN]]] for item in together]
    start, scores = time.time(), []
    for number in range(rank(), len(questions), world()):
        places = sorted({place for lists in wanted.values() for place in lists[number]})
        asked = tokenizer(questions[number]["question"].strip(), add_special_tokens=False)["input_ids"]
        found = reader.token_scores(asked, [passages.row(place) for place in places])
        scores.append((number, dict(zip(places, found, strict=True))))
        if len(scores) % 500 == 0:
            save(work / f"read_again{rank()}.pt", scores)  # a run that is cut off keeps these
            log("read again", len(scores), "questions in", round(time.time() - start), "s, by each process")
    save(work / f"read_again{rank()}.pt", scores)
    if group is not None:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank() == 0:
        of_question = dict(item for number in range(world()) for item in load(work / f"read_again{number}.pt"))
        widest = max(len(row) for lists in wanted.values() for row in lists)
        for size, lists in wanted.items():
            places = np.full((len(questions), widest), -1, dtype=np.int32)
            values = np.full(places.shape, np.nan, dtype=np.float32)
            for number, row in enumerate(lists):
                row = list(dict.fromkeys(row))
                places[number, : len(row)] = row
                values[number, : len(row)] = [of_question[number][place] for place in row]
            np.savez_compressed(out / f"read_again_{size}.npz", places=places, scores=values)
        log("read again", len(questions), "questions in", round(time.time() - start), "s")


def read_again_lists(first: list[list[tuple[int, float]]], kept: dict[str, np.ndarray]) -> list[Lists]:
    """For every question what was found, and the same documents by the scores of reading them again."""
    found = []
    for number, ranking in enumerate(first):
        scores = dict(zip(kept["places"][number].tolist(), kept["scores"][number].tolist(), strict=True))
        again = [(place, scores[place]) for place, _ in ranking if place in scores]
        found.append({"found": ranking, "reader": sorted(again, key=lambda pair: -pair[1])})
    return found


# fuse -----------------------------------------------------------------------------------------------------------------


def put_together(arguments: argparse.Namespace) -> None:
    """Put the systems together with weights fitted on the questions that training left out; recall of everything."""
    work, out = Path(arguments.work), Path(arguments.out)
    questions = asked_questions(load(work / "sets.pt"))
    dev = [number for number, item in enumerate(questions) if item["split"] == "dev"]
    report = json.loads((out / "search.json").read_text())
    kept = {size: dict(np.load(out / f"candidates_{size}.npz")) for size in report["sizes"]}
    texts = [text for name in source_names(arguments.parts) for text in load(work / f"{name}.texts")]
    words = CountedWords(texts)
    best: dict[str, np.ndarray] = {}
    for size, item in kept.items():
        for system in SYSTEMS:
            scores = np.where((item["places"] < 0) | np.isnan(item[system]), -np.inf, item[system])
            order = np.argsort(-scores, axis=1, kind="stable")[:, :FEW]
            best[f"{size} {system}"] = np.take_along_axis(item["places"], order, 1)
    first = {size: {"router": [item["router"] for item in lists_of(kept[size], ("router",))]} for size in kept}
    for name, systems in HYBRIDS.items():
        lists = {size: lists_of(item, systems) for size, item in kept.items()}
        weights = fit_on(lists, questions)
        for size, ranked in rankings(weights, lists, questions).items():
            best[f"{size} {name}, unread"] = places_of(ranked)
        weights = with_wording(weights, lists, questions, texts, words)
        keep(weights, out / name.replace(" ", "-"), name)
        for size, ranked in rankings(weights, lists, questions, texts, words).items():
            first[size][name] = ranked
            best[f"{size} {name}"] = places_of(ranked)
    read = {size: out / f"read_again_{size}.npz" for size in kept}
    if all(path.exists() for path in read.values()):
        again = {size: dict(np.load(path)) for size, path in read.items()}
        for name in READ_AGAIN:
            lists = {size: read_again_lists(first[size][name], again[size]) for size in kept}
            name += " + reader"
            weights = fit_on(lists, questions)
            keep(weights, out / name.replace(" + ", "-").replace(" ", "-"), name)
            for size, ranked in rankings(weights, lists, questions).items():
                best[f"{size} {name}"] = places_of(ranked)
    np.savez_compressed(out / "best.npz", **best)
    for name, rows in best.items():
        report[name] = recalls(rows[dev], [questions[number] for number in dev])
        log(name.ljust(24), "  ".join(f"{kind} {v['any@1']:.3f}/{v['any@10']:.3f}" for kind, v in report[name].items()))
    (out / "search.json").write_text(json.dumps(report, indent=1))


def keep(weights: FusionWeights, folder: Path, name: str) -> None:
    """Write weights to a folder of their own."""
    log(name, "by", weights.method, weights.recall, "read for wording" if weights.wording else "")
    folder.mkdir(exist_ok=True)
    weights.save_pretrained(folder)


def rankings(
    weights: FusionWeights,
    lists: dict[str, list[Lists]],
    questions: list[dict[str, Any]],
    texts: Sequence[str] = (),
    words: CountedWords | None = None,
) -> dict[str, list[list[tuple[int, float]]]]:
    """Size -> the ranking of every question, best `AGAIN`; read for their wording with texts and words."""

    def ranked(item: Lists, question: str) -> list[tuple[int, float]]:
        return fuse(item, weights, question) if words is None else ranking_of(item, weights, question, texts, words)

    return {
        size: [ranked(item, question["question"])[:AGAIN] for item, question in zip(found, questions, strict=True)]
        for size, found in lists.items()
    }


def places_of(rankings: list[list[tuple[int, float]]]) -> np.ndarray:
    """[Q, FEW] int32, -1 behind short rankings."""
    rows = np.full((len(rankings), FEW), -1, dtype=np.int32)
    for number, ranked in enumerate(rankings):
        rows[number, : len(ranked[:FEW])] = [place for place, _ in ranked[:FEW]]
    return rows


def sets_read(questions: list[dict[str, Any]]) -> list[str]:
    """Sets of development questions that are read."""
    return sets_among({item["set"] for item in questions if item["split"] == "dev"}, READ_SETS)


# read -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read(arguments: argparse.Namespace) -> None:
    """Answer the development questions from the best passages of every system."""
    work, out, where = Path(arguments.work), Path(arguments.out), device()
    group = connect(where)
    data = load(work / "sets.pt")
    names = source_names(arguments.parts)
    texts = [text for name in names for text in load(work / f"{name}.texts")]
    questions = asked_questions(data)
    best = dict(np.load(out / "best.npz"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    tokenizer.padding_side = "left"
    model = load_trained(work / f"{arguments.name}.pt", arguments.base, where)
    chosen = []
    for kind in sets_read(questions):
        of_kind = [n for n, item in enumerate(questions) if item["split"] == "dev" and item["set"] == kind]
        graded = [n for n in of_kind if any(map(str.strip, questions[n]["answers"]))]
        if len(graded) < len(of_kind):
            log(
                kind,
                "has",
                len(of_kind) - len(graded),
                "questions without an answer to compare with; they are not read",
            )
        chosen += graded[: arguments.limit]
    kept = arguments.systems.split(",") if arguments.systems else ["no memory", "gold text", *best]
    jobs: list[tuple[str, int, list[int]]] = []
    for number in chosen:
        gold = [holding_place(group_, questions[number]["answers"], texts) for group_ in questions[number]["wanted"]]
        jobs += [("no memory", number, []), ("gold text", number, gold[:READ])]
        jobs += [(name, number, rows[number, :READ].tolist()) for name, rows in best.items()]
    jobs = [job for job in jobs if job[0] in kept]
    # Equal prompts are read once.
    wanted = sorted({(number, tuple(place for place in places if place >= 0)) for _, number, places in jobs})
    rows = [
        prompt_row(number, questions[number]["question"], places, texts, tokenizer)
        for number, places in wanted[rank() :: world()]
    ]
    start = time.time()
    limits = {"batch": arguments.batch, "batch_tokens": arguments.batch_tokens}
    answered = answers_to(rows, model, tokenizer, **limits)
    refused = [row for row in rows if answered[row[:2]] == NOT_FOUND]
    spelled = [PROTOCOL.answer_opening + words for words in (NOT_FOUND, NOT_FOUND.capitalize())]
    first = [ids[0] for ids in tokenizer(spelled, add_special_tokens=False)["input_ids"]]
    pressed = answered | answers_to(refused, model, tokenizer, **limits, begin_suppress_tokens=first)
    answers = [
        {"number": row[0], "places": row[1], "answer": answered[row[:2]], "pressed": pressed[row[:2]]} for row in rows
    ]
    log("read", len(answers), "prompts in", round(time.time() - start, 1), "s, by each process")
    Path(work, f"answers{rank()}.json").write_text(json.dumps(answers))
    if group is not None:
        torch.distributed.barrier()
    if rank() == 0:
        everything = [
            row for number in range(world()) for row in json.loads(Path(work, f"answers{number}.json").read_text())
        ]
        by_prompt = {(row["number"], tuple(row["places"])): row for row in everything}
        lines = []
        for name, number, places in jobs:
            row = by_prompt[number, tuple(place for place in places if place >= 0)]
            lines.append({"system": name, "number": number, "answer": row["answer"]})
            lines.append({"system": f"{name}, pressed", "number": number, "answer": row["pressed"]})
        (out / "answers.json").write_text(json.dumps(lines))
        for name, item in answer_figures(lines, questions).items():
            log(
                name.ljust(16), "  ".join(f"{kind} {value['em']:.3f}/{value['f1']:.3f}" for kind, value in item.items())
            )


def token_f1(answer: str, wanted: str) -> float:
    """The harmonic mean of precision and recall over the words of normalized answers."""
    mine, theirs = normalize_answer(answer).split(), normalize_answer(wanted).split()
    left = list(theirs)
    common = 0
    for word in mine:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return float(mine == theirs)
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def answer_figures(
    lines: list[dict[str, Any]], questions: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """System -> set -> exact match and F1 with their intervals; `all` beside the sets."""
    hits: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in lines:
        question = questions[row["number"]]
        em = float(any(exact_match(row["answer"], wanted) for wanted in question["answers"]))
        f1 = max((token_f1(row["answer"], wanted) for wanted in question["answers"]), default=0.0)
        for kind in (question["set"], "all"):
            hits[row["system"]][kind].append((em, f1))
    return {
        system: {
            kind: {
                "em": float(np.mean([em for em, _ in rows])),
                "f1": float(np.mean([f1 for _, f1 in rows])),
                "em_interval": interval([em for em, _ in rows]),
                "f1_interval": interval([f1 for _, f1 in rows]),
                "questions": len(rows),
            }
            for kind, rows in kinds.items()
        }
        for system, kinds in hits.items()
    }


# report ---------------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> None:
    """Tables (`report.md`) and plots of what `search` and `read` wrote."""
    import matplotlib

    matplotlib.use("Agg")
    work, out = Path(arguments.work), Path(arguments.out)
    questions = asked_questions(load(work / "sets.pt"))
    dev = [item for item in questions if item["split"] == "dev"]
    found = json.loads((out / "search.json").read_text())
    best = {name: rows[: len(dev)] for name, rows in np.load(out / "best.npz").items()}
    lines = [
        "# Recall",
        "",
        "R@1 / R@5 / R@10 of a gold document (several hops: of all of them), 95 % interval of R@1.",
        "",
    ]
    sizes = list(found["sizes"])
    kinds = sorted({item["set"] for item in dev})
    systems = tuple(dict.fromkeys(name.partition(" ")[2] for name in best))
    for size in sizes:
        tokens = found["sizes"][size]["tokens"] / 1e6
        lines += [f"## {tokens:.1f}M tokens, {found['sizes'][size]['passages']} passages", ""]
        lines += ["| | " + " | ".join(systems) + " |", "|---|" + "---|" * len(systems)]
        for kind in kinds:
            cells = []
            rows = [number for number, item in enumerate(dev) if item["set"] == kind]
            how = all if kind == "multihop" else any
            for system in systems:
                places = best[f"{size} {system}"]
                hits = {k: [float(how(hit_groups(places[n, :k], dev[n]))) for n in rows] for k in AT}
                low, high = interval(hits[1])
                cells.append(" / ".join(f"{np.mean(hits[k]):.3f}" for k in AT) + f" ({low:.3f} to {high:.3f})")
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        lines.append("")
    figures = answer_figures(json.loads((out / "answers.json").read_text()), questions)
    lines += ["# Answers", "", f"Exact match / F1 with {READ} texts read; 95 % interval of exact match over all.", ""]
    read_sets = sets_read(questions)
    lines += ["| | " + " | ".join(read_sets) + " | all |", "|---|" + "---|" * (len(read_sets) + 1)]
    for system, item in figures.items():
        cells = [f"{item[kind]['em']:.3f} / {item[kind]['f1']:.3f}" if kind in item else "-" for kind in read_sets]
        low, high = item["all"]["em_interval"]
        cells.append(f"{item['all']['em']:.3f} / {item['all']['f1']:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_recall(out / "recall.png", found, systems)
    plot_answers(out / "answers.png", found, figures)


def plot_recall(path: Path, found: dict[str, Any], systems: tuple[str, ...]) -> None:
    """R@1 against the size of the bank, one panel per set."""
    from matplotlib import pyplot

    there = found[f"{next(iter(found['sizes']))} router"]
    kinds = sets_among(there, (*READ_SETS, "multihop"))
    width = 3.6 * len(kinds) + 2  # with room for the legend
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(width, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    tokens = [item["tokens"] for item in found["sizes"].values()]
    for panel, kind in zip(panels[0], kinds, strict=True):
        name = "all@10" if kind == "multihop" else "any@1"
        for system in systems:
            values = [found[f"{size} {system}"][kind][name] for size in found["sizes"]]
            panel.plot(tokens, values, marker="o", label=system)
        panel.set(xscale="log", title=f"{kind} ({name})", xlabel="tokens in the bank", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("recall")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_answers(path: Path, found: dict[str, Any], figures: dict[str, Any]) -> None:
    """F1 of answers against the size of the bank, with no text and the gold text as bounds."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 3.6))
    tokens = [item["tokens"] for item in found["sizes"].values()]
    for system in dict.fromkeys(name.partition(" ")[2] for name in figures if name.partition(" ")[0] in found["sizes"]):
        names = [f"{size} {system}" for size in found["sizes"]]
        if all(name in figures for name in names):
            panel.plot(tokens, [figures[name]["all"]["f1"] for name in names], marker="o", label=system)
    for name, style in (("gold text", "--"), ("no memory", ":")):
        if name in figures:
            panel.axhline(figures[name]["all"]["f1"], linestyle=style, color="gray", label=name)
    panel.set(xscale="log", xlabel="tokens in the bank", ylabel="F1 of answers", ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__)
        made.set_defaults(run=run)
        made.add_argument("--work", required=True)
        made.add_argument("--out", required=True)
        return made

    made = command("search", search)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers", help="of the checkpoint that training wrote")
    made.add_argument("--parts", default="0-10")
    made.add_argument("--sizes", default="5,10,30,99", help="of the banks, in million tokens; the first is all sets")
    made.add_argument("--part-tokens", type=int, default=300_000)
    made.add_argument("--no-compile", dest="compile", action="store_false")

    made = command("read", read)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--parts", default="0-10")
    made.add_argument("--systems", help="those that are read, separated by commas (default: all)")
    made.add_argument("--limit", type=int, help="questions of each set (default: all)")
    made.add_argument("--batch", type=int, default=192)
    made.add_argument("--batch-tokens", type=int, default=160_000)

    made = command("rerank", rerank)
    made.add_argument("--base", required=True)
    made.add_argument("--name", default="routers")
    made.add_argument("--parts", default="0-10")
    made.add_argument("--batch-tokens", type=int, default=60_000)

    made = command("fuse", put_together)
    made.add_argument("--parts", default="0-10")
    command("report", report)

    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
