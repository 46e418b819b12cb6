"""`msa-hf serve`: a server for a model and its bank, with OpenAI's API."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..generation.selectors import SELECTORS
from ..user_errors import UserError, reported
from .indexes import add_index_options, embedder_of
from .loading import bank_to_change, compile_runs, is_read_from_hub, load, protocol_of
from .options import add_compile_option, add_model_options, add_sole_writer_option, at_least, device_in, positive

NAME = "serve"
HELP = (
    "Serve a model and its bank over HTTP: OpenAI's API, documents, search, and a page to use them (docs/serving.md)."
)
NEEDS = 'serving needs fastapi, uvicorn and prometheus-client: `pip install "msa-hf[serve]"`'


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument(
        "bank",
        metavar="BANK",
        help="directory of the bank, opened for writing; with --read-only also a name on the Hub",
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    made.add_argument("--port", type=at_least(0, 65535), default=8000, help="port to listen on; 0: any (default: 8000)")
    made.add_argument("--name", help="of the model, as clients call it (default: the last part of MODEL)")
    made.add_argument("--read-only", action="store_true", help="do not change the bank; another process may")
    made.add_argument("--create", action="store_true", help="begin an empty bank where there is none")
    keys = made.add_argument_group("who may ask")
    keys.add_argument(
        "--api-keys",
        metavar="FILE",
        help="a key per line; `read` behind one that may change nothing. Clients send `Authorization: Bearer KEY`",
    )
    keys.add_argument(
        "--api-key", metavar="KEY", action="append", default=[], help="a key, visible in the list of processes"
    )
    keys.add_argument(
        "--no-keys", action="store_true", help="let everybody ask who reaches a --host beyond this machine"
    )
    keys.add_argument(
        "--allow-host", metavar="NAME", action="append", default=[], help="a further name that clients call it by"
    )
    limits = made.add_argument_group("limits")
    limits.add_argument("--max-new-tokens", type=positive, default=128, help="of an answer by default (default: 128)")
    limits.add_argument("--most-new-tokens", type=positive, default=2048, help="that may be asked for (default: 2048)")
    limits.add_argument("--max-batch", type=positive, default=8, help="questions generated together (default: 8)")
    limits.add_argument("--max-waiting", type=positive, default=256, help="requests that wait (default: 256)")
    limits.add_argument("--max-requests", type=positive, default=512, help="requests in flight (default: 512)")
    limits.add_argument("--max-body", type=positive, metavar="BYTES", default=4 * 2**20, help="(default: 4 MiB)")
    limits.add_argument("--timeout", type=positive, metavar="SECONDS", default=120, help="of a request (default: 120)")
    limits.add_argument(
        "--drain", type=positive, metavar="SECONDS", default=60, help="that requests have once it ends (default: 60)"
    )
    made.add_argument("--select", choices=SELECTORS, help="how documents are chosen for reading (default: router)")
    made.add_argument("--max-rounds", type=at_least(0), help="of retrieval (default: 3)")
    made.add_argument("--documents-per-round", type=positive, help="to read at most")
    made.add_argument("--access-log", action="store_true", help="a line per request on stderr")
    add_model_options(made)
    add_compile_option(made)
    add_index_options(made)
    add_sole_writer_option(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf serve`."""
    try:
        from ..serving.app import Application
        from ..serving.hosts import is_loopback
        from ..serving.keys import ApiKey, read_keys
        from ..serving.limits import Limits
        from ..serving.running import listen, serve
        from ..serving.service import Service, Settings
    except ImportError as error:
        if (error.name or "").startswith("msa_hf"):
            raise
        raise UserError(f"{NEEDS} ({error})") from error
    from ..bank import BankError, BankStore
    from ..model.bank_manifest_msa import is_bank
    from ..model.checkpoint_msa import UNTRAINED

    with reported():
        keys = [] if args.api_keys is None else read_keys(args.api_keys)
        keys += [ApiKey.of(text) for text in args.api_key]
    if args.api_keys is not None and os.stat(args.api_keys).st_mode & 0o077:
        print(f"msa-hf: {args.api_keys}: other users of this machine can read it (chmod 600)", file=sys.stderr)
    if not keys and not is_loopback(args.host) and not args.no_keys:
        raise UserError(
            f"--host {args.host} lets other machines in, who could read and change the bank: give --api-keys FILE, or "
            "say --no-keys"
        )
    if args.create and args.read_only:
        raise UserError("--create and --read-only exclude each other")
    if not args.create and not is_bank(Path(args.bank)) and not is_read_from_hub(args.bank, args.read_only):
        raise UserError(f"{args.bank}: no bank there; make one with `msa-hf encode`, or say --create for an empty one")
    if args.create:
        bank_to_change(args.bank)
    with reported(subject=f"{args.host}:{args.port}"):
        listener = listen(args.host, args.port)
    device = device_in(args)
    model, tokenizer = load(args.model, device, args.dtype, args.protocol)
    if args.compile:
        compile_runs(model)
    if model.config.routers_trained is False:
        print(f"msa-hf: the routers of {args.model} are untrained: {UNTRAINED}", file=sys.stderr)
    protocol = protocol_of(args.protocol, args.model)
    interleave = {
        "select": args.select,
        "max_rounds": args.max_rounds,
        "documents_per_round": args.documents_per_round,
    }
    interleave = {name: value for name, value in interleave.items() if value is not None}
    settings = Settings(
        args.name or os.path.basename(os.path.normpath(args.model)),
        min(args.max_new_tokens, args.most_new_tokens),
        Limits(
            body_bytes=args.max_body,
            seconds=args.timeout,
            requests=args.max_requests,
            waiting=args.max_waiting,
            batch=args.max_batch,
            new_tokens=args.most_new_tokens,
        ),
        interleave,
    )
    kept = {"lexical": args.lexical, "embedder": embedder_of(args.embedder, device), "sole_writer": args.sole_writer}
    if args.read_only:
        kept = {"embedder": kept["embedder"]}
    try:
        with reported():
            store = BankStore(model, args.bank, tokenizer, protocol, read_only=args.read_only, device=device, **kept)
    except (BankError, ImportError) as error:
        raise UserError(str(error)) from error
    with store, reported():
        service = Service(store, model, tokenizer, protocol, settings)
        service.check()
        application = Application(service, keys, ["*"] if args.no_keys else args.allow_host)
        return serve(application, listener, args.drain, args.access_log)
