"""`msa-hf eval`: routers and answers are measured with questions whose documents are known."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.conditions import CONDITIONS, checked_conditions
from ..generation.selectors import SELECTORS
from ..user_errors import UserError, reported
from .documents import add_document_options, read_corpus
from .loading import load, protocol_of
from .options import add_model_options, at_least, device_in, positive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.documents import Corpus
    from ..generation import PromptProtocol
    from ..model.memory_msa import MemoryBank
    from ..model.modeling_msa import MSAForCausalLM

NAME = "eval"
HELP = "Measure routers and answers with questions whose documents are known."


def add_options(made: argparse.ArgumentParser) -> None:
    """Its options."""
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="a bank, or documents as `encode` takes them")
    made.add_argument(
        "questions", metavar="QUESTIONS", help="a .jsonl of question, answer, positives (document keys), kind"
    )
    add_model_options(made)
    add_document_options(made)
    made.add_argument(
        "--conditions",
        type=lambda text: text.split(","),
        help=f"among {', '.join(CONDITIONS)}; separated by commas (default: all but ids)",
    )
    made.add_argument("--k", type=positive, help="documents per layer that count as found (default: the model's top-k)")
    made.add_argument("--refusal", help="the answer to what the memory does not hold")
    made.add_argument("--select", choices=SELECTORS, default="router", help="how documents are chosen for reading")
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval (default: 3)")
    made.add_argument("--documents-per-round", type=positive, help="to read (default: 1 that the router chooses)")
    made.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    made.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: 8)")
    made.add_argument("--json", action="store_true", help="one JSON object, with every answer")
    made.add_argument("--out", metavar="FILE", help="a file for that JSON object")


def run(args: argparse.Namespace) -> int:
    """`msa-hf eval`."""
    from ..evaluation.diagnosis import diagnose
    from ..evaluation.judged_questions import read_judged
    from ..model.bank_manifest_msa import holds_bank
    from ..model.hub_msa import is_hub_name

    device = device_in(args)
    if args.out and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"{args.out}: not a file in a directory that is there")
    protocol = protocol_of(args.protocol, args.model)
    try:
        with reported():
            conditions = checked_conditions(args.conditions, protocol)
            questions = read_judged(args.questions, args.encoding)
        if not any({"answer", "positives", "rounds"} & question.keys() for question in questions):
            raise UserError(
                f"{args.questions}: no question has an 'answer' or 'positives', by which answers could be judged"
            )
    except ImportError as error:
        raise UserError(f"{error}, or leave it out of --conditions") from error
    corpus = None if holds_bank(Path(args.bank)) or is_hub_name(args.bank) else read_corpus(args, args.bank)
    model, tokenizer = load(args.model, device, args.dtype, args.protocol)
    with reported():
        if corpus is None:
            bank = model.load_memory(args.bank, tokenizer, device=device)
        else:
            bank = encoded(corpus, model, tokenizer, protocol)
        found = diagnose(
            model,
            tokenizer,
            bank,
            questions,
            protocol,
            conditions,
            k=args.k,
            batch_size=args.batch_size,
            refusal=args.refusal,
            max_rounds=args.max_rounds,
            documents_per_round=args.documents_per_round,
            select=args.select,
            max_new_tokens=args.max_new_tokens,
        )
    if args.out:
        Path(args.out).write_text(found.to_json(indent=1) + "\n", encoding="utf-8")
    print(found.to_json() if args.json else found)
    return 0


def encoded(
    corpus: Corpus, model: MSAForCausalLM, tokenizer: PreTrainedTokenizerBase, protocol: PromptProtocol | None
) -> MemoryBank:
    """Documents as a bank in memory, wrapped as the protocol says."""
    return model.encode_documents(corpus if protocol is None else protocol.encode_corpus(corpus, tokenizer), tokenizer)
