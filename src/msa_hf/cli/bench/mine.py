"""`msa-hf bench mine`: where a model and its memory are blind on one's own documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...user_errors import UserError, reported
from ..answers import interleave_options
from ..documents import add_document_options, read_corpus, reading_options
from ..options import device_in, positive
from .options import (
    add_asking_options,
    add_batch_size_option,
    add_document_tokens_option,
    check_outputs,
    document_tokens,
    is_bank,
    load_asked,
    run_options,
    show,
    sizes,
    told,
)

NAME = "mine"
HELP = "Plant facts in copies of your documents, ask for them, and say where this model and memory are blind."


def shares(text: str) -> list[float]:
    """An argument type: numbers from 0 to 1, separated by commas."""
    try:
        found = [float(item) for item in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= item <= 1 for item in found):
        raise argparse.ArgumentTypeError(f"must be shares from 0 to 1 separated by commas, got {text!r}")
    return sorted(set(found))


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    add_asking_options(made)
    add_batch_size_option(made)
    made.add_argument("docs", metavar="DOCS", help="documents as `encode` takes them, or a bank; neither is changed")
    add_document_options(made)
    made.add_argument(
        "--sizes", type=sizes, default=[], help="in tokens, such as 16K,64K (default: a sixteenth, a quarter and all)"
    )
    made.add_argument("--hops", type=positive, default=3, help="most facts that a question follows (default: 3)")
    made.add_argument("--depths", type=positive, default=3, help="places of the first fact (default: 3)")
    made.add_argument(
        "--distances",
        type=shares,
        default=[],
        help="between a fact and the next, as shares of the size, a document at least (default: 0.05,0.5; 0.5 alone of "
        "fewer than 20 documents)",
    )
    made.add_argument("--repeats", type=positive, default=2, help="questions of a kind at each place (default: 2)")
    add_document_tokens_option(made, "of a document at most; longer are cut")
    made.add_argument(
        "--refusal",
        type=told,
        help="what the model says where there is no answer (default: as msa-hf-tiny says it)",
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench mine`."""
    check_outputs(args, [] if args.glob else [args.docs])  # patterns say themselves what is read
    device_in(args)
    from ...bench.mine import MAPS, TABLES, MineSettings, in_words, run_mine
    from ...bench.report import html_report, text_report
    from ...model.memory_msa import MemoryBank

    settings = MineSettings(
        sizes=args.sizes,
        hops=args.hops,
        depths=args.depths,
        distances=args.distances,
        repeats=args.repeats,
        seed=args.seed,
        document_tokens=document_tokens(args),
        max_new_tokens=args.max_new_tokens,
        rounds=interleave_options(args),
        **({} if args.refusal is None else {"refusal": args.refusal}),
    )
    banked = is_bank(args.docs)
    if not banked and not Path(args.docs).exists():
        raise UserError(f"{args.docs}: no such file, folder or bank")
    given = [*reading_options(args), *["--document-tokens"] * (args.document_tokens is not None)]
    if banked and given:
        raise UserError(f"{args.docs}: a bank, whose documents are not read again; leave out {', '.join(given)}")
    documents: list[str] | MemoryBank = [] if banked else [row["text"] for row in read_corpus(args, args.docs)]
    options = run_options(args)
    model, tokenizer, protocol = load_asked(args)
    with reported():
        if banked:
            documents = model.load_memory(args.docs, tokenizer, device=model.device)
        result = run_mine(
            settings,
            model,
            tokenizer,
            protocol,
            documents,
            args.out,
            source=args.docs,
            **options,
        )
    words = in_words(result)
    text = "\n".join([text_report(result, TABLES), "", *words])
    show(args, result, text, html_report(result, TABLES, MAPS, words))
    return 0
