"""`msa-hf bench scaling`: the same questions in banks of every size."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...user_errors import UserError, reported
from ..answers import interleave_options
from ..options import at_least, positive
from ..plan import placement
from .options import (
    add_asking_options,
    add_batch_size_option,
    add_text_options,
    check_outputs,
    document_tokens,
    load_asked,
    names_of,
    run_options,
    show,
    told,
)

if TYPE_CHECKING:
    from ...bench.scaling import AskedDocuments

NAME = "scaling"
HELP = "Answer the same questions in banks of every size, and say how much is lost from the first to the last."
KINDS = ("one_hop", "two_hop", "unanswerable")  # as msa_hf.bench.scaling has them


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    add_asking_options(made)
    add_batch_size_option(made)
    add_text_options(made, "16K,64K,256K,1M")
    made.add_argument("--asked", type=positive, default=100, help="invented questions of each kind (default: 100)")
    made.add_argument(
        "--kinds", type=names_of(KINDS), default=list(KINDS), help=f"among {', '.join(KINDS)} (default: all)"
    )
    made.add_argument(
        "--questions",
        metavar="FILE.jsonl",
        type=Path,
        help="questions of your own, as `eval` takes them, in place of invented ones; with --documents",
    )
    made.add_argument("--documents", metavar="SOURCE", help="the documents that --questions are about, by their keys")
    made.add_argument(
        "--refusal", type=told, help="the answer to what the memory does not hold (default: that of msa-hf-tiny)"
    )
    made.add_argument(
        "--placement",
        type=placement,
        help="where keys and content of a bank lie: auto, or such as int8@device,bf16@host (default: in one place)",
    )
    made.add_argument(
        "--workers", type=at_least(0), default=0, help="processes that make texts and tokens (default: this one)"
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench scaling`."""
    check_outputs(args, args.text)
    if (args.questions is None) != (args.documents is None):
        raise UserError("--questions and --documents belong together: name both, or neither for invented questions")
    limit = document_tokens(
        args, None if args.text else "invented texts are not cut; leave it out, or name texts (--text)"
    )
    from ...bank.tiered.plan import PlacementOptions
    from ...bench.curve import curve
    from ...bench.haystack import Haystack, file_texts
    from ...bench.named import without_names
    from ...bench.nested import Filler, GivenTexts, InventedTexts
    from ...bench.report import html_report, text_report
    from ...bench.scaling import MAPS, TABLES, ScalingSettings, in_words, run_scaling
    from ...synthetic.corpora import UNANSWERABLE

    with reported():
        settings = ScalingSettings(
            sizes=tuple(args.sizes),
            seed=args.seed,
            refusal=args.refusal or UNANSWERABLE,
            max_new_tokens=args.max_new_tokens,
            rounds=interleave_options(args),
            placement=PlacementOptions() if args.placement == "auto" else args.placement,
        )
        asked = asked_in(args)
    options = run_options(args)
    model, tokenizer, protocol = load_asked(args)
    with reported():
        if args.text:
            size, shown = args.sizes[-1], not args.quiet
            texts = Haystack(file_texts(args.text), tokenizer, size, limit, show_progress=shown).texts
            filler: Filler = GivenTexts(without_names(texts, asked.names))
        else:
            filler = InventedTexts(args.seed, [*asked.texts, *(item.text for item in asked.questions)])
        result = run_scaling(
            settings,
            model,
            tokenizer,
            protocol,
            asked,
            filler,
            args.out,
            source=", ".join(args.text) or "invented",
            workers=args.workers,
            **options,
        )
    words = in_words(result)
    text = "\n".join([text_report(result, TABLES), "", *words])
    show(args, result, text, html_report(result, TABLES, MAPS, words, [curve(result)]))
    return 0


def asked_in(args: argparse.Namespace) -> AskedDocuments:
    """The questions and the documents that they are about."""
    from ...bench.scaling import given_questions, invented_questions
    from ...data.documents import Corpus
    from ...evaluation.judged_questions import read_judged

    if args.questions is None:
        return invented_questions(args.sizes[0], args.asked, args.seed, args.kinds)
    texts = {str(row["key"]): str(row["text"]) for row in Corpus(args.documents)}
    return given_questions(read_judged(args.questions), texts)
