"""The command line: `msa-hf COMMAND`.

A mistake of the user ends with one line on stderr and exit code 2; any other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from .. import __version__
from ..user_errors import UserError
from . import (
    ask,
    bank,
    bench,
    chain,
    chat,
    consume,
    doctor,
    encode,
    evaluate,
    inspect,
    mcp,
    monitor,
    plan,
    refresh,
    retrofit,
    search,
    serve,
    train,
)
from .characters import check_arguments, print_error, show_all_characters
from .lengths import CUT, length_remedy


class Command(Protocol):
    """A command: a module with these names, and a line in `COMMANDS`."""

    NAME: str
    HELP: str

    def add_options(self, made: argparse.ArgumentParser) -> None:
        """Give the command's parser its options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do what it is for and return the exit code. Whatever takes long to import is imported here."""


# As `msa-hf --help` lists them.
COMMANDS: tuple[Command, ...] = (
    retrofit,
    encode,
    ask,
    chat,
    search,
    serve,
    chain,
    train,
    evaluate,
    bench,
    monitor,
    inspect,
    bank,
    consume,
    mcp,
    plan,
    refresh,
    doctor,
)


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments like any other mistake of the user, and takes lists of arguments behind options too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # overloaded in argparse
        """Parse as usual, then give the list at the end, such as QUESTION ..., what stands behind an option.

        argparse fills a list where the first of it can stand, with nothing if an option comes there, and then
        knows nothing of the rest.
        """
        found, rest = super().parse_known_args(args, namespace)
        lists = [action.dest for action in self._actions if not action.option_strings and action.nargs in ("*", "+")]
        marked = rest.index("--") if "--" in rest else len(rest)
        if lists and rest and not any(map(_is_option, rest[:marked])):
            setattr(found, lists[-1], [*getattr(found, lists[-1]), *rest[:marked], *rest[marked + 1 :]])
            rest = []
        return found, rest


def _is_option(text: str) -> bool:
    """Tell whether argparse takes a text for an option: it begins with a dash, is not one, and has no space."""
    return text.startswith("-") and text != "-" and " " not in text


def parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line, with the options of the commands that occur in `arguments`."""
    main = Parser(prog="msa-hf", description="A memory of documents for any Hugging Face causal LM.")
    main.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        made = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        made.set_defaults(run=command.run)
        if command.NAME in arguments:
            command.add_options(made)
    return main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    show_all_characters()
    try:
        check_arguments(arguments)
        args = parser(arguments).parse_args(arguments)
        with length_remedy(CUT):
            code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
