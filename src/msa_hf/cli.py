"""The command line: `msa-hf retrofit | encode | ask | train | eval | inspect | bank | plan | doctor`.

A mistake of the user ends with one line on stderr and exit code 2; any other error keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoTokenizer

from . import doctor
from .bank import BankDamaged, BankLocked, OpenBank, RankFailed, place_bank, plan_command
from .bank.encoding import PART_SIZE, TIMEOUT, agreed, connected, encode_bank
from .corpus_files import Corpus, UserError, reported
from .generation import COMPACT, PUBLISHED, Answer, MemoryInterleave, Protocol
from .generation.interleave import SELECTIONS
from .memory_msa import MemoryBank
from .modeling_msa import MSAForCausalLM
from .storage_msa import MANIFEST, read_manifest
from .training import CollapsedError
from .training.data import read_questions
from .training.diagnosis import CONDITIONS, checked_conditions, diagnose, read_judged
from .training.settings import SettingError, add_options, settings_of

PROTOCOLS: dict[str, Protocol | None] = {"compact": COMPACT, "published": PUBLISHED, "none": None}
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHOWN_TEXT = 80  # characters of a document's text that `inspect` shows


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments like any other mistake of the user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


# Arguments ------------------------------------------------------------------------------------------------------------


def at_least(lowest: int) -> Any:
    """An argument type: an integer from `lowest`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {lowest}, got {text!r}")
        return value

    return integer


