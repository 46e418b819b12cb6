"""`msa-hf bench chains`: questions whose facts lie in several documents, far from each other."""

from __future__ import annotations

import argparse

from ...user_errors import UserError, reported
from ..answers import interleave_options
from ..options import positive
from .options import (
    add_asking_options,
    add_batch_size_option,
    add_document_tokens_option,
    check_outputs,
    document_tokens,
    load_asked,
    names_of,
    run_options,
    show,
    sizes,
    told,
)

NAME = "chains"
HELP = "Ask for chains of one to four hops, comparisons, order, what two share and later versions, each with a twin."
KINDS = ("one_hop", "two_hop", "three_hop", "four_hop", "comparison", "order", "join", "version")


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    add_asking_options(made)
    add_batch_size_option(made)
    made.set_defaults(max_new_tokens=32)
    made.add_argument(
        "--sizes", type=sizes, default=sizes("16K,100K,1M"), help="of corpora, in tokens (default: 16K,100K,1M)"
    )
    made.add_argument(
        "--kinds", type=names_of(KINDS), default=list(KINDS), help=f"among {', '.join(KINDS)} (default: all)"
    )
    made.add_argument(
        "--distances",
        type=sizes,
        default=sizes("16K,256K,1M,10M,50M"),
        help="tokens between the facts of a question, those up to half of a size (default: 16K,256K,1M,10M,50M)",
    )
    made.add_argument(
        "--questions", type=positive, default=10, help="of a kind, distance and size; as many twins (default: 10)"
    )
    made.add_argument(
        "--text",
        metavar="SOURCE",
        action="append",
        default=[],
        help="files or folders of texts between the invented ones; may be repeated (default: Python's documentation)",
    )
    made.add_argument(
        "--text-share", type=float, default=0.2, help="of the documents that are such texts, 0 to 0.9 (default: 0.2)"
    )
    add_document_tokens_option(made, "of such a text at most")
    made.add_argument(
        "--refusal", type=told, help="the answer to what the memory does not hold (default: that of msa-hf-tiny)"
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench chains`."""
    check_outputs(args, args.text)
    if not 0 <= args.text_share <= 0.9:
        raise UserError(f"--text-share must be between 0 and 0.9, got {args.text_share:g}")
    uncut = None if args.text else "no text is read that would be cut; leave it out, or name texts (--text)"
    if args.text and not args.text_share:
        uncut = "with --text-share 0 no text is read that would be cut; leave it out, or ask for a share"
    limit = document_tokens(args, uncut)
    from ...bench.chains import MAPS, TABLES, ChainSettings, broken_hops, in_words, run_chains
    from ...bench.haystack import Haystack, file_texts
    from ...bench.report import html_report, text_report
    from ...synthetic.corpora import UNANSWERABLE
    from ...synthetic.prose import prose_documents
    from ...tables import table_lines

    with reported():
        settings = ChainSettings(
            sizes=args.sizes,
            kinds=args.kinds,
            distances=args.distances,
            questions=args.questions,
            seed=args.seed,
            prose_share=args.text_share,
            refusal=args.refusal or UNANSWERABLE,
            max_new_tokens=args.max_new_tokens,
            rounds=interleave_options(args),
        )
    options = run_options(args)
    model, tokenizer, protocol = load_asked(args)
    with reported():
        if args.text and args.text_share:
            wanted = max(int(args.sizes[-1] * args.text_share), 1)
            shown = not args.quiet
            prose = Haystack(file_texts(args.text), tokenizer, wanted, limit, show_progress=shown).texts
        else:
            prose = prose_documents(200, seed=args.seed, words=55, packages=False) if args.text_share else []
        result = run_chains(
            settings,
            model,
            tokenizer,
            protocol,
            prose,
            args.out,
            source=", ".join(args.text) or "documentation of Python",
            **options,
        )
    words, hops = in_words(result), broken_hops(result)
    lines = [text_report(result, TABLES), *(["", *table_lines(hops, left=1)] if len(hops) > 1 else ()), "", *words]
    show(args, result, "\n".join(lines), html_report(result, TABLES, MAPS, words, more={"Where chains broke": hops}))
    return 0
