"""`msa-hf ask`: questions to a bank, the answers and where they come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

from ..user_errors import UserError, reported
from .answers import add_asking_options, described_sources, described_trace, opened_asker, record_of
from .answers import terminal_streamer as streamer_for
from .characters import print_error, shown

NAME = "ask"
HELP = "Ask questions of a bank; without a question, or with -, one per line of the input."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="directory of the bank, or its name on the Hub")
    made.add_argument("questions", metavar="QUESTION", nargs="*", help="- reads one per line of the input")
    add_asking_options(made)
    made.add_argument("--stream", action="store_true", help="print answers while they are written")
    made.add_argument("--why", action="store_true", help="what each round and layer chose, and what each stage took")
    made.add_argument("--json", action="store_true", help="one JSON object per question")


def run(args: argparse.Namespace) -> int:
    """`msa-hf ask`."""
    if args.stream and args.json:
        raise UserError("--stream and --json: choose one of them")
    if "-" in args.questions and len(args.questions) > 1:
        raise UserError("-: reads the questions from the input; leave the others out")
    asker = opened_asker(args)
    from ..data.lines import input_lines  # which takes as long to import as a model

    given = [] if args.questions == ["-"] else args.questions
    failed = False
    for number, question in enumerate(given or input_lines("? ")):
        if not args.json and number:
            print()
        if not args.json and len(given) > 1:
            print(f"Question: {shown(question)}")
        streamer = streamer_for(asker.tokenizer) if args.stream else None
        try:
            with reported():
                answer = asker.ask(question, streamer=streamer)
        except UserError as error:
            if given:
                raise
            print_error(error)  # the next line may be better
            failed = True
            continue
        if args.json:
            print(json.dumps(record_of(answer, asker.bank), ensure_ascii=False, allow_nan=False), flush=True)
            continue
        lines: Iterable[str] = described_sources(answer, asker.bank)
        if not args.stream or not answer.text:
            lines = [shown(answer.text) or "(no answer)", *lines]
        print("\n".join([*lines, *([described_trace(answer)] if args.why else [])]), flush=True)
    return 2 if failed else 0
