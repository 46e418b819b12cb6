"""`msa-hf consume`: a bank follows a stream of events."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .indexes import add_index_options, embedder_of
from .loading import bank_to_change, load, protocol_of
from .options import add_model_options, add_sole_writer_option, device_in, positive

if TYPE_CHECKING:
    from ..hybrid.streams import StreamMetrics

NAME = "consume"
HELP = "Apply the events of a Redis stream to a bank, each once."


def seconds(text: str) -> float:
    """An argument type: seconds, not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be seconds, got {text!r}")
    return value


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("bank", metavar="BANK", help="directory of the bank, made where there is none")
    made.add_argument("--model", metavar="MODEL", required=True, help="the checkpoint that makes the bank")
    made.add_argument("--redis", metavar="URL", required=True, help="such as redis://localhost:6379/0")
    made.add_argument("--stream", metavar="NAME", required=True, help="key of the stream; made where there is none")
    made.add_argument("--group", metavar="NAME", required=True, help="of consumers; one per bank")
    made.add_argument("--dead-letters", metavar="NAME", help="stream of rejected messages (default: STREAM:dead)")
    made.add_argument("--batch", type=positive, default=256, metavar="N", help="most events per commit (default: 256)")
    made.add_argument("--wait", type=seconds, default=1.0, metavar="S", help="for the first of a batch (default: 1)")
    made.add_argument("--timeout", type=seconds, default=5.0, metavar="S", help="for an answer of Redis (default: 5)")
    made.add_argument(
        "--patience", type=seconds, default=60.0, metavar="S", help="for which Redis may be away (default: 60)"
    )
    made.add_argument("--until-idle", action="store_true", help="end when no event came within --wait")
    made.add_argument(
        "--metrics", metavar="FILE", help="keep counters there, in Prometheus' text format (textfile collector)"
    )
    add_model_options(made)
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens per batch (default: 16384)")
    add_index_options(made)
    add_sole_writer_option(made)


def run(args: argparse.Namespace) -> int:
    """`msa-hf consume`."""
    from ..bank import BankError, BankLocked, BankStore
    from ..hybrid.streams import RedisSource, StreamConsumer, StreamError, open_when_free

    directory = bank_to_change(args.bank)
    try:
        # First, as it is soon known whether the stream is there; nothing is read yet.
        source = RedisSource(
            args.redis, args.stream, args.group, dead_letters=args.dead_letters, timeout=max(args.timeout, 0.01)
        )
    except (ImportError, StreamError) as error:
        raise UserError(str(error)) from error
    device = device_in(args)
    model, tokenizer = load(args.model, device, args.dtype)
    protocol = protocol_of(args.protocol, args.model)
    kept = {"lexical": args.lexical, "embedder": embedder_of(args.embedder, device), "sole_writer": args.sole_writer}
    options = {"batch_tokens": args.batch_tokens}

    def open_bank() -> BankStore:
        return BankStore(model, directory, tokenizer, protocol, encode_options=options, **kept)

    def write(metrics: StreamMetrics) -> None:
        if args.metrics is not None:
            write_metrics(Path(args.metrics), metrics.prometheus())

    with stopping() as stop, contextlib.closing(source), reported():
        try:
            with open_when_free(open_bank, stop=stop) as bank:
                consumer = StreamConsumer(source, bank, batch_size=args.batch, wait=args.wait, patience=args.patience)
                metrics = consumer.run(stop, until_idle=args.until_idle, after_batch=write)
                write(metrics)
                print(
                    f"{directory}: {metrics.applied} applied, {metrics.unchanged} unchanged, {metrics.rejected} "
                    f"rejected; {len(bank)} documents"
                )
        except BankLocked as error:
            if not stop():
                raise UserError(str(error)) from error
        except (BankError, StreamError) as error:
            raise UserError(str(error)) from error
    return 0


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Tell whether the process was asked to end: the first SIGTERM or SIGINT lets the batch be finished."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print("finishing the batch", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_metrics(path: Path, text: str) -> None:
    """Replace a file, so that whoever reads it sees all of it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
