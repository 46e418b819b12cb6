"""`msa-hf search`: the documents of a bank that fit a query, without generating."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .characters import in_one_line
from .indexes import EMBEDDER_HELP, add_fusion_option, embedder_of, fusion_of
from .loading import load, protocol_of
from .options import add_model_options, device_in, positive

if TYPE_CHECKING:
    from ..retrieval import Hit
    from ..retrieval.where import Value

NAME = "search"
HELP = "Find the documents of a bank that fit a query, and say why."

MODES = ("router", "lexical", "dense", "hybrid")
SHOWN_TEXT = 160  # characters of a document's text


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("bank", metavar="BANK", help="directory of the bank, or its name on the Hub")
    made.add_argument("queries", metavar="QUERY", nargs="+")
    made.add_argument(
        "--mode",
        choices=MODES,
        default="hybrid",
        help="by the routers of --model, by words, by vectors of --embedder, or by those of them that are there "
        "(default: hybrid)",
    )
    made.add_argument("--k", type=positive, default=10, help="documents to find (default: 10)")
    made.add_argument("--model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("--embedder", metavar="MODEL", help=f"that made the bank's vectors: {EMBEDDER_HELP}")
    add_fusion_option(made)
    made.add_argument(
        "--where",
        metavar="NAME=VALUE",
        action="append",
        type=_condition,
        default=[],
        help="find only documents with this value of metadata, such as year=1889; several of one name: one of them is "
        "enough, of different names: all",
    )
    add_model_options(made)
    made.add_argument("--json", action="store_true", help="one JSON object per query")


def run(args: argparse.Namespace) -> int:
    """`msa-hf search`."""
    from ..model.memory_msa import MemoryBank
    from ..retrieval import Searcher

    device = device_in(args)
    fusion = fusion_of(args.fusion)
    embedder = embedder_of(args.embedder, device)
    model = tokenizer = protocol = None
    if args.model is not None:
        model, tokenizer = load(args.model, device, args.dtype, args.protocol)
        protocol = protocol_of(args.protocol, args.model)
    elif args.mode == "router":
        raise UserError("--mode router needs --model, the checkpoint that made the bank")
    try:
        with reported():
            bank = MemoryBank.from_pretrained(args.bank, model, tokenizer, device=device, verify=False)
            searcher = Searcher(
                bank, model=model, tokenizer=tokenizer, protocol=protocol, embedder=embedder, fusion=fusion
            )
            found = searcher.search(args.queries, args.k, args.mode, where=_conditions(args.where))
    except ImportError as error:
        raise UserError(str(error)) from error
    for number, (query, hits) in enumerate(zip(args.queries, found, strict=True)):
        if args.json:
            record = {"query": query, "mode": args.mode, "hits": [hit.to_dict() for hit in hits]}
            print(json.dumps(record, ensure_ascii=False, allow_nan=False))
        else:
            head = [f"Query: {query}"] if len(args.queries) > 1 else []
            print(("\n" if number else "") + "\n".join([*head, *described(hits, Path(args.bank))]))
    return 0


def _condition(text: str) -> tuple[str, list[Value]]:
    """A name of metadata and what its value may be: the text, and the number, true, false or null that it spells."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as year=1889")
    found: list[Value] = [value]
    with contextlib.suppress(ValueError, RecursionError):
        spelled = json.loads(value)
        if spelled is None or (isinstance(spelled, bool | int | float) and math.isfinite(spelled)):
            found.append(spelled)
    return name, found


def _conditions(given: list[tuple[str, list[Value]]]) -> dict[str, list[Value]]:
    made: dict[str, list[Value]] = {}
    for name, values in given:
        made.setdefault(name, []).extend(values)
    return made


def described(hits: list[Hit], bank: Path) -> Iterator[str]:
    """Hits in words: two lines each."""
    if not hits:
        yield f"{bank}: no document fits"
    for hit in hits:
        why = []
        if hit.why.router is not None:
            why.append(f"router {hit.why.router.rank} ({hit.why.router.score:.3f})")
        if hit.why.layers:
            best = min(hit.why.layers, key=lambda item: item.rank)
            why.append(f"best in layer {best.layer}: {best.rank}")
        if hit.why.lexical is not None:
            why.append(f"lexical {hit.why.lexical.rank} ({hit.why.lexical.score:.2f})")
        if hit.why.terms:
            why.append(f"words {', '.join(hit.why.terms)}")
        if hit.why.dense is not None:
            why.append(f"dense {hit.why.dense.rank} ({hit.why.dense.score:.3f})")
        text = in_one_line(hit.text or "")
        yield f"{hit.rank}. [{hit.id}] {in_one_line(hit.key)} ({hit.score:.3f}): {'; '.join(why)}"
        yield f"   {text[:SHOWN_TEXT]}{'...' if len(text) > SHOWN_TEXT else ''}"