def layer_list(text: str) -> list[int]:
    """An argument type: layers separated by commas."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layers separated by commas, got {text!r}") from None


def device_of(text: str) -> torch.device:
    """An argument type: a device that this machine has; `cuda` is this process' own where a launcher started many."""
    try:
        device = torch.device(text)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(torch.cuda.device_count(), 1))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"this machine has no device {text!r}") from None
    return device


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    main = Parser(prog="msa-hf", description="A memory of documents for any Hugging Face causal LM.")
    commands = main.add_subparsers(required=True, metavar="COMMAND")
    positive = at_least(1)

    def command(name: str, run: Any, text: str, group: Any = commands) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    def add_protocol_option(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--protocol",
            choices=("auto", *PROTOCOLS),
            default="auto",
            help="how documents and questions are wrapped; auto: as the checkpoint's memory_protocol.json says, plain "
            "text where it has none",
        )

    def add_model_options(made: argparse.ArgumentParser) -> None:
        add_protocol_option(made)
        made.add_argument("--device", type=device_of, default="cpu", help="such as cuda (default: cpu)")
        made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")

    made = command("retrofit", retrofit, "Give a plain model a memory and save it.")
    made.add_argument("base", metavar="BASE", help="a checkpoint: directory or Hub id")
    made.add_argument("out", metavar="OUT", help="directory for the new checkpoint")
    made.add_argument("--memory-layers", type=layer_list, help="such as 20,24,27 (default: the upper half)")
    made.add_argument("--chunk-size", type=positive, default=64, help="tokens per chunk (default: 64)")
    made.add_argument("--top-k", type=positive, default=16, help="documents per memory layer (default: 16)")
    made.add_argument("--similarity", choices=("cosine", "dot"), default="cosine")
    made.add_argument("--router-init", choices=("copy", "random"), default="copy")
    made.add_argument("--score-bias", action="store_true", help="let scores weigh the documents in the attention")

    made = command(
        "encode",
        encode,
        "Encode documents into a memory bank. Run again after an interruption it goes on where it stopped; under "
        "`accelerate launch` or `torchrun`, as `-m msa_hf.encode`, all processes share the work.",
    )
    made.add_argument("model", metavar="MODEL", help="a checkpoint with a memory: directory or Hub id")
    made.add_argument(
        "source", metavar="SOURCE", help="a folder of .txt and .md, a .jsonl, or what datasets.save_to_disk saved"
    )
    made.add_argument(
        "bank", metavar="BANK", help="directory for the bank; one that lies there is replaced when this one is complete"
    )
    add_model_options(made)
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens per batch (default: 16384)")
    made.add_argument(
        "--part-size",
        type=positive,
        default=PART_SIZE,
        metavar="BYTES",
        help="text that is encoded and kept at a time; what an interruption costs, per process (default: 1000000)",
    )
    made.add_argument(
        "--timeout",
        type=positive,
        default=int(TIMEOUT.total_seconds()),
        metavar="SECONDS",
        help="of waiting for another process; must exceed the time a part takes (default: 3600)",
    )
    made.add_argument(
        "--too-long", choices=("error", "split"), default="error", help="what to do with a document above the limit"
    )
    made.add_argument("--text-column", help="field of the text (default: text)")
    made.add_argument("--key-column", help="field of the key (default: key, or the document's number)")

    made = command("ask", ask, "Ask questions of a bank; without a question, one per line of the input.")
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("questions", metavar="QUESTION", nargs="*")
    add_model_options(made)
    made.add_argument("--select", choices=SELECTIONS, default="router", help="how documents are chosen for reading")
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval (default: 3)")
    made.add_argument(
        "--documents-per-round",
        type=positive,
        help="to read at most (default: 1 for router, else what the model names)",
    )
    made.add_argument("--max-new-tokens", type=positive, default=128, help="of the answer (default: 128)")
    made.add_argument(
        "--placement",
        type=plan_command.placement,
        metavar="auto|KEYS,CONTENT",
        help="place the bank in tiers, as planned or as FORMAT@TIER such as fp8@device,bf16@host (docs/scaling.md)",
    )
    made.add_argument("--json", action="store_true", help="one JSON object per question")

    made = command("train", train, "Train a model with a memory on your own documents and questions.")
    made.add_argument("model", metavar="MODEL", help="a checkpoint, plain or with a memory: directory or Hub id")
    made.add_argument("documents", metavar="DOCUMENTS", help="all of them, as `encode` takes its SOURCE")
    made.add_argument("questions", metavar="QUESTIONS", help="a .jsonl: question, answer, positives (document keys)")
    made.add_argument("out", metavar="OUT", help="directory for the result")
    add_protocol_option(made)
    add_options(made)

    made = command("eval", evaluate, "Measure routers and answers with questions whose documents are known.")
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="a bank, or documents as `encode` takes them")
    made.add_argument(
        "questions", metavar="QUESTIONS", help="a .jsonl of question, answer, positives (document keys), kind"
    )
    add_model_options(made)
    made.add_argument(
        "--conditions",
        type=lambda text: text.split(","),
        help=f"among {', '.join(CONDITIONS)}; separated by commas (default: all but ids)",
    )
    made.add_argument("--k", type=positive, help="documents per layer that count as found (default: the model's top-k)")
    made.add_argument("--refusal", help="the answer to what the memory does not hold")
    made.add_argument("--select", choices=SELECTIONS, default="router", help="how documents are chosen for reading")
    made.add_argument("--max-rounds", type=at_least(0), default=3, help="of retrieval (default: 3)")
    made.add_argument("--documents-per-round", type=positive, help="to read (default: 1 that the router chooses)")
    made.add_argument("--max-new-tokens", type=positive, default=64, help="of an answer (default: 64)")
    made.add_argument("--batch-size", type=positive, default=8, help="questions at a time (default: 8)")
    made.add_argument("--json", action="store_true", help="one JSON object, with every answer")
    made.add_argument("--out", metavar="FILE", help="a file for that JSON object")

    made = command("inspect", inspect, "Show what a bank holds and was made with.")
    made.add_argument("bank", metavar="BANK")
    made.add_argument("--documents", type=at_least(0), default=5, help="documents to show (default: 5)")
    made.add_argument("--verify", action="store_true", help="compare the checksum of every file, which reads them all")
    made.add_argument("--json", action="store_true", help="one JSON object")

    made = commands.add_parser("bank", help="Change a bank, and look after it.", description="Change a bank.")
    banks = made.add_subparsers(required=True, metavar="COMMAND")

    made = command("add", bank_add, "Add documents, or put them in the place of those with their keys.", banks)
    made.add_argument("model", metavar="MODEL", help="the checkpoint that made the bank")
    made.add_argument("bank", metavar="BANK", help="made where there is none")
    made.add_argument("source", metavar="SOURCE", help="documents as `encode` takes them; unchanged ones cost nothing")
    add_model_options(made)
    made.add_argument("--batch-tokens", type=positive, default=16384, help="tokens per batch (default: 16384)")
    made.add_argument("--commit-every", type=positive, default=10_000, help="documents per commit (default: 10000)")
    made.add_argument("--text-column", help="field of the text (default: text)")
    made.add_argument("--key-column", help="field of the key (default: key)")
    made.add_argument("--version-column", help="field of an integer; what is not newer than the bank's is left out")

    made = command("delete", bank_delete, "Delete documents; `compact` removes them from the files.", banks)
    made.add_argument("bank", metavar="BANK")
    made.add_argument("keys", metavar="KEY", nargs="*")
    made.add_argument("--keys-from", metavar="FILE", help="a file with a key per line; - for the standard input")
    made.add_argument("--missing-ok", action="store_true", help="pass over keys that no document has")

    made = command(
        "compact", bank_compact, "Remove deleted documents from the files, and put small segments together.", banks
    )
    made.add_argument("bank", metavar="BANK")

    made = command(
        "verify", bank_verify, "Compare every file with its checksum; exit code 1 where one is damaged.", banks
    )
    made.add_argument("bank", metavar="BANK")
    made.add_argument("--discard-damaged", action="store_true", help="give up the documents in damaged files")
    made.add_argument("--json", action="store_true", help="one JSON object")

    made = command("stat", bank_stat, "Show the numbers of a bank, deleted documents and segments among them.", banks)
    made.add_argument("bank", metavar="BANK")
    made.add_argument("--json", action="store_true", help="one JSON object")

    made = command("plan", plan, "Plan where a bank lies and what it costs, from shapes alone; needs no GPU.")
    plan_command.add_options(made)

    made = command("doctor", examine, "Show which native operations this machine has, and why not others.")
    made.add_argument("--json", action="store_true", help="one JSON object")
    return main


