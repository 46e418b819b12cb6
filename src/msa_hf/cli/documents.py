"""Options of the commands that read documents, and reading them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .characters import in_one_line

if TYPE_CHECKING:
    from ..data.documents import Corpus

SOURCE_HELP = (
    "a file or folder: text, source code, .ipynb, .html, .csv, .tsv, .parquet, .json, .jsonl (also .gz, .xz, .zst), "
    ".pdf, .docx, .pptx, .xlsx, .odt, .epub; or what datasets.save_to_disk saved"
)


def add_document_options(made: argparse.ArgumentParser) -> None:
    """Options of reading documents."""
    group = made.add_argument_group("documents")
    group.add_argument("--text-column", metavar="NAME", help="field of the text in tables and JSON (default: text)")
    group.add_argument("--key-column", metavar="NAME", help="field of the key (default: key, or the document's number)")
    group.add_argument(
        "--glob",
        metavar="PATTERN",
        action="append",
        default=[],
        help="files of a folder to read, such as '*.md' or 'notes/**/*.txt'; may be repeated (default: all of a known "
        "kind)",
    )
    group.add_argument("--encoding", metavar="NAME", help="of text and tables, such as latin-1 (default: utf-8)")
    group.add_argument(
        "--skip-bad", action="store_true", help="leave out and name what cannot be read, instead of stopping"
    )
    group.add_argument("--split", metavar="NAME", help="of a saved dataset that has several")


def reading_options(args: argparse.Namespace) -> list[str]:
    """The options of reading documents that were given, as they are typed."""
    names = ("text_column", "key_column", "glob", "encoding", "skip_bad", "split")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def read_corpus(args: argparse.Namespace, source: str, quiet: bool = False) -> Corpus:
    """The documents of a source, looked at; says on stderr what was left out.

    Raises:
        UserError: for what cannot be taken.
    """
    from ..data.documents import Corpus, report_lines
    from ..user_errors import reported

    with reported():
        corpus = Corpus(
            source,
            args.text_column,
            args.key_column,
            glob=args.glob,
            encoding=args.encoding,
            skip_bad=args.skip_bad,
            split=args.split,
            show_progress=not quiet,
        )
    if not quiet:
        for line in report_lines(corpus.skipped):
            print(f"msa-hf: {in_one_line(line)}", file=sys.stderr)
    return corpus
