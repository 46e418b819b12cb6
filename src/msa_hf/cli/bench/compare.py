"""`msa-hf bench compare`: two results of one benchmark beside each other."""

from __future__ import annotations

import argparse

from ...user_errors import reported

NAME = "compare"
HELP = "Compare two results of a benchmark; differences that are more than chance are marked."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("before", metavar="BEFORE.json")
    made.add_argument("after", metavar="AFTER.json")
    made.add_argument(
        "--by",
        metavar="AXES",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="such as kind,tokens (default: the kind of question and all axes)",
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench compare`."""
    from ...bench.comparing import compare
    from ...bench.result import Result

    with reported():
        print(compare(Result.load(args.before), Result.load(args.after), *args.by))
    return 0
