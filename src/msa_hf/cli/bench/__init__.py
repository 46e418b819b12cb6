"""`msa-hf bench ...`: benchmarks that find what a memory cannot do."""

from __future__ import annotations

import argparse
from typing import Protocol

from . import chains, compare, conversations, mine, needles, scaling

NAME = "bench"
HELP = "Find what a memory cannot do: needles, chains, conversations, the scaling curve, and whatever else there is."


class Benchmark(Protocol):
    """A command of `bench`: a file with these names, and a line in `BENCHMARKS`."""

    NAME: str
    HELP: str

    def add_options(self, made: argparse.ArgumentParser) -> None:
        """Give its parser the options."""

    def run(self, args: argparse.Namespace) -> int:
        """Do what it is for and return the exit code. Whatever takes long to import is imported here."""


BENCHMARKS: tuple[Benchmark, ...] = (
    needles,
    chains,
    conversations,
    scaling,
    mine,
    compare,
)


def add_options(made: argparse.ArgumentParser) -> None:
    """Its commands."""
    made.description = "Benchmarks that find what a memory cannot do."
    commands = made.add_subparsers(required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS:
        one = commands.add_parser(benchmark.NAME, help=benchmark.HELP, description=benchmark.HELP)
        one.set_defaults(run_benchmark=benchmark.run)
        benchmark.add_options(one)


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench`."""
    code: int = args.run_benchmark(args)
    return code