# Models ---------------------------------------------------------------------------------------------------------------


def checkpoint(name: str) -> str:
    """A directory or a Hub id; a path that does not exist is neither."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name}: not a directory")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise UserError(f"{name}: no such directory")
    return name


def load(name: str, device: Any, dtype: str) -> tuple[Any, Any]:
    """A model with a memory, and its tokenizer."""
    checkpoint(name)
    with reported(foreign=True, subject=name):
        model = MSAForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        return model, AutoTokenizer.from_pretrained(name)


def protocol_of(choice: str, name: str) -> Protocol | None:
    """The protocol that was asked for, or the checkpoint's own; None for plain text."""
    if choice == "auto":
        try:
            with reported():
                protocol: Protocol | None = Protocol.from_pretrained(name)
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            protocol = None
    else:
        protocol = PROTOCOLS[choice]
    return protocol


def new_directory(name: str) -> Path:
    """A directory to save to."""
    path = Path(name)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{name}: not a directory")
    return path


def retrofit(args: argparse.Namespace) -> int:
    """`msa-hf retrofit`."""
    out = new_directory(args.out)
    if out.exists() and Path(checkpoint(args.base)).exists() and out.samefile(args.base):
        raise UserError(f"{args.out}: is BASE itself, which would be overwritten; give another OUT")
    with reported(foreign=True, subject=args.base):
        model = MSAForCausalLM.from_base(
            checkpoint(args.base),
            memory_layers=args.memory_layers,
            chunk_size=args.chunk_size,
            top_k=args.top_k,
            similarity=args.similarity,
            router_init=args.router_init,
            score_bias=args.score_bias,
        )
        tokenizer = AutoTokenizer.from_pretrained(args.base)
    with reported():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    print(f"{out}: memory in layers {', '.join(map(str, model.config.memory_layers))}; the routers are untrained")
    return 0


# Documents ------------------------------------------------------------------------------------------------------------


