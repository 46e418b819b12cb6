"""Answers as `ask` and `chat` show them: the text, its sources, and on demand the way to it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..generation.selectors import SELECTORS
from ..json_object import JsonObject
from ..user_errors import UserError, reported
from .characters import shown
from .indexes import add_fusion_option, fusion_of
from .loading import check_bank, checkpoint, compile_runs, load, protocol_of
from .options import add_compile_option, add_model_options, at_least, device_in, positive
from .plan import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.generation import BaseStreamer

    from ..generation import Answer, Asker, PromptProtocol
    from ..model.memory_msa import Memory

SHOWN_SOURCES = 5
SHOWN_TEXT = 100  # characters of a source's text
INTERLEAVE = ("select", "max_rounds", "documents_per_round")  # options that need a protocol


def add_asking_options(made: argparse.ArgumentParser) -> None:
    """Options of asking and answering."""
    add_model_options(made)
    add_compile_option(made)
    made.add_argument("--select", choices=SELECTORS, help="how documents are chosen for reading (default: router)")
    add_fusion_option(made)
    made.add_argument("--max-rounds", type=at_least(0), help="of retrieval (default: 3)")
    made.add_argument(
        "--documents-per-round",
        type=positive,
        help="to read at most (default: 1 for router, else what the model names)",
    )
    made.add_argument("--max-new-tokens", type=positive, default=128, help="of the answer (default: 128)")
    made.add_argument(
        "--placement",
        type=placement,
        metavar="auto|KEYS,CONTENT",
        help="place the bank in tiers, as planned or as FORMAT@TIER such as fp8@device,bf16@host (docs/scaling.md)",
    )


def interleave_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Memory Interleave that were given."""
    return {name: value for name in INTERLEAVE if (value := getattr(args, name)) is not None}


def check_protocol(args: argparse.Namespace, protocol: PromptProtocol | None) -> None:
    """Refuse options of Memory Interleave for a checkpoint without a protocol."""
    options = interleave_options(args)
    if protocol is None and options:
        spelled = f"--{min(options).replace('_', '-')}"
        raise UserError(
            f"{spelled}: is about rounds of reading, which need a protocol; {args.model} has no memory_protocol.json "
            "(`msa-hf train` gives it one)"
        )


def opened_asker(args: argparse.Namespace) -> Asker:
    """The asker of a command: MODEL on BANK, as its options say; warns of untrained routers."""
    checkpoint(args.model)
    check_bank(args.bank)
    from ..bank import place_bank
    from ..generation import asker_of
    from ..model.checkpoint_msa import UNTRAINED

    device = device_in(args)
    model, tokenizer = load(args.model, device, args.dtype, args.protocol)
    if args.compile:
        compile_runs(model)
    if model.config.routers_trained is False:
        print(f"msa-hf: the routers of {args.model} are untrained: {UNTRAINED}", file=sys.stderr)
    protocol = protocol_of(args.protocol, args.model)
    check_protocol(args, protocol)
    options = interleave_options(args)
    if args.fusion is not None:
        if args.select != "hybrid":
            raise UserError("--fusion: weighs what --select hybrid puts together; give both, or leave it out")
        options["fusion"] = fusion_of(args.fusion)
    with reported():
        if args.placement is None:
            bank: Any = model.load_memory(args.bank, tokenizer, device=device)
        else:
            bank = place_bank(args.bank, device, args.placement, model=model, tokenizer=tokenizer)
            print(bank.plan, file=sys.stderr)
        return asker_of(model, tokenizer, bank, protocol, max_new_tokens=args.max_new_tokens, **options)


def snippet(text: str | None, length: int = SHOWN_TEXT) -> str:
    """The beginning of a text on one line."""
    line = " ".join((text or "").split())
    return shown(line if len(line) <= length else f"{line[: length - 3].rstrip()}...")


def record_of(answer: Answer, bank: Memory) -> JsonObject:
    """An answer as JSON values."""
    trace = json.loads(answer.trace.to_json())
    stages = [
        {"stage": name, "round": number, **stage}
        for number, item in enumerate(trace["rounds"])
        for name, stage in item["stages"].items()
    ]
    stages += [{"stage": name, "round": None, **stage} for name, stage in trace["stages"].items()]
    sources = [
        {
            "rank": rank,
            "key": item.key,
            "id": item.id,
            "position": item.position,
            "score": item.score,
            "round": item.round,
            "snippet": snippet(bank.documents[item.position].text),
        }
        for rank, item in enumerate(answer.documents, 1)
    ]
    return {
        "question": answer.trace.question,
        "answer": answer.text,
        "sources": sources,
        "stages": stages,
        "trace": trace,
    }


def described_sources(answer: Answer, bank: Memory, most: int | None = SHOWN_SOURCES) -> Iterator[str]:
    """The sources of an answer, scores over all layers: a line for each; then what was chosen and does not fit."""
    yield "Sources:" if answer.documents else "Sources: none"
    for rank, item in enumerate(answer.documents[:most], 1):
        score = "not routed" if item.score is None else f"{item.score:.3f}"
        yield f"  {rank}. {shown(item.key)} ({score}) {snippet(bank.documents[item.position].text)}".rstrip()
    if most is not None and (rest := len(answer.documents) - most) > 0:
        yield f"  and {rest} more"
    if unread := answer.trace.without_room:
        yield (
            f"Not read, for lack of room in the model's positions: ids {', '.join(map(str, unread))}. "
            "`msa-hf encode --too-long split --max-length TOKENS` stores documents in parts that fit."
        )


def described_trace(answer: Answer) -> str:
    """The way to an answer, by rounds and layers, with what each stage took."""
    return shown(answer.trace.explain(show=False))


def terminal_streamer(tokenizer: PreTrainedTokenizerBase) -> BaseStreamer:
    """Prints an answer while it is written."""
    from transformers import TextStreamer

    class TerminalStreamer(TextStreamer):
        """A streamer that keeps what it has printed as its `text`."""

        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = shown(text if self.text else text.lstrip())
            self.text += text
            print(text, end="\n" if stream_end else "", flush=True)

    return TerminalStreamer(tokenizer, skip_special_tokens=True)
