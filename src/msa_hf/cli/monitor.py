"""`msa-hf monitor`: questions that a bank may answer wrongly because routing misses a document."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from ..generation.selectors import SELECTORS
from ..hybrid.monitoring.signals import CHECKS
from ..user_errors import UserError, reported
from .indexes import EMBEDDER_HELP, embedder_of
from .loading import load, protocol_of
from .options import add_model_options, at_least, device_in, positive

if TYPE_CHECKING:
    from ..evaluation.recall import JudgedFields
    from ..hybrid.monitoring import Finding, Monitor

NAME = "monitor"
HELP = "Find questions whose answers may lack a document that the bank holds."


def share(text: str) -> float:
    """An argument type: a share from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text!r}")
    return value


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("bank", metavar="BANK", help="directory of the bank, or its name on the Hub")
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("--questions", metavar="FILE", required=True, help="a .jsonl of objects with `question`")
    made.add_argument("--encoding", metavar="NAME", help="of the files of questions (default: utf-8)")
    add_model_options(made)
    made.add_argument(
        "--good",
        metavar="FILE",
        help="a .jsonl of questions that are answered well, to calibrate with; of those with an `answer` only the ones "
        "that are answered so count",
    )
    made.add_argument(
        "--calibration", metavar="FILE", help="the calibration: read, or with --good written for the next time"
    )
    made.add_argument(
        "--false-alarms", type=share, default=0.05, help="of good answers, at most this share (default: 0.05)"
    )
    made.add_argument("--confidence", type=share, default=0.9, help="of the calibration (default: 0.9)")
    made.add_argument(
        "--checks",
        type=lambda text: [part for part in text.split(",") if part],
        help=f"among {', '.join(CHECKS)}; separated by commas (default: all that the bank allows)",
    )
    made.add_argument("--rate", type=share, default=1.0, help="the share of the questions to sample (default: 1)")
    made.add_argument("--seed", type=at_least(0), default=0, help="of the sample (default: 0)")
    made.add_argument("--max-questions", type=positive, help="to monitor at most")
    made.add_argument("--max-seconds", type=positive, help="of extra work, after which no further batch begins")
    made.add_argument("--max-tokens", type=positive, help="of extra work, after which no further batch begins")
    made.add_argument("--probes", type=at_least(0), default=0, help="documents never routed to ask for by themselves")
    made.add_argument("--refusal", help="the answer to what the memory does not hold")
    made.add_argument("--embedder", metavar="MODEL", help=f"that made the bank's vectors: {EMBEDDER_HELP}")
    made.add_argument("--select", choices=SELECTORS, default="router", help="how documents are chosen for reading")
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval (default: 3)")
    made.add_argument("--documents-per-round", type=positive, help="to read (default: 1 that the router chooses)")
    made.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    made.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: 8)")
    made.add_argument("--json", action="store_true", help="the report as one JSON object instead of Markdown")
    made.add_argument("--out", metavar="FILE", help="a file for the report: Markdown, or JSON if it ends in .json")
    made.add_argument("--metrics", metavar="FILE", help="a file for Prometheus' textfile collector, ending in .prom")
    made.add_argument("--dashboard", metavar="FILE", help="a file for the Grafana dashboard of these metrics")


def run(args: argparse.Namespace) -> int:
    """`msa-hf monitor`."""
    from ..evaluation.judged_questions import read_asked
    from ..hybrid.monitoring import Calibration, Monitor, MonitorMetrics, dashboard, make_report

    device = device_in(args)
    if not 0 < args.false_alarms < 1 or args.confidence == 1:
        raise UserError("--false-alarms must lie between 0 and 1, and --confidence below 1")
    for name in (args.out, args.metrics, args.dashboard, args.calibration if args.good else None):
        require_place(name)
    with reported():
        asked = read_asked(args.questions, args.encoding)
        good = None if args.good is None else read_asked(args.good, args.encoding)
        calibration = None if args.calibration is None or good else Calibration.load(args.calibration)
    try:
        metrics = None if args.metrics is None else MonitorMetrics()
    except ImportError as error:
        raise UserError(str(error)) from error
    if args.dashboard is not None:
        Path(args.dashboard).write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    questions = sample([item["question"] for item in asked], args.rate, args.seed)
    embedder = embedder_of(args.embedder, device)
    model, tokenizer = load(args.model, device, args.dtype, args.protocol)
    protocol = protocol_of(args.protocol, args.model)
    options = {
        "select": args.select,
        "max_rounds": args.max_rounds,
        "documents_per_round": args.documents_per_round,
    }
    try:
        with reported():
            monitor = Monitor(
                model,
                tokenizer,
                model.load_memory(args.bank, tokenizer, device=device),
                protocol,
                calibration=calibration,
                checks=args.checks,
                refusal=args.refusal,
                max_new_tokens=args.max_new_tokens,
                interleave=options,
                embedder=embedder,
                batch_size=args.batch_size,
            )
            if good is not None:
                calibrated(monitor, good, args)
            findings = monitored(monitor, questions, args)
            report = make_report(monitor, findings, len(questions), args.probes)
    except ImportError as error:
        raise UserError(str(error)) from error
    if metrics is not None:
        metrics.count("seen", len(asked))
        metrics.count("sampled", len(questions))
        metrics.add(findings)
        metrics.describe(report)
        metrics.write(args.metrics)
    if args.out is not None:
        text = report.to_json(indent=1) + "\n" if args.out.endswith(".json") else report.to_markdown()
        Path(args.out).write_text(text, encoding="utf-8")
    print(report.to_json() if args.json else report.to_markdown(), end="\n" if args.json else "")
    return 0


def require_place(name: str | None) -> None:
    """Refuse a file that cannot be written, before any work."""
    if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        raise UserError(f"{name}: not a file in a directory that is there")


def sample(questions: list[str], rate: float, seed: int) -> list[str]:
    """A share of the questions, in order."""
    pick = random.Random(seed)
    chosen = [question for question in questions if pick.random() < rate]
    if not chosen:
        raise UserError(f"--rate {rate:g} leaves none of {len(questions)} questions; raise it")
    return chosen


def calibrated(monitor: Monitor, good: list[JudgedFields], args: argparse.Namespace) -> None:
    """Calibrate with good questions: those with an answer only if they are answered so."""
    from ..evaluation.metrics import exact_match
    from ..hybrid.monitoring import calibrate

    findings = monitor.check([item["question"] for item in good], show_progress=True)
    right = [
        finding.signals
        for item, finding in zip(good, findings, strict=True)
        if (answer := item.get("answer")) is None or exact_match(finding.answer, answer)
    ]
    if not right:
        raise UserError(f"{args.good}: none of {len(good)} questions is answered as it says; calibrate with others")
    monitor.calibration = calibrate(right, args.false_alarms, args.confidence, documents=len(monitor.bank))
    if args.calibration is not None:
        monitor.calibration.save(args.calibration)


def monitored(monitor: Monitor, questions: list[str], args: argparse.Namespace) -> list[Finding]:
    """The findings within the budget."""
    from ..hybrid.monitoring import Budget

    budget = Budget(args.max_questions, args.max_seconds, args.max_tokens)
    return monitor.check(questions, budget=budget, show_progress=True)
