"""`msa-hf chain`: questions answered by a prompt chain over a bank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported
from .indexes import EMBEDDER_HELP, add_fusion_option, embedder_of, fusion_of
from .loading import checkpoint, load, protocol_of
from .options import add_model_options, device_in, positive

if TYPE_CHECKING:
    import torch

    from ..hybrid.chains import Chain, ChainResult
    from ..hybrid.chat import ChatModel

NAME = "chain"
HELP = "Answer questions in steps: each retrieves, asks a model, and hands its result on."

SHOWN_TEXT = 120  # characters of an output


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("chain", metavar="CHAIN.yaml", nargs="?", help="the steps; left out with --plan")
    made.add_argument("--bank", metavar="BANK", help="that steps search, and the memory model reads")
    made.add_argument("--question", metavar="TEXT", action="append", default=[], help="to answer; may be repeated")
    made.add_argument("--model", metavar="MODEL", help="the memory model: the checkpoint that made the bank")
    made.add_argument("--chat", metavar="MODEL", help="a causal LM for steps that ask a chat model")
    made.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible chat model, such as http://host/v1")
    made.add_argument("--endpoint-model", metavar="NAME", help="the name of the model there")
    made.add_argument("--endpoint-key", metavar="FILE", type=Path, help="a file with the key of the endpoint")
    made.add_argument("--timeout", type=positive, default=60, help="seconds of an answer there (default: 60)")
    made.add_argument("--plan", choices=("rules", "model"), help="split the question, instead of a chain from a file")
    made.add_argument(
        "--trace", metavar="FILE", help="JSON lines, one per step; a run that was stopped goes on from it"
    )
    made.add_argument("--check", action="store_true", help="check the chain alone, and run nothing")
    made.add_argument("--embedder", metavar="MODEL", help=f"that made the bank's vectors: {EMBEDDER_HELP}")
    add_fusion_option(made)
    add_model_options(made)
    made.add_argument("--json", action="store_true", help="one JSON object per question")


def run(args: argparse.Namespace) -> int:
    """`msa-hf chain`."""
    if (args.chain is None) == (args.plan is None):
        raise UserError("give either CHAIN.yaml or --plan")
    if not args.check and not args.question:
        raise UserError("nothing to answer: --question TEXT (or --check, to check the chain alone)")
    if args.trace is not None and len(args.question) > 1:
        raise UserError("--trace is of one question; ask the others by themselves")
    if (args.endpoint is None) != (args.endpoint_model is None):
        raise UserError("--endpoint and --endpoint-model belong together")
    if args.chat is not None and args.endpoint is not None:
        raise UserError("--chat and --endpoint: choose one of them")
    if args.plan == "model" and args.chat is None and args.endpoint is None:
        raise UserError("--plan model needs a chat model: --chat or --endpoint")
    from ..hybrid.chains.reading import load_chain

    chain = None
    if args.chain is not None:
        with reported():
            chain = load_chain(args.chain)
    if args.check:
        print(f"{args.chain}: a chain of {len(chain.steps)} steps" if chain is not None else "--plan: nothing to check")
        return 0
    _answer(args, chain)
    return 0


def _answer(args: argparse.Namespace, chain: Chain | None) -> None:
    """Load what the steps need, and answer."""
    from ..hybrid.chains import BankRetriever, ChainRunner, InterleaveReader
    from ..model.memory_msa import MemoryBank

    device = device_in(args)
    model = tokenizer = protocol = retriever = memory = None
    chat = _chat(args, device)
    if args.model is not None:
        model, tokenizer = load(args.model, device, args.dtype, args.protocol)
        protocol = protocol_of(args.protocol, args.model)
    if args.bank is not None:
        fusion = fusion_of(args.fusion)
        with reported():
            bank = MemoryBank.from_pretrained(args.bank, model, tokenizer, device=device, verify=False)
        embedder = embedder_of(args.embedder, device)
        options = {"model": model, "tokenizer": tokenizer, "protocol": protocol}
        retriever = BankRetriever(bank, args.bank, **options, embedder=embedder, fusion=fusion)
        if model is not None and tokenizer is not None and protocol is not None:
            memory = InterleaveReader(model, tokenizer, bank, protocol, args.model)
    runner = ChainRunner(retriever, memory, {} if chat is None else {"chat": chat})
    for number, question in enumerate(args.question):
        with reported():
            steps = _planned(args, question, chat) if chain is None else chain
            result = runner.run(steps, question, args.trace)
        if args.json:
            print(json.dumps(_record(question, steps, result), ensure_ascii=False, allow_nan=False), flush=True)
        else:
            print(
                ("\n" if number else "") + "\n".join(_described(question, result, len(args.question) > 1)), flush=True
            )


def _chat(args: argparse.Namespace, device: torch.device) -> ChatModel | None:
    from ..hybrid.chat import EndpointChat, TransformersChat

    if args.endpoint is not None:
        with reported():
            key = None if args.endpoint_key is None else args.endpoint_key.read_text(encoding="utf-8").strip()
            try:
                return EndpointChat(args.endpoint, args.endpoint_model, api_key=key, timeout=args.timeout)
            except ImportError as error:
                raise UserError(str(error)) from error
    if args.chat is None:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reported(foreign=True, subject=args.chat):
        name = checkpoint(args.chat)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype).to(device).eval()
        return TransformersChat(model, AutoTokenizer.from_pretrained(name), name)


def _planned(args: argparse.Namespace, question: str, chat: ChatModel | None) -> Chain:
    from ..hybrid.chains import plan_by_model, plan_by_rules

    writer = "memory" if args.model is not None else "chat"
    if args.plan == "rules":
        return plan_by_rules(question, model=writer)
    assert chat is not None
    return plan_by_model(question, chat, model=writer)


def _record(question: str, chain: Chain, result: ChainResult) -> dict[str, object]:
    from ..hybrid.chains import chain_to_dict

    return {
        "question": question,
        "answer": result.answer,
        "values": dict(result.values),
        "chain": chain_to_dict(chain),
        "steps": list(result.records),
        "resumed": result.resumed,
    }


def _described(question: str, result: ChainResult, with_question: bool) -> Iterator[str]:
    """An answer in words."""
    if with_question:
        yield f"Question: {question}"
    yield result.answer or "(no answer)"
    yield "Steps:" + (f" ({result.resumed} of them from the trace)" if result.resumed else "")
    for record in result.records:
        output = " ".join(str(record.get("output", "")).split())
        if record.get("skipped"):
            output = "(skipped)"
        elif "rounds" in record:
            output = f"({record['rounds']} rounds, ended by {record['ended']})"
        shown = output if len(output) <= SHOWN_TEXT else f"{output[:SHOWN_TEXT]}..."
        keys = ", ".join(source["key"] for source in record.get("sources", ()))
        yield f"  {record['step']}: {shown}" + (f" [{keys}]" if keys else "")
