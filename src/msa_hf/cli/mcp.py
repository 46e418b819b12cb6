"""`msa-hf mcp`: a bank as tools for assistants, over the Model Context Protocol."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .characters import print_error
from .indexes import add_index_options, embedder_of
from .loading import bank_to_change, checkpoint, is_read_from_hub, load, protocol_of
from .options import add_model_options, add_sole_writer_option, at_least, device_in, positive

if TYPE_CHECKING:
    from ..mcp_server.shared_bank import SharedBank

NAME = "mcp"
HELP = "Offer a bank to assistants as tools (Model Context Protocol): search, ask, read, remember, forget."
MANIFEST = "manifest.json"


def address(text: str) -> tuple[str, int]:
    """An argument type: a port of this machine, or HOST:PORT."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"must be PORT or HOST:PORT, got {text!r}")
    return host, int(port)


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("bank", metavar="BANK", help="directory of the bank; with --read-only also a name on the Hub")
    made.add_argument(
        "--model", metavar="MODEL", help="the checkpoint that made the bank; without it, no asking and no remembering"
    )
    made.add_argument("--read-only", action="store_true", help="offer neither remember nor forget")
    made.add_argument("--create", action="store_true", help="make an empty bank where there is none")
    made.add_argument(
        "--http",
        type=address,
        metavar="[HOST:]PORT",
        help="serve many clients over streamable HTTP at /mcp (default: one, over standard input and output)",
    )
    made.add_argument(
        "--api-keys",
        metavar="FILE",
        help="with --http: a key per line, `read` behind one that may change nothing. Clients send `Authorization: "
        "Bearer KEY`",
    )
    made.add_argument("--no-keys", action="store_true", help="let everybody in who reaches an --http of other machines")
    made.add_argument("--max-k", type=positive, default=50, help="documents of a search at most (default: 50)")
    made.add_argument(
        "--max-text", type=positive, default=1_000_000, help="characters of a document at most (default: 1000000)"
    )
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval for an answer (default: 3)")
    made.add_argument("--max-new-tokens", type=positive, default=128, help="of an answer (default: 128)")
    made.add_argument("--timeout", type=positive, default=120, metavar="S", help="of a call (default: 120)")
    made.add_argument(
        "--wait", type=at_least(0), default=5, metavar="S", help="for another writer of the bank (default: 5)"
    )
    add_model_options(made)
    add_index_options(made)
    add_sole_writer_option(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf mcp`."""
    try:
        from ..mcp_server.server import MemoryServer
        from ..mcp_server.transports import http_app, serve_http, serve_stdio
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "msa_hf":
            raise
        raise UserError(f'the server needs the package {error.name}: pip install "msa-hf[mcp]"') from error
    from ..mcp_server.limits import Limits
    from ..mcp_server.tools import tools_for
    from ..serving.keys import read_keys

    check(args)
    with reported():
        keys = [] if args.api_keys is None else read_keys(args.api_keys)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("mcp").setLevel(logging.WARNING)
    limits = Limits(results=args.max_k, text=args.max_text, seconds=args.timeout)
    tools = tools_for(args.model is not None, args.read_only)
    loading = in_background(lambda: open_bank(args))
    server = MemoryServer(Path(args.bank).resolve().name, loading, tools, limits).protocol
    if args.http is None:
        loading.add_done_callback(tell_failure)
        serve_stdio(server)
    else:
        loading.result()  # the port opens once calls can be answered, and a mistake ends the command
        host, port = args.http
        serve_http(http_app(server, host, keys, limits.body), host, port)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    from ..serving.hosts import is_loopback

    if args.create and (args.model is None or args.read_only):
        raise UserError("--create needs --model, whose documents the bank will hold, and no --read-only")
    bank = Path(args.bank)
    if not args.create and not (bank / MANIFEST).exists() and not is_read_from_hub(args.bank, args.read_only):
        raise UserError(f"{bank}: there is no bank; --create makes an empty one")
    if args.create:
        bank_to_change(args.bank)
    if args.model is not None:
        checkpoint(args.model)
    if args.api_keys is not None and args.http is None:
        raise UserError("--api-keys belongs to --http")
    if args.http is not None and not (is_loopback(args.http[0]) or args.api_keys or args.no_keys):
        what = "read" if args.read_only else "read and change"
        raise UserError(
            f"--http {args.http[0]} lets other machines in, who could {what} the bank: give --api-keys FILE, or say "
            "--no-keys"
        )


def in_background(work: Callable[[], SharedBank]) -> Future[SharedBank]:
    """Begin something in a thread."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="loading")
    try:
        return executor.submit(work)
    finally:
        executor.shutdown(wait=False)


def tell_failure(loading: Future[SharedBank]) -> None:
    """Say on stderr why nothing could be loaded; clients are told when they call."""
    error = loading.exception()
    if isinstance(error, UserError | OSError):
        print_error(error)
    elif error is not None:
        logging.getLogger(__name__).error("the bank could not be loaded", exc_info=error)


def open_bank(args: argparse.Namespace) -> SharedBank:
    """The bank, and its model where there is one."""
    from ..bank import BankError
    from ..mcp_server.shared_bank import Options, Reader, SharedBank
    from ..model.hub_msa import bank_directory

    device = device_in(args)
    reader = None
    if args.model is not None:
        model, tokenizer = load(args.model, device, args.dtype, args.protocol)
        reader = Reader(model, tokenizer, protocol_of(args.protocol, args.model))
    options = Options(
        read_only=args.read_only,
        create=args.create,
        patience=args.wait,
        sole_writer=args.sole_writer,
        lexical=args.lexical,
        embedder=embedder_of(args.embedder, device),
        max_new_tokens=args.max_new_tokens,
        max_rounds=args.max_rounds,
    )
    try:
        with reported():
            origin = (None, None) if reader is None else (reader.model, reader.tokenizer)
            directory = bank_directory(args.bank, *origin) if args.read_only else Path(args.bank)
            bank = SharedBank(directory, reader, options)
    except (BankError, ImportError) as error:
        raise UserError(str(error)) from error
    logging.getLogger(__name__).info("%s: %d documents", args.bank, bank.stat()["documents"])
    return bank
