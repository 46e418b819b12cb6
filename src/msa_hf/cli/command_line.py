"""The command line: `msa-hf COMMAND`.

A mistake of the user ends with one line on stderr and exit code 2; any other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from ..user_errors import UserError, complain
from . import ask, bank, doctor, encode, evaluate, inspect, plan, refresh, retrofit, train

COMMANDS = (
    retrofit,
    encode,
    ask,
    train,
    evaluate,
    inspect,
    bank,
    plan,
    refresh,
    doctor,
)  # as `msa-hf --help` lists them


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments like any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main = Parser(prog="msa-hf", description="A memory of documents for any Hugging Face causal LM.")
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_to(commands)
    return main


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    try:
        args = parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
