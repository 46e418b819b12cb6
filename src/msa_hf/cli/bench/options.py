"""Options that benchmarks share, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...user_errors import UserError, reported
from ..loading import checkpoint, load, protocol_of
from ..options import add_model_options, at_least, device_in, positive
from ..sizes import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...bench.result import Result
    from ...generation import PromptProtocol
    from ...model.modeling_msa import MSAForCausalLM


def sizes(text: str) -> list[int]:
    """An argument type: numbers of tokens, such as 16K,64K,1M, ascending."""
    return sorted({count(item) for item in text.split(",")})


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type: names among those known, separated by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {name!r}")
        return list(dict.fromkeys(found))

    return names


def add_asking_options(made: argparse.ArgumentParser) -> None:
    """Add options of loading and asking a model, and of where results go."""
    made.add_argument("model", metavar="MODEL", help="a checkpoint with a memory")
    add_model_options(made)
    made.add_argument("--seed", type=at_least(0), default=0, help="another one makes other questions (default: 0)")
    made.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: 8)")
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens encoded at a time (default: 16384)")
    made.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    made.add_argument("--max-rounds", type=at_least(0), help="of retrieval (default: 3), of a checkpoint with protocol")
    made.add_argument("--documents-per-round", type=positive, help="to read (default: 1)")
    made.add_argument("--quiet", action="store_true", help="no progress bars")
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of tables")
    made.add_argument(
        "--out",
        metavar="FILE.json",
        type=Path,
        help="the result, written while the benchmark runs; after an interruption the same command goes on with it",
    )
    made.add_argument("--html", metavar="FILE.html", type=Path, help="the result as a page to read")


def add_text_options(made: argparse.ArgumentParser, default_sizes: str) -> None:
    """Add options of what haystacks are made of."""
    made.add_argument(
        "--text",
        metavar="SOURCE",
        action="append",
        default=[],
        help="files or folders of a haystack's text, as `encode` takes them; may be repeated (default: generated)",
    )
    made.add_argument(
        "--sizes", type=sizes, default=sizes(default_sizes), help=f"in tokens, by commas (default: {default_sizes})"
    )
    made.add_argument(
        "--document-tokens", type=positive, default=112, help="of a haystack's documents at most (default: 112)"
    )


def texts_in(args: argparse.Namespace) -> Iterator[str]:
    """The texts that were named, or generated ones."""
    from ...bench.haystack import file_texts, generated_texts

    return file_texts(args.text) if args.text else generated_texts(args.seed)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before any work, files that could not be written."""
    for path in (args.out, args.html):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(f"{path}: not a file in a directory that is there")
    if args.out is not None and args.html is not None and args.out.absolute() == args.html.absolute():
        raise UserError(f"{args.out}: --out and --html are one file; name two")


def load_asked(args: argparse.Namespace) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase, PromptProtocol | None]:
    """The model to be asked, its tokenizer and its protocol."""
    device = device_in(args)
    checkpoint(args.model)  # what is not there is refused at once
    protocol = protocol_of(args.protocol, args.model)
    return *load(args.model, device, args.dtype, args.protocol), protocol


def round_options(args: argparse.Namespace) -> dict[str, int]:
    """The options of Memory Interleave that were given."""
    named = {"max_rounds": args.max_rounds, "documents_per_round": args.documents_per_round}
    return {name: value for name, value in named.items() if value is not None}


def show(args: argparse.Namespace, result: Result, text: str, page: str) -> None:
    """Print a result, and write its page."""
    with reported():
        if args.html is not None:
            args.html.write_text(page, encoding="utf-8")
    print(result.to_json() if args.json else text, end="" if args.json else "\n")
