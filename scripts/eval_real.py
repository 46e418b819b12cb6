"""Measure trained routers on real text: recall of gold passages in banks of several sizes, beside a teacher's.

    python scripts/eval_real.py --base build/real/base --work build/real --name routers --parts 0-11 --sizes 5,30,99

The banks are nested: the passages of all question sets, then those of the further text in order, up to so many million
tokens. A passage counts as found where it belongs to a gold document. `--out` gets the figures, and per size and system
the best passages of every question, from which other figures can be made.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from train_real import Flat, device, encode_all, fresh_model, log, source_names, trained_weights

from msa_hf.training.compiling import compiled_layers
from msa_hf.training.contrastive import route_rows

KEPT = 100  # best passages kept per question
AT = (1, 5, 10)


def figures_of(best: np.ndarray, questions: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Set -> recall of any gold document, and of all of them, among the best passages [Q, n]."""
    found: dict[str, dict[str, float]] = {}
    kinds = sorted({question["set"] for question in questions})
    for kind in kinds:
        rows = [number for number, question in enumerate(questions) if question["set"] == kind]
        item: dict[str, float] = {"questions": len(rows)}
        for k in AT:
            some, every = [], []
            for number in rows:
                chosen = set(best[number, :k].tolist())
                hits = [any(place in chosen for place in group) for group in questions[number]["wanted"]]
                some.append(any(hits))
                every.append(all(hits))
            item[f"any@{k}"], item[f"all@{k}"] = float(np.mean(some)), float(np.mean(every))
        found[kind] = item
    return found


@torch.no_grad()
def router_best(
    model: Any, flat: Flat, questions: Flat, limits: dict[str, int], budget: int
) -> tuple[dict[str, np.ndarray], float]:
    """Size -> best passages [Q, KEPT], and the seconds that encoding took."""
    start = time.time()
    pool = encode_all(model, flat, budget)
    if flat.lengths.is_cuda:
        torch.cuda.synchronize()
    seconds = time.time() - start
    log("encoded", int(flat.lengths.sum()), "tokens in", round(seconds, 1), "s")
    best: dict[str, list[Tensor]] = {name: [] for name in limits}
    everything = torch.arange(len(questions.lengths), device=flat.lengths.device)
    for some in everything.split(64):
        rows = questions.rows(some)
        scores = route_rows(model, rows, pool, flat.lengths)
        total = torch.stack(list(scores.values())).sum(0)
        for name, limit in limits.items():
            best[name].append(total[:, :limit].topk(min(KEPT, limit), dim=1).indices.int().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in best.items()}, seconds


@torch.no_grad()
def teacher_best(near: Tensor, asked: Tensor, limits: dict[str, int]) -> dict[str, np.ndarray]:
    best: dict[str, list[Tensor]] = {name: [] for name in limits}
    for rows in asked.split(256):
        scores = rows @ near.T
        for name, limit in limits.items():
            best[name].append(scores[:, :limit].topk(min(KEPT, limit), dim=1).indices.int().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--name", help="of the routers' checkpoint; without it the teacher alone is measured")
    parser.add_argument("--parts", default="0-11")
    parser.add_argument("--sizes", default="5,30,99", help="of the banks, in million tokens; the first is all sets")
    parser.add_argument("--out", required=True)
    parser.add_argument("--part-tokens", type=int, default=400_000)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    arguments = parser.parse_args()
    work, out, where = Path(arguments.work), Path(arguments.out), device()
    out.mkdir(parents=True, exist_ok=True)
    names = source_names(arguments.parts)
    loaded = [torch.load(work / f"{name}.pt", weights_only=True) for name in names]
    flat = Flat.joined([Flat(item["tokens"], item["lengths"]) for item in loaded]).to(where)
    dev = loaded[0]["dev"]
    ends = flat.lengths.cumsum(0)
    limits = {}
    for place, size in enumerate(arguments.sizes.split(",")):
        count = int(torch.searchsorted(ends, int(float(size) * 1_000_000)))
        limits[f"{size}M"] = len(loaded[0]["lengths"]) if place == 0 else min(count, len(flat.lengths))
    sizes = {name: {"passages": limit, "tokens": int(ends[limit - 1])} for name, limit in limits.items()}
    log(sizes)
    report: dict[str, Any] = {"sizes": sizes}
    systems: dict[str, dict[str, np.ndarray]] = {}
    if arguments.name:
        checkpoint = torch.load(work / f"{arguments.name}.pt", weights_only=True)
        made = argparse.Namespace(**{**checkpoint["arguments"], "base": arguments.base})
        model = fresh_model(made, where)
        trained_weights(made, model).load_state_dict(
            {name: value.to(where).float() for name, value in checkpoint["weights"].items()}
        )
        if arguments.compile:
            with compiled_layers(model):
                systems["router"], seconds = router_best(
                    model, flat, Flat(dev["tokens"], dev["lengths"]).to(where), limits, arguments.part_tokens
                )
        else:
            systems["router"], seconds = router_best(
                model, flat, Flat(dev["tokens"], dev["lengths"]).to(where), limits, arguments.part_tokens
            )
        report["encoding_seconds"] = seconds
    taught = [work / f"{name}.teacher.pt" for name in names]
    have = next((place for place, path in enumerate(taught) if not path.exists()), len(taught))
    if have:
        first = torch.load(taught[0], weights_only=True)
        near = torch.cat([first["passages"], *(torch.load(path, weights_only=True) for path in taught[1:have])])
        within = {name: min(limit, len(near)) for name, limit in limits.items()}
        systems["teacher"] = teacher_best(near.to(where), first["dev"].to(where), within)
        report["teacher_passages"] = within
    for system, best in systems.items():
        report[system] = {name: figures_of(rows, dev["questions"]) for name, rows in best.items()}
        for name in best:
            print(system, name)
            for kind, item in report[system][name].items():
                print("   ", kind.ljust(22), "  ".join(f"{key} {value:.3f}" for key, value in item.items()))
    Path(out, f"{arguments.name or 'teacher'}.json").write_text(json.dumps(report, indent=1))
    np.savez_compressed(
        Path(out, f"{arguments.name or 'teacher'}.npz"),
        **{f"{system} {name}": rows[:, :50] for system, best in systems.items() for name, rows in best.items()},
    )


if __name__ == "__main__":
    main()
