"""The command line `msa-hf`: one file per command, command_line.py before them."""

from .command_line import main

__all__ = ["main"]
