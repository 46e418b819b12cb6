"""`msa-hf refresh`: the code inside saved checkpoints becomes that of this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..user_errors import UserError, reported

NAME = "refresh"
HELP = "Bring the code inside saved checkpoints up to that of this package."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a directory that save_pretrained() wrote")


def run(args: argparse.Namespace) -> int:
    """`msa-hf refresh`."""
    from ..model.checkpoint_msa import copy_code

    directories = [Path(name) for name in args.checkpoints]
    for directory in directories:  # all are looked at before the first is changed
        require_code(directory)
    for directory in directories:
        with reported():
            changed = copy_code(directory)
        print(f"{directory}: {len(changed)} files changed" if changed else f"{directory}: up to date")
    return 0


def require_code(directory: Path) -> None:
    """Refuse a directory that is no checkpoint with a memory and code of its own.

    Raises:
        UserError: naming what the directory lacks.
    """
    from ..model.bounds_msa import read_json
    from ..model.configuration_msa import MSAConfig

    try:
        config = read_json(directory / "config.json")
    except OSError as error:
        raise UserError(f"{directory}: no checkpoint ({error.strerror}: config.json)") from error
    except ValueError as error:
        raise UserError(f"{directory}: config.json is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("model_type") != MSAConfig.model_type:
        raise UserError(f"{directory}: not a checkpoint with a memory; `msa-hf retrofit` makes one")
    if not config.get("auto_map"):
        raise UserError(f"{directory}: carries no code; load it with msa_hf installed and save it again")
