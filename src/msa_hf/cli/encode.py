"""`msa-hf encode`: documents become a bank."""

from __future__ import annotations

import argparse
import time
from datetime import timedelta

from ..user_errors import UserError, reported
from .documents import SOURCE_HELP, add_document_options, read_corpus
from .indexes import add_index_options, embedder_of
from .lengths import length_remedy
from .loading import load, new_directory, protocol_of, tell_hidden_bank
from .options import add_model_options, add_sole_writer_option, at_least, device_in, positive

NAME = "encode"
HELP = (
    "Encode documents into a memory bank. Run again after an interruption it goes on where it stopped; under "
    "`accelerate launch` or `torchrun`, as `-m msa_hf.encode`, all processes share the work."
)


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="a checkpoint with a memory: directory or Hub id")
    made.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    made.add_argument(
        "bank", metavar="BANK", help="directory for the bank; one that lies there is replaced when this one is complete"
    )
    add_model_options(made)
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens per batch (default: 16384)")
    made.add_argument(
        "--part-size",
        type=positive,
        metavar="BYTES",
        help="text that is encoded and kept at a time, the first of it in three parts; what an interruption costs, per "
        "process (default: 1000000)",
    )
    made.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="of waiting for another process; must exceed the time a part takes (default: 3600)",
    )
    made.add_argument(
        "--too-long",
        choices=("error", "split"),
        default="error",
        help="what to do with a document of more tokens than --max-length: end with an error, or store it in parts "
        "KEY#0, KEY#1, ... (default: error)",
    )
    made.add_argument(
        "--max-length",
        type=positive,
        metavar="TOKENS",
        help="of a document, with what the protocol puts around it (default: the model's positions; half of them with "
        "--too-long split, where parts are read beside the question)",
    )
    made.add_argument(
        "--workers",
        type=at_least(0),
        metavar="N",
        help="processes that read and tokenize ahead; with any, parts are written while the next are encoded (default: "
        "up to 3 for each process beside an accelerator, 0 on the CPU)",
    )
    made.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's layers: a minute or more at the beginning, for a quicker model on a GPU",
    )
    made.add_argument(
        "--fp8",
        action="store_true",
        help="project in 8-bit floats, for a quicker model on GPUs that have them (use it with --compile); keys and "
        "values differ by some hundredths",
    )
    add_index_options(made)
    add_sole_writer_option(made)
    add_document_options(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf encode`."""
    from ..bank import BankError, RankFailed
    from ..bank.encode_corpus import PART_SIZE, TIMEOUT, agreed, connected, encode_bank
    from ..model.bank_manifest_msa import is_bank, read_manifest
    from ..retrieval import keep_indexes

    timeout = TIMEOUT if args.timeout is None else timedelta(seconds=args.timeout)
    try:
        with reported(), connected(timeout) as ranks:
            with agreed(ranks):
                out = new_directory(args.bank)
                if ranks.rank == 0:
                    tell_hidden_bank(args.bank)
                with reported():
                    if is_bank(out):
                        read_manifest(out)  # before the model is loaded
                corpus = read_corpus(args, args.source, quiet=ranks.rank > 0)
                model, tokenizer = load(args.model, device_in(args), args.dtype)
                protocol = protocol_of(args.protocol, args.model)
                embedder = embedder_of(args.embedder, device_in(args)) if ranks.rank == 0 else None
            start = time.perf_counter()
            with length_remedy("Pass --too-long split to store it in parts."):
                done = encode_bank(
                    corpus,
                    model,
                    out,
                    tokenizer,
                    protocol,
                    ranks=ranks,
                    too_long=args.too_long,
                    max_length=args.max_length,
                    part_size=args.part_size or PART_SIZE,
                    batch_tokens=args.batch_tokens,
                    sole_writer=args.sole_writer,
                    workers=args.workers,
                    compile_layers=args.compile,
                    fp8_projections=args.fp8,
                )
            indexing = time.perf_counter()
            if ranks.rank == 0:
                keep_indexes(out, args.lexical, embedder, args.sole_writer)
            indexing, seconds = time.perf_counter() - indexing, time.perf_counter() - start
    except RankFailed as error:
        raise UserError(f"{error} What was encoded is kept: the same command goes on from there.") from error
    except BankError as error:
        raise UserError(str(error)) from error
    if ranks.rank == 0:
        there = f", {done.found} of {done.parts} parts were there" if done.found else ""
        counts = f"{done.documents} documents, {done.tokens} tokens, {done.chunks} chunks"
        kept = f", of which {indexing:.1f} s for indexes" if args.lexical or args.embedder else ""
        print(f"{out}: {counts}{there}, {seconds:.1f} s{kept}")
    return 0
