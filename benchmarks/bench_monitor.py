"""Measure a monitor on blind spots that are planted in banks of invented documents.

    python benchmarks/bench_monitor.py --out monitor.json

Thresholds come from questions that msa-hf-tiny answers rightly, in banks of some seeds; they are judged on banks of
other seeds. All banks have blind spots of every kind of `tests/helpers/blind_spots.py`; the thresholds come from
questions about other documents. A blind spot counts if the
answer is wrong, so that routing missed it; a false alarm is a flagged question that is answered rightly and about no
planted document. `--from FILE` prints the tables of an earlier run again, with other options of the calibration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import torch
from blind_spots import KINDS, plant
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.evaluation import UNANSWERABLE, exact_match, make_corpus
from msa_hf.generation import PromptProtocol
from msa_hf.hybrid.monitoring import CHECKS, SIGNALS, Calibration, Monitor, calibrate
from msa_hf.retrieval import add_lexical_index
from msa_hf.tables import table_lines

ROOT = Path(__file__).resolve().parents[1]


def prose() -> list[str]:
    lines = (ROOT / "examples" / "quickstart" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["text"] for row in map(json.loads, lines) if row["key"].startswith("prose-")]


def measured(arguments: Any) -> dict[str, Any]:
    """The findings of all banks."""
    name = str(ROOT / "model_cards" / "msa-hf-tiny")
    model = MSAForCausalLM.from_pretrained(name, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(name), PromptProtocol.from_pretrained(name)
    found: dict[str, Any] = {"findings": [], "hardware": f"{torch.get_num_threads()} threads, {arguments.dtype}"}
    found["versions"] = {package: metadata.version(package) for package in ("torch", "transformers")}
    for part, seeds in (("test", arguments.test_seeds), ("calibration", arguments.calibration_seeds)):
        for seed in seeds:
            start = time.time()
            corpus = make_corpus(arguments.documents, seed, "test", prose(), 0.2)
            # A monitor is calibrated on the kind of bank that it watches: with blind spots, which nobody knows of.
            healthy = arguments.healthy if part == "test" else arguments.good
            planted = plant(model, tokenizer, protocol, corpus, arguments.spots, healthy, prose(), tuple(KINDS), seed)
            add_lexical_index(planted.bank)
            print(f"{part}, seed {seed}: {len(planted.bank)} documents, {time.time() - start:.0f} s", flush=True)
            monitor = Monitor(
                model, tokenizer, planted.bank, protocol, refusal=UNANSWERABLE, max_new_tokens=24, batch_size=16
            )
            asked = planted.questions if part == "test" else {}
            for kind, questions in [*asked.items(), ("healthy", planted.healthy)]:
                start = time.time()
                for question, finding in zip(questions, monitor.check([item.text for item in questions]), strict=True):
                    record = {**finding.to_dict(), "part": part, "seed": seed, "planted": kind, "kind": question.kind}
                    record["right"] = exact_match(finding.answer, question.answer)
                    found["findings"].append(record)
                print(
                    f"{part}, seed {seed}: {kind}, {len(questions)} questions, {time.time() - start:.0f} s", flush=True
                )
                if arguments.out is not None:
                    arguments.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def tables(found: dict[str, Any], arguments: Any) -> None:
    """Print what was flagged."""
    findings = found["findings"]
    good = [item["signals"] for item in findings if item["part"] == "calibration" and item["right"]]
    verdicts: dict[str, Calibration] = {}
    for name, keep in (
        ("all signals", lambda signal: True),
        ("routing and search alone", lambda signal: SIGNALS[signal].check is None),
        *((f"{check} alone", lambda signal, check=check: SIGNALS[signal].check == check) for check in CHECKS),
    ):
        chosen = [{signal: value for signal, value in item.items() if keep(signal)} for item in good]
        verdicts[name] = calibrate(chosen, arguments.false_alarms, arguments.confidence)
    whole = verdicts["all signals"]
    print(
        f"\n{len(good)} calibration questions answered rightly, at most {arguments.false_alarms:.0%} false alarms with "
        f"confidence {arguments.confidence:.0%}; threshold {whole.threshold:.2f}"
    )
    test = [item for item in findings if item["part"] == "test"]
    rows = [["planted", "questions", "missed", *verdicts]]
    for kind in KINDS:
        here = [item for item in test if item["planted"] == kind]
        if here:
            missed = [item for item in here if not item["right"]]
            rows.append([kind, str(len(here)), str(len(missed)), *(_rate(missed, item) for item in verdicts.values())])
    missed = [item for item in test if item["planted"] in KINDS and not item["right"]]
    planted = sum(item["planted"] in KINDS for item in test)
    rows.append(["all", str(planted), str(len(missed)), *(_rate(missed, item) for item in verdicts.values())])
    for kind in ("one_hop", "two_hop", "unanswerable", None):
        right = [
            item
            for item in test
            if item["planted"] == "healthy" and item["right"] and (kind is None or item["kind"] == kind)
        ]
        label = f"false alarms, {kind or 'all'}"
        rows.append([label, str(len(right)), "", *(_rate(right, item) for item in verdicts.values())])
    print("\n" + "\n".join(table_lines(rows)))
    wrong = [item for item in test if item["planted"] == "healthy" and not item["right"]]
    print(f"\nhealthy questions that were answered wrongly: {len(wrong)}, flagged {_rate(wrong, whole)}")
    parts = [["part", "seconds a question", "tokens a question"]]
    for part in ("answer", "routing", *CHECKS):
        costs = [item["cost"][part] for item in findings if part in item["cost"]]
        if costs:
            seconds = sum(cost["seconds"] for cost in costs) / len(costs)
            parts.append([part, f"{seconds:.2f}", f"{sum(cost['tokens'] for cost in costs) / len(costs):.0f}"])
    print("\n" + "\n".join(table_lines(parts)))
    print(f"\n{found['hardware']}, {found['versions']}")


def _rate(items: Sequence[dict[str, Any]], calibration: Calibration) -> str:
    if not items:
        return "-"
    return f"{sum(bool(calibration.reasons(item['signals'])) for item in items) / len(items):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--calibration-seeds", type=int, nargs="+", default=[101, 102])
    parser.add_argument("--test-seeds", type=int, nargs="+", default=[201, 202])
    parser.add_argument("--good", type=int, default=24, help="calibration questions of each kind and bank")
    parser.add_argument("--healthy", type=int, default=16, help="test questions of each kind and bank")
    parser.add_argument("--spots", type=int, default=4, help="blind spots of each kind and bank")
    parser.add_argument("--false-alarms", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for all findings")
    parser.add_argument("--from", dest="source", type=Path, help="the findings of an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measured(arguments) if arguments.source is None else json.loads(arguments.source.read_text())
    tables(found, arguments)


if __name__ == "__main__":
    main()
