"""`msa-hf bench conversations`: conversations of many sessions, and questions about what was said in them."""

from __future__ import annotations

import argparse

from ...bench.checking import ARMS
from ...user_errors import reported
from ..answers import interleave_options
from ..options import positive
from .options import add_asking_options, check_outputs, fusion_of, load_asked, names_of, show, sizes, told

NAME = "conversations"
HELP = (
    "Ask about long conversations whose facts change, are taken back, and are spoken of again (as LongMemEval, BEAM)."
)
MODES = ("router", "lexical", "hybrid")
FILLER_TOKENS = 2_000_000  # of given texts that are read; they come again after that


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    add_asking_options(made)
    made.add_argument(
        "--sizes", type=sizes, default=sizes("100K"), help="of conversations in tokens, by commas (default: 100K)"
    )
    made.add_argument("--asked", type=positive, default=10, help="questions of each of five kinds (default: 10)")
    made.add_argument("--arms", type=names_of(ARMS), default=list(ARMS), help=f"among {', '.join(ARMS)} (default: all)")
    made.add_argument("--k", type=positive, default=4, help="turns that `store` finds and `lexical` reads (default: 4)")
    made.add_argument("--budget", type=positive, default=768, help="tokens of the prompt of `store` (default: 768)")
    made.add_argument("--mode", choices=MODES, default="router", help="how `store` searches (default: router)")
    made.add_argument(
        "--refusal",
        type=told,
        metavar="TEXT",
        action="append",
        help="an answer that says that nothing is known; may be repeated (default: those of our checkpoints)",
    )
    made.add_argument(
        "--text",
        metavar="SOURCE",
        action="append",
        default=[],
        help="files or folders of what is said between the facts, as `encode` takes them (default: generated)",
    )


def run(args: argparse.Namespace) -> int:
    """`msa-hf bench conversations`."""
    check_outputs(args, args.text)
    from ...bench.conversations import (
        MAPS,
        REASONS,
        REFUSALS,
        TABLES,
        ConversationSettings,
        in_words,
        run_conversations,
    )
    from ...bench.haystack import Haystack, file_texts
    from ...bench.report import html_report, text_report

    fusion = fusion_of(args)
    model, tokenizer, protocol = load_asked(args)
    settings = ConversationSettings(
        sizes=tuple(args.sizes),
        seed=args.seed,
        asked=args.asked,
        arms=tuple(args.arms),
        k=args.k,
        budget=args.budget,
        mode=args.mode,
        refusals=tuple(args.refusal or REFUSALS),
        max_new_tokens=args.max_new_tokens,
        rounds=interleave_options(args),
    )
    with reported():
        wanted = min(args.sizes[-1], FILLER_TOKENS)
        shown = not args.quiet
        filler = Haystack(file_texts(args.text), tokenizer, wanted, show_progress=shown).texts if args.text else []
        result = run_conversations(
            settings,
            model,
            tokenizer,
            protocol,
            filler,
            args.out,
            source=", ".join(args.text) or "generated",
            name=args.model,
            fusion=fusion,
            batch_tokens=args.batch_tokens,
            show_progress=not args.quiet,
        )
    words = in_words(result)
    text = "\n".join([text_report(result, TABLES, REASONS), "", *words])
    show(args, result, text, html_report(result, TABLES, MAPS, words, reasons=REASONS))
    return 0
