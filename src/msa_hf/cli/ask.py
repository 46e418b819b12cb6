"""`msa-hf ask`: questions to a bank, with the documents that were read and the time that each stage took."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..generation.selectors import SELECTORS
from ..json_object import JsonObject
from ..user_errors import UserError, print_error, reported
from .loading import load, protocol_of
from .options import add_model_options, at_least, device_in, positive
from .plan import placement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..generation import Answer
    from ..model.memory_msa import MemoryBank
    from ..model.modeling_msa import MSAForCausalLM
    from ..model.outputs_msa import MSACausalLMOutput

NAME = "ask"
HELP = "Ask questions of a bank; without a question, one per line of the input."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("questions", metavar="QUESTION", nargs="*")
    add_model_options(made)
    made.add_argument("--select", choices=SELECTORS, default="router", help="how documents are chosen for reading")
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval (default: 3)")
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
    made.add_argument("--json", action="store_true", help="one JSON object per question")


def run(args: argparse.Namespace) -> int:
    """`msa-hf ask`."""
    from ..bank import place_bank
    from ..data.lines import input_lines
    from ..generation import MemoryInterleave
    from ..model.checkpoint_msa import UNTRAINED

    device = device_in(args)
    model, tokenizer = load(args.model, device, args.dtype)
    if model.config.routers_trained is False:
        print(f"msa-hf: the routers of {args.model} are untrained: {UNTRAINED}", file=sys.stderr)
    protocol = protocol_of(args.protocol, args.model)
    with reported():
        if args.placement is None:
            bank = model.load_memory(args.bank, tokenizer, device=device)
        else:
            bank = place_bank(args.bank, device, args.placement, model=model, tokenizer=tokenizer)
            print(bank.plan, file=sys.stderr)
        if protocol is not None:
            asker = MemoryInterleave(
                model,
                tokenizer,
                bank,
                protocol,
                max_rounds=args.max_rounds,
                select=args.select,
                documents_per_round=args.documents_per_round,
                max_new_tokens=args.max_new_tokens,
            )
    failed = False
    for number, question in enumerate(args.questions or input_lines("? ")):
        try:
            with reported():
                if protocol is not None:
                    record = answered(asker.ask(question))
                else:
                    record = generated(model, tokenizer, bank, question, args.max_new_tokens)
        except UserError as error:
            if args.questions:
                raise
            print_error(error)  # the next line may be better
            failed = True
            continue
        if args.json:
            print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
        else:
            print(("\n" if number else "") + "\n".join(described(record, len(args.questions) > 1)), flush=True)
    return 2 if failed else 0


def answered(answer: Answer) -> JsonObject:
    """An answer of Memory Interleave as JSON values."""
    trace = json.loads(answer.trace.to_json())
    stages = [
        {"stage": name, "round": number, **stage}
        for number, item in enumerate(trace["rounds"])
        for name, stage in item["stages"].items()
    ]
    stages += [{"stage": name, "round": None, **stage} for name, stage in trace["stages"].items()]
    sources = [
        {"key": item.key, "id": item.id, "position": item.position, "score": item.score, "round": item.round}
        for item in answer.documents
    ]
    return {
        "question": answer.trace.question,
        "answer": answer.text,
        "sources": sources,
        "stages": stages,
        "trace": trace,
    }


def generated(
    model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, bank: MemoryBank, question: str, max_new_tokens: int
) -> JsonObject:
    """The text that a model writes behind a plain question, and the documents of each layer, as JSON values."""
    import torch

    from ..model.positions_msa import position_limit
    from ..model.tokenizing_msa import tokenize

    ids = tokenize(tokenizer, question, add_special_tokens=True)
    length = len(ids)
    if not length:
        raise UserError("the question is empty")
    positions = position_limit(model.config)
    if positions is not None and model.config.first_position + length + max_new_tokens > positions:
        raise UserError(
            f"the question has {length} tokens; with {max_new_tokens} of an answer (--max-new-tokens) that is more "
            f"than the model's {positions} positions hold"
        )
    inputs = torch.tensor([ids], device=model.device)
    routing: dict[str, list[JsonObject]] = {}
    routed = start = time.perf_counter()

    def keep_routing(module: object, arguments: object, output: MSACausalLMOutput) -> None:
        nonlocal routed
        if not output.routing:  # decoded tokens do not route
            return
        for layer, found in output.routing.items():
            pairs = zip(found.documents[0].tolist(), found.scores[0].tolist(), strict=True)
            routing[str(layer)] = [
                {"key": bank.documents[position].key, "position": position, "score": score}
                for position, score in pairs
                if position >= 0
            ]
        routed = time.perf_counter()

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    hook = model.register_forward_hook(keep_routing)
    try:
        output = model.generate(inputs, memory=bank, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    finally:
        hook.remove()
    written = output[0, length:]
    return {
        "question": question,
        "answer": tokenizer.decode(written, skip_special_tokens=True).strip(),
        "routing": routing,
        "stages": [
            {"stage": "prefill", "round": None, "tokens": length, "seconds": routed - start},
            {"stage": "answer", "round": None, "tokens": len(written), "seconds": time.perf_counter() - routed},
        ],
    }


def described(record: JsonObject, with_question: bool) -> Iterable[str]:
    """An answer in words."""
    if with_question:
        yield f"Question: {record['question']}"
    yield record["answer"] or "(no answer)"
    if "sources" in record:
        yield "Sources:" if record["sources"] else "Sources: none"
        for item in record["sources"]:
            score = "not routed" if item["score"] is None else f"score {item['score']:.3f}"
            yield f"  [{item['id']}] {item['key']} ({score}, round {item['round'] + 1})"
    for layer, documents in record.get("routing", {}).items():
        yield f"Layer {layer}: " + ", ".join(f"{item['key']} ({item['score']:.3f})" for item in documents)
    yield "Time:"
    for stage in record["stages"]:
        name = stage["stage"] if stage["round"] is None else f"round {stage['round'] + 1} {stage['stage']}"
        yield f"  {name}: {stage['seconds'] * 1000:.1f} ms, {stage['tokens']} tokens"
