"""`msa-hf inspect`: what a bank holds and was made with."""

from __future__ import annotations

import argparse
import json

from ..json_object import JsonObject
from ..user_errors import reported
from .characters import in_one_line
from .options import at_least

NAME = "inspect"
HELP = "Show what a bank holds and was made with."

SHOWN_TEXT = 80  # characters of a document's text


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("bank", metavar="BANK", help="directory of the bank, or its name on the Hub")
    made.add_argument("--documents", type=at_least(0), default=5, help="documents to show (default: 5)")
    made.add_argument("--verify", action="store_true", help="compare the checksum of every file, which reads them all")
    made.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf inspect`."""
    from ..model.memory_msa import MemoryBank

    with reported():
        bank = MemoryBank.from_pretrained(args.bank, verify=args.verify)
        assert bank.home is not None
        size = sum(path.stat().st_size for path in bank.home.directory.iterdir() if path.is_file())
        shown = bank.documents[: args.documents]
    record: JsonObject = {
        "documents": len(bank),
        "tokens": bank.num_tokens,
        "chunks": bank.num_chunks,
        "dtype": str(bank.dtype).removeprefix("torch."),
        "bytes": size,
        "origin": bank.origin.to_dict(),
    }
    documents: list[JsonObject] = [
        {"key": item.key, "tokens": item.tokens, "chunks": item.chunks, "metadata": item.metadata, "text": item.text}
        for item in shown
    ]
    if args.json:
        print(json.dumps({**record, "first_documents": documents}, ensure_ascii=False))
        return 0
    origin = record.pop("origin")
    for name in ("configuration_defaults", "weights"):
        origin.pop(name, None)
    if (weights := bank.origin.weights) is not None:
        origin["weights"] = ", ".join([weights.describe_dtypes(), *weights.quantized])
        origin["adapters"] = ", ".join(adapter.name for adapter in weights.adapters) or "none"
    for name, value in {**record, **origin}.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for item in documents:
        text = in_one_line(item["text"] or "")
        beginning = f"{text[:SHOWN_TEXT]}{'...' if text[SHOWN_TEXT:] else ''}"
        print(f"  {in_one_line(item['key'])} ({item['tokens']} tokens): {beginning}")
    return 0
