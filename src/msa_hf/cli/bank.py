"""`msa-hf bank add | index | delete | compact | verify | stat`: a bank is changed and looked after."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..user_errors import UserError, reported
from .characters import in_one_line
from .documents import add_document_options, read_corpus
from .indexes import add_index_options, embedder_of
from .lengths import length_remedy
from .loading import bank_here, bank_to_change, check_bank, load, protocol_of
from .options import add_model_options, add_sole_writer_option, device_in, device_of, positive

if TYPE_CHECKING:
    from ..bank import BankStore
    from ..model.modeling_msa import MSAForCausalLM

NAME = "bank"
HELP = "Change a bank, and look after it."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its commands."""
    made.description = "Change a bank."
    banks = made.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = banks.add_parser(name, help=text, description=text)
        made.set_defaults(run_on_bank=run)
        if name != "stat":
            add_sole_writer_option(made)
        return made

    made = command("add", add, "Add documents, or put them in the place of those with their keys.")
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="directory of the bank, made where there is none")
    made.add_argument("source", metavar="SOURCE", help="documents as `encode` takes them; unchanged ones cost nothing")
    add_model_options(made)
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens per batch (default: 16384)")
    made.add_argument("--commit-every", type=positive, default=10_000, help="documents per commit (default: 10000)")
    made.add_argument("--version-column", help="field of an integer; what is not newer than the bank's is left out")
    add_document_options(made)
    add_index_options(made)

    made = command(
        "index", index, "Bring a bank's lexical index and vectors up to date, or make what it does not have."
    )
    made.add_argument("bank", metavar="BANK")
    add_index_options(made)
    made.add_argument("--device", type=device_of, help="of the embedding model (default: cpu)")
    made.add_argument("--json", action="store_true", help="one JSON object")

    made = command("delete", delete, "Delete documents; `compact` removes them from the files.")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("keys", metavar="KEY", nargs="*")
    made.add_argument("--keys-from", metavar="FILE", help="a file with a key per line; - for the standard input")
    made.add_argument("--encoding", metavar="NAME", help="of that file, such as latin-1 (default: utf-8)")
    made.add_argument("--missing-ok", action="store_true", help="pass over keys that no document has")

    made = command("compact", compact, "Remove deleted documents from the files, and put small segments together.")
    made.add_argument("bank", metavar="BANK")
    made.add_argument(
        "--forget-deletions",
        type=int,
        metavar="VERSION",
        help="forget deletions up to a version; events up to it, about any key, have no effect from now on",
    )

    made = command("restore", restore, "Put the copy of a bank's manifest in the place of a missing or damaged one.")
    made.add_argument("bank", metavar="BANK")

    made = command("verify", verify, "Compare every file with its checksum; exit code 1 where one is damaged.")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("--discard-damaged", action="store_true", help="give up the documents in damaged files")
    made.add_argument("--json", action="store_true", help="one JSON object")

    made = command("stat", stat, "Show the numbers of a bank, deleted documents and segments among them.")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf bank COMMAND`."""
    code: int = args.run_on_bank(args)
    return code


@contextlib.contextmanager
def opened(
    directory: str | Path, model: MSAForCausalLM | None = None, *made_with: Any, **options: Any
) -> Iterator[BankStore]:
    """A bank as `BankStore` opens it, without a model where none is given."""
    from ..bank import BankError, BankStore

    with reported():
        try:
            with BankStore(model, directory, *made_with, **options) as bank:
                yield bank
        except BankError as error:
            raise UserError(str(error)) from error


CUT = "Cut it into parts with keys of their own."


def add(args: argparse.Namespace) -> int:
    """`msa-hf bank add`."""
    from ..bank.corpus_lengths import check_lengths
    from ..model.positions_msa import position_limit

    directory = bank_to_change(args.bank)
    corpus = read_corpus(args, args.source)
    if corpus.nameless is not None:
        raise UserError(f"{corpus.nameless}: no {corpus.key_column!r} (--key-column), by which a bank knows a document")
    if args.version_column is not None:  # before the model is loaded
        for number, row in enumerate(corpus):
            if version_of(row["metadata"].get(args.version_column)) is None:
                raise UserError(f"{corpus.place(number)}: {args.version_column!r} (--version-column) is not an integer")
    model, tokenizer = load(args.model, device_in(args), args.dtype)
    protocol = protocol_of(args.protocol, args.model)
    with reported(), length_remedy(CUT):  # before the first of several commits
        check_lengths(corpus, range(len(corpus)), position_limit(model.config), tokenizer, protocol)
    options = {"batch_tokens": args.batch_tokens, "show_progress": True}
    counts = Counter[str]()
    rows = iter(corpus)
    kept = {"lexical": args.lexical, "embedder": embedder_of(args.embedder, device_in(args))}
    kept |= {"sole_writer": args.sole_writer}
    with opened(directory, model, tokenizer, protocol, encode_options=options, **kept) as bank:
        while batch := list(itertools.islice(rows, args.commit_every)):
            outcomes = Counter[str]()
            with length_remedy(CUT), bank.batch():
                for row in batch:
                    key, fields = row["key"], row["metadata"]
                    version = None if args.version_column is None else version_of(fields.pop(args.version_column))
                    known = key in bank
                    changed = bank.upsert(key, row["text"], version, fields)
                    outcomes["unchanged" if not changed else "replaced" if known else "added"] += 1
            counts += outcomes
        done = ", ".join(f"{counts[name]} {name}" for name in ("added", "replaced", "unchanged"))
        print(f"{directory}: {done}; {len(bank)} documents")
    return 0


def version_of(value: object) -> int | None:
    """A version as a document states it; tables of text have its digits. None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    return value if type(value) is int else None


def delete(args: argparse.Namespace) -> int:
    """`msa-hf bank delete`."""
    from ..data.lines import input_lines, text_lines

    keys = list(args.keys)
    if args.keys_from is not None:
        lines = input_lines() if args.keys_from == "-" else text_lines(Path(args.keys_from), args.encoding)
        keys += dict.fromkeys(lines)
    if not keys:
        raise UserError("no keys: name documents, or a file of them with --keys-from")
    with opened(bank_here(args.bank), sole_writer=args.sole_writer) as bank:
        missing = [key for key in keys if key not in bank]
        if missing and not args.missing_ok:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"no document of {args.bank} has the key {missing[0]!r}{more}; nothing was deleted "
                "(--missing-ok passes over such keys)"
            )
        with bank.batch():
            deleted = sum(bank.delete(key) for key in keys)
        print(f"{args.bank}: {deleted} deleted, {len(bank)} documents left; `compact` removes them from the files")
    return 0


def compact(args: argparse.Namespace) -> int:
    """`msa-hf bank compact`."""
    with opened(bank_here(args.bank), sole_writer=args.sole_writer) as bank:
        before = bank.stat()
        forgotten = 0
        if args.forget_deletions is not None:
            try:
                forgotten = bank.forget_deletions(args.forget_deletions)
            except ValueError as error:
                raise UserError(str(error)) from error
        done = bank.compact()
        after = bank.stat()
    if args.forget_deletions is not None:
        print(f"{args.bank}: {forgotten} deletions forgotten, {after['remembered_deletions']} remembered")
    if not done:
        print(f"{args.bank}: nothing to do")
        return 0
    removed = f"{before['deleted']} deleted documents removed"
    print(f"{args.bank}: {removed}, {before['segments']} -> {after['segments']} segments, ", end="")
    print(f"{before['bytes']} -> {after['bytes']} bytes")
    return 0


def restore(args: argparse.Namespace) -> int:
    """`msa-hf bank restore`."""
    from ..bank import BankError, restore_manifest
    from ..model.bank_lock_msa import WriterLock

    directory = bank_here(args.bank)
    with reported():
        try:
            with WriterLock(directory, args.sole_writer):
                manifest = restore_manifest(directory)
        except BankError as error:
            raise UserError(str(error)) from error
    print(f"{args.bank}: its manifest was restored, of generation {manifest.get('generation', 0)}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """`msa-hf bank verify`."""
    if args.discard_damaged:
        bank_here(args.bank)
    else:
        check_bank(args.bank)
    with opened(args.bank, read_only=not args.discard_damaged, sole_writer=args.sole_writer) as bank:
        found = bank.verify()
        given_up = bank.discard_damaged() if args.discard_damaged else 0
    if args.json:
        damaged = [{**asdict(item), "documents": item.documents} for item in found]
        print(json.dumps({"damaged": damaged, "given_up": given_up}, ensure_ascii=False))
        return 1 if found else 0
    for item in found:
        print(f"{item.file}: {item.cause}; documents left out: {item.documents}")
        for key in item.keys:
            print(f"  {'(its key is lost too)' if key is None else in_one_line(key)}")
    print(f"{args.bank}: {len(found)} damaged files" if found else f"{args.bank}: every file is as it was written")
    if given_up:
        print(f"{args.bank}: {given_up} documents given up")
    return 1 if found else 0


def index(args: argparse.Namespace) -> int:
    """`msa-hf bank index`."""
    from ..bank import BankError
    from ..retrieval import keep_indexes

    bank_here(args.bank)
    embedder = embedder_of(args.embedder, device_in(args))
    with reported():
        try:
            found = keep_indexes(args.bank, args.lexical, embedder, args.sole_writer)
        except (BankError, ImportError, RuntimeError) as error:
            raise UserError(str(error)) from error
    if args.json:
        print(json.dumps(found))
    for line in [] if args.json else described(found) or ["no index: name one with --lexical or --embedder"]:
        print(f"{args.bank}: {line}")
    return 0


def described(indexes: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Say in words what is kept with a bank."""
    facts = {name: ", ".join(f"{key} {value}" for key, value in about.items()) for name, about in indexes.items()}
    return [f"{name} index: {about}" for name, about in facts.items()]


def stat(args: argparse.Namespace) -> int:
    """`msa-hf bank stat`."""
    check_bank(args.bank)
    with opened(args.bank, read_only=True) as bank:
        record = bank.stat()
    if args.json:
        print(json.dumps(record))
        return 0
    for name, value in record.items():
        if name != "indexes":
            print(f"{name.replace('_', ' ')}: {value}")
    print("\n".join(described(record["indexes"])) or "indexes: none")
    return 0
