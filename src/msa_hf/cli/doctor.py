"""`msa-hf doctor`: which native operations this machine has."""

from __future__ import annotations

import argparse

NAME = "doctor"
HELP = "Show which native operations this machine has, and why not others."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf doctor`."""
    from .. import doctor

    doctor.report(args.json)
    return 0
