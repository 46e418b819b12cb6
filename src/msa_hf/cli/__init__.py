"""The command line `msa-hf`: one file per command, command_line.py before them.

Commands import what does the work when they run, so that help and mistakes come at once.
"""

from .command_line import main

__all__ = ["main"]