def encode(args: argparse.Namespace) -> int:
    """`msa-hf encode`."""
    try:
        with reported(), connected(timedelta(seconds=args.timeout)) as ranks:
            with agreed(ranks):
                out = new_directory(args.bank)
                with reported():
                    if (out / MANIFEST).exists():
                        read_manifest(out)  # before the model is loaded
                    corpus = Corpus(args.source, args.text_column, args.key_column)
                if corpus.skipped and ranks.rank == 0:
                    names = f"{len(corpus.skipped)} empty files, such as {min(corpus.skipped)}"
                    print(f"msa-hf: skipping {names}", file=sys.stderr)
                model, tokenizer = load(args.model, args.device, args.dtype)
                protocol = protocol_of(args.protocol, args.model)
            start = time.perf_counter()
            done = encode_bank(
                corpus,
                model,
                out,
                tokenizer,
                protocol,
                ranks=ranks,
                too_long=args.too_long,
                part_size=args.part_size,
                batch_tokens=args.batch_tokens,
            )
            seconds = time.perf_counter() - start
    except RankFailed as error:
        raise UserError(f"{error} What was encoded is kept: the same command goes on from there.") from error
    except BankLocked as error:
        raise UserError(str(error)) from error
    if ranks.rank == 0:
        there = f", {done.found} of {done.parts} parts were there" if done.found else ""
        counts = f"{done.documents} documents, {done.tokens} tokens, {done.chunks} chunks"
        print(f"{out}: {counts}{there}, {seconds:.1f} s")
    return 0


def encoded(corpus: Corpus, model: Any, tokenizer: Any, protocol: Protocol | None) -> MemoryBank:
    """Documents as a bank in memory, wrapped as the protocol says."""
    columns: dict[str, Any] = {"text_column": corpus.text_column, "key_column": corpus.key_column}
    if protocol is None:
        return model.encode_documents(corpus, tokenizer, **columns)
    return model.encode_documents(protocol.encode_corpus(corpus, tokenizer, **columns), tokenizer)


# Questions ------------------------------------------------------------------------------------------------------------


def ask(args: argparse.Namespace) -> int:
    """`msa-hf ask`."""
    model, tokenizer = load(args.model, args.device, args.dtype)
    protocol = protocol_of(args.protocol, args.model)
    with reported():
        if args.placement is None:
            bank = model.load_memory(args.bank, tokenizer, device=args.device)
        else:
            bank = place_bank(args.bank, args.device, args.placement, model=model, tokenizer=tokenizer)
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
    for number, question in enumerate(args.questions or lines_of_input()):
        try:
            with reported():
                if protocol is not None:
                    record = answered(asker.ask(question))
                else:
                    record = generated(model, tokenizer, bank, question, args.max_new_tokens)
        except UserError as error:
            if args.questions:
                raise
            complain(error)  # the next line may be better
            failed = True
            continue
        if args.json:
            print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
        else:
            print(("\n" if number else "") + "\n".join(described(record, len(args.questions) > 1)), flush=True)
    return 2 if failed else 0


def lines_of_input() -> Iterator[str]:
    """Questions from the standard input, without blank lines; a prompt only where somebody types."""
    while True:
        if sys.stdin.isatty():
            print("? ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not text ({error})") from error
        if not line:
            return
        if line.strip():
            yield line.strip()


def answered(answer: Answer) -> dict[str, Any]:
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


