"""`msa-hf doctor`: which native operations this machine has."""

from __future__ import annotations

import argparse
from typing import Any

from .. import doctor
from .options import command


def add_to(commands: Any) -> None:
    """The command and its options."""
    made = command(commands, "doctor", run, "Show which native operations this machine has, and why not others.")
    made.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf doctor`."""
    doctor.report(args.json)
    return 0
