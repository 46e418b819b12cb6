"""`msa-hf bench needles`: sentences planted in haystacks of every size, and asked for."""

from __future__ import annotations

import argparse

from ...user_errors import reported
from ..answers import interleave_options
from ..options import positive
from .options import (
    add_asking_options,
    add_batch_size_option,
    add_text_options,
    bank_in,
    check_outputs,
    document_tokens,
    load_asked,
    names_of,
    run_options,
    show,
    texts_in,
)

NAME = "needles"
HELP = "Plant sentences at every depth of haystacks of every size, and ask for them (RULER's needles)."
TASKS = ("single", "multi_key_2", "multi_key_3", "multi_value", "multi_query")  # as msa_hf.synthetic.needles has them
VALUES = ("words", "numbers", "uuids")


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    add_asking_options(made)
    add_batch_size_option(made)
    add_text_options(made, "16K,64K,256K,1M")
    made.add_argument(
        "--tasks", type=names_of(TASKS), default=list(TASKS), help=f"among {', '.join(TASKS)} (default: all)"
    )
    made.add_argument(
        "--values", type=names_of(VALUES), default=list(VALUES), help=f"among {', '.join(VALUES)} (default: all)"
    )
    made.add_argument("--depths", type=positive, default=5, help="how many, from first to last (default: 5)")
    made.add_argument(
        "--repeats", type=positive, default=4, help="questions of a task, kind of values, depth and size (default: 4)"
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench needles`."""
    check_outputs(args, args.text)
    from ...bench.needles import MAPS, TABLES, NeedleSettings, in_words, run_needles
    from ...bench.report import html_report, text_report

    bank = bank_in(args)
    uncut = None if bank is None else f"{bank} is a bank, whose documents are not cut again; leave it out"
    limit = document_tokens(args, uncut)
    options = run_options(args)
    model, tokenizer, protocol = load_asked(args)
    settings = NeedleSettings(
        sizes=args.sizes,
        tasks=args.tasks,
        values=args.values,
        depths=args.depths,
        repeats=args.repeats,
        seed=args.seed,
        document_tokens=limit,
        max_new_tokens=args.max_new_tokens,
        rounds=interleave_options(args),
    )
    with reported():
        result = run_needles(
            settings,
            model,
            tokenizer,
            protocol,
            texts_in(args, bank, model, tokenizer),
            args.out,
            source=", ".join(args.text) or "generated",
            **options,
        )
    words = in_words(result)
    text = "\n".join([text_report(result, TABLES), "", *words])
    show(args, result, text, html_report(result, TABLES, MAPS, words))
    return 0