def generated(model: Any, tokenizer: Any, bank: MemoryBank, question: str, max_new_tokens: int) -> dict[str, Any]:
    """What the model writes behind a plain question, and the documents that each layer routed, as JSON values."""
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise UserError("the question is empty")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and model.config.first_position + length + max_new_tokens > positions:
        raise UserError(
            f"the question has {length} tokens; with {max_new_tokens} of an answer (--max-new-tokens) that is more "
            f"than the model's {positions} positions hold"
        )
    routing: dict[str, list[dict[str, Any]]] = {}
    routed = start = time.perf_counter()

    def keep_routing(module: Any, arguments: Any, output: Any) -> None:
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
        output = model.generate(**inputs, memory=bank, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
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


def described(record: dict[str, Any], with_question: bool) -> Iterable[str]:
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


# Training -------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> int:
    """`msa-hf train`."""
    from .training import finetune  # transformers.Trainer, which no other command needs

    names = {"base": "MODEL", "output": "OUT"}
    new_directory(args.out)
    with reported():
        corpus = Corpus(args.documents)
        documents = {
            str(number if row.get(corpus.key_column) is None else row[corpus.key_column]): row[corpus.text_column]
            for number, row in enumerate(corpus)
        }
        try:
            settings = settings_of(args, checkpoint(args.model), args.out)
            protocol = protocol_of(args.protocol, args.model)
            prepared = finetune.prepare(settings, documents, read_questions(args.questions, documents), protocol)
            trainer = finetune.make_trainer(prepared)
            if trainer.is_world_process_zero():
                for note in prepared.notes:
                    print(f"msa-hf: {note}", file=sys.stderr)
            result = finetune.train(prepared, trainer)
        except SettingError as error:
            option = names.get(error.setting, f"--{error.setting.replace('_', '-')}")
            raise UserError(error.said(option)) from error
        except CollapsedError as error:
            complain(error)
            return 1
    if result.speaks:
        print(result)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`msa-hf eval`."""
    if args.out and (Path(args.out).is_dir() or not Path(args.out).absolute().parent.is_dir()):
        raise UserError(f"{args.out}: not a file in a directory that is there")
    protocol = protocol_of(args.protocol, args.model)
    try:
        with reported():
            conditions = checked_conditions(args.conditions, protocol)
            questions = read_judged(args.questions)
    except ImportError as error:
        raise UserError(f"{error}, or leave it out of --conditions") from error
    is_bank = Path(args.bank, MANIFEST).exists()
    with reported():
        corpus = None if is_bank else Corpus(args.bank)
    model, tokenizer = load(args.model, args.device, args.dtype)
    with reported():
        if corpus is None:
            bank = model.load_memory(args.bank, tokenizer, device=args.device)
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


# Banks ----------------------------------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> int:
    """`msa-hf inspect`."""
    with reported():
        bank = MemoryBank.from_pretrained(args.bank, verify=args.verify)
        size = sum(path.stat().st_size for path in Path(args.bank).iterdir() if path.is_file())
        shown = bank.documents[: args.documents]
    record: dict[str, Any] = {
        "documents": len(bank),
        "tokens": bank.num_tokens,
        "chunks": bank.num_chunks,
        "dtype": str(bank.dtype).removeprefix("torch."),
        "bytes": size,
        "origin": bank.origin.to_dict(),
    }
    documents: list[dict[str, Any]] = [
        {"key": item.key, "tokens": item.tokens, "chunks": item.chunks, "metadata": item.metadata, "text": item.text}
        for item in shown
    ]
    if args.json:
        print(json.dumps({**record, "first_documents": documents}, ensure_ascii=False))
        return 0
    origin = record.pop("origin")
    for name, value in {**record, **origin}.items():
        print(f"{name.replace('_', ' ')}: {value}")
    for item in documents:
        text = " ".join((item["text"] or "").split())
        print(f"  {item['key']} ({item['tokens']} tokens): {text[:SHOWN_TEXT]}{'...' if text[SHOWN_TEXT:] else ''}")
    return 0


@contextlib.contextmanager
def opened(directory: str | Path, model: Any = None, *made_with: Any, **options: Any) -> Iterator[OpenBank]:
    """A bank as `OpenBank` opens it, without a model where none is given."""
    with reported():
        try:
            with OpenBank(model, directory, *made_with, **options) as bank:
                yield bank
        except (BankLocked, BankDamaged) as error:
            raise UserError(str(error)) from error


def bank_add(args: argparse.Namespace) -> int:
    """`msa-hf bank add`."""
    directory = new_directory(args.bank)
    with reported():
        corpus = Corpus(args.source, args.text_column, args.key_column)
    for number, row in enumerate(corpus):  # before the model is loaded
        if row.get(corpus.key_column) is None:
            raise UserError(f"document {number} has no {corpus.key_column!r}, by which a bank knows it (--key-column)")
        if args.version_column is not None and type(row.get(args.version_column)) is not int:
            raise UserError(f"document {number}: {args.version_column!r} (--version-column) is not an integer")
    model, tokenizer = load(args.model, args.device, args.dtype)
    protocol = protocol_of(args.protocol, args.model)
    options = {"batch_tokens": args.batch_tokens, "show_progress": True}
    counts = Counter[str]()
    rows = iter(corpus)
    with opened(directory, model, tokenizer, protocol, encode_options=options) as bank:
        while batch := list(itertools.islice(rows, args.commit_every)):
            outcomes = Counter[str]()
            with bank.batch():
                for row in batch:
                    key, text = str(row.pop(corpus.key_column)), row.pop(corpus.text_column)
                    version = None if args.version_column is None else row.pop(args.version_column)
                    known = key in bank
                    changed = bank.upsert(key, text, version, row)
                    outcomes["unchanged" if not changed else "replaced" if known else "added"] += 1
            counts += outcomes
        done = ", ".join(f"{counts[name]} {name}" for name in ("added", "replaced", "unchanged"))
        print(f"{directory}: {done}; {len(bank)} documents")
    return 0


def bank_delete(args: argparse.Namespace) -> int:
    """`msa-hf bank delete`."""
    keys = list(args.keys)
    if args.keys_from is not None:
        text = sys.stdin.read() if args.keys_from == "-" else Path(args.keys_from).read_text(encoding="utf-8")
        keys += text.splitlines()
    if not keys:
        raise UserError("no keys: name documents, or a file of them with --keys-from")
    with opened(args.bank) as bank:
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


def bank_compact(args: argparse.Namespace) -> int:
    """`msa-hf bank compact`."""
    with opened(args.bank) as bank:
        before = bank.stat()
        done = bank.compact()
        after = bank.stat()
    if not done:
        print(f"{args.bank}: nothing to do")
        return 0
    removed = f"{before['deleted']} deleted documents removed"
    print(f"{args.bank}: {removed}, {before['segments']} -> {after['segments']} segments, ", end="")
    print(f"{before['bytes']} -> {after['bytes']} bytes")
    return 0


def bank_verify(args: argparse.Namespace) -> int:
    """`msa-hf bank verify`."""
    with opened(args.bank, read_only=not args.discard_damaged) as bank:
        found = bank.verify()
        given_up = bank.discard_damaged() if args.discard_damaged else 0
    if args.json:
        damaged = [{**asdict(item), "documents": item.documents} for item in found]
        print(json.dumps({"damaged": damaged, "given_up": given_up}, ensure_ascii=False))
        return 1 if found else 0
    for item in found:
        print(f"{item.file}: {item.cause}; documents left out: {item.documents}")
        for key in item.keys:
            print(f"  {'(its key is lost too)' if key is None else key}")
    print(f"{args.bank}: {len(found)} damaged files" if found else f"{args.bank}: every file is as it was written")
    if given_up:
        print(f"{args.bank}: {given_up} documents given up")
    return 1 if found else 0


def bank_stat(args: argparse.Namespace) -> int:
    """`msa-hf bank stat`."""
    with opened(args.bank, read_only=True) as bank:
        record = bank.stat()
    if args.json:
        print(json.dumps(record))
        return 0
    for name, value in record.items():
        print(f"{name.replace('_', ' ')}: {value}")
    return 0


def plan(args: argparse.Namespace) -> int:
    """`msa-hf plan`."""
    with reported():
        placement = plan_command.planned(args)
    print(json.dumps(placement.to_dict()) if args.json else placement)
    return 0


# Machine --------------------------------------------------------------------------------------------------------------


def examine(args: argparse.Namespace) -> int:
    """`msa-hf doctor`."""
    doctor.report(args.json)
    return 0


# --------------------------------------------------------------------------------------------------------------------


def complain(error: Exception) -> None:
    """One line on stderr."""
    print(f"msa-hf: error: {' '.join(str(error).split())}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code."""
    try:
        args = parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
