"""Measure the small checkpoint on invented documents with names it was never trained on, in banks of any size.

    python scripts/eval_tiny.py model_cards/msa-hf-tiny --documents 1000 10000 100000 1000000 --out results.json

For every bank: recall of the routers in the first and the second round, and of quantized routing keys; answers with
what the model finds by itself, with one round, with forced gold documents, with gold texts in the prompt, with BM25's
texts, without a memory; ids named freely and constrained; and the ways to select documents beside each other, the first
of them under all conditions. What was measured before is kept when the file is there already, so that banks can be
measured one by one.

A large bank on a machine without accelerator, encoded in commits, so that an interrupted run goes on where it stopped:

    python scripts/eval_tiny.py model_cards/msa-hf-tiny --documents 1000000 --out results.json \\
        --bank bank-1m --dtype bfloat16 --compile --batch-tokens 3072
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from functools import cache, partial
from importlib import metadata
from itertools import islice
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.bank import BankStore
from msa_hf.evaluation import UNANSWERABLE, Corpus, Question, make_corpus, quantized_recall
from msa_hf.generation import MemoryInterleave, PromptProtocol
from msa_hf.training import Diagnosis, diagnose, router_recall

KINDS = ("one_hop", "two_hop", "unanswerable")
SEED = 99
PART = 2000  # documents that a process makes at a time
COMMIT = 20_000  # documents that are added to a bank on disk at a time
SELECTIONS: dict[str, dict[str, Any]] = {
    "router, 1 document a round": {"select": "router", "documents_per_round": 1},
    "router, 2 documents a round": {"select": "router", "documents_per_round": 2},
    "router, 4 documents a round": {"select": "router", "documents_per_round": 4},
    "constrained": {"select": "constrained"},
    "generate": {"select": "generate"},
}


@cache
def writer(checkpoint: str, prose: Path, documents: int) -> tuple[Corpus, Any, PromptProtocol]:
    texts = json.loads(prose.read_text())[:1000]
    corpus = make_corpus(documents, seed=SEED, split="test", prose=texts, prose_share=0.2)
    return (
        corpus,
        AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer,
        PromptProtocol.from_pretrained(checkpoint),
    )


def part(checkpoint: str, prose: Path, documents: int, start: int) -> list[dict[str, Any]]:
    """Documents start .. start + PART - 1 as `PromptProtocol.document_row` makes them, tokenized many at a time."""
    corpus, tokenizer, protocol = writer(checkpoint, prose, documents)
    texts = corpus.texts(start, min(start + PART, documents))
    wrapped = [protocol.document.format(id=start + place, text=text) for place, text in enumerate(texts)]
    coded = tokenizer.encode_batch(wrapped, add_special_tokens=False)
    return [
        {"key": str(start + place), "text": text, "input_ids": row.ids, "metadata": {"id": start + place}}
        for place, (text, row) in enumerate(zip(texts, coded, strict=True))
    ]


def documents_of(
    checkpoint: str, prose: Path, documents: int, pool: Pool | None, start: int = 0
) -> Iterator[dict[str, Any]]:
    """Documents from `start` on."""
    make = partial(part, checkpoint, prose, documents)
    starts = range(start, documents, PART)
    for rows in map(make, starts) if pool is None else pool.imap(make, starts):
        yield from rows


def encode(model: Any, tokenizer: Any, size: int, pool: Pool | None, arguments: Any) -> MemoryBank:
    """The bank of `size` documents, as far as it is not on disk already."""
    make = partial(documents_of, arguments.checkpoint, arguments.prose, size, pool)
    options = {"batch_tokens": arguments.batch_tokens, "show_progress": False}
    if arguments.bank is None:
        return model.encode_documents(make(), tokenizer, **options)
    directory = arguments.bank / str(size)
    directory.mkdir(parents=True, exist_ok=True)
    with BankStore(model, directory, tokenizer, device=model.device, encode_options=options) as bank:
        rows = make(len(bank))
        while batch := list(islice(rows, COMMIT)):
            bank.add(batch)
            print(f"{size} documents: {len(bank)} encoded", flush=True)
        return bank.snapshot()


def asked(questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {
            "question": question.text,
            "answer": question.answer,
            "kind": question.kind,
            "positives": [str(place) for place in question.positives],
            "rounds": [[str(place) for place in found] for found in question.rounds],
        }
        for question in questions
    ]


def figures(diagnosis: Diagnosis) -> dict[str, Any]:
    """Condition -> kind -> figures."""
    return {
        condition: {
            kind: {
                "exact_match": item.exact,
                "empty": item.empty,
                "refused": item.refused,
                "gold_read": item.gold_read,
                "questions": item.questions,
            }
            for kind, item in kinds.items()
        }
        for condition, kinds in diagnosis.answers.items()
    }


def measure(model: Any, tokenizer: Any, protocol: PromptProtocol, size: int, pool: Pool | None, arguments: Any) -> Any:
    """All figures of a bank of `size` documents."""
    seconds: dict[str, float] = {}
    started = time.time()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = round(time.time() - started, 2)
        print(f"{size} documents: {name} {seconds[name]} s", flush=True)
        started = time.time()

    corpus, _, _ = writer(arguments.checkpoint, arguments.prose, size)
    bank = encode(model, tokenizer, size, pool, arguments)
    lap("make, tokenize and encode the documents")
    ours, theirs = bank.documents[0], protocol.document_row(0, corpus.texts(0, 1)[0], tokenizer)
    assert (ours.text, ours.tokens) == (theirs["text"], len(theirs["input_ids"]))

    questions = [question for kind in KINDS for question in corpus.questions(arguments.questions, kind, seed=4)]
    rest = {"protocol": protocol, "batch_size": arguments.batch_size, "refusal": UNANSWERABLE, "max_new_tokens": 24}
    rest["show_progress"] = False
    limits = {"max_id_tokens": 40}
    result: dict[str, Any] = {}
    for name in arguments.selections:
        options, first = SELECTIONS[name], not result
        conditions = list(arguments.conditions) if first else ["routed"]
        if size > arguments.bm25 and "bm25" in conditions:
            conditions.remove("bm25")
        diagnosis = diagnose(
            model, tokenizer, bank, asked(questions), conditions=conditions, interleave=limits, **options, **rest
        )
        if first:
            print(diagnosis, flush=True)
            router = diagnosis.router
            assert router is not None
            layers = {
                str(layer): {"@16": router["first_layers"][layer], "@1": router["first_layers_at_1"][layer]}
                for layer in router["layers"]
            }
            recall = {"layers": layers, "any": {"@16": router["first"], "@1": router["first_at_1"]}}
            recall |= {"distinct": router["distinct"], "wanted": router["wanted"]}
            result = {"documents": size, "tokens": bank.num_tokens, "questions": arguments.questions, "recall": recall}
            result |= {"conditions": figures(diagnosis), "ids": diagnosis.ids, "select": {}, "seconds": seconds}
        found = figures(diagnosis)["routed"]
        result["select"][name] = {kind: found[kind]["exact_match"] for kind in KINDS}
        print(size, name, result["select"][name], flush=True)
        lap(name)
    second = router_recall(model, tokenizer, bank, asked(questions), None, 50, protocol, rounds_read=1)
    for layer, layers in result["recall"]["layers"].items():
        layers |= {"second@16": second["first_layers"][int(layer)], "second@1": second["first_layers_at_1"][int(layer)]}
    asker = MemoryInterleave(model, tokenizer, bank, protocol, documents_per_round=1, max_new_tokens=24)
    times = []
    for question in questions[:: max(len(questions) // 12, 1)]:
        start = time.perf_counter()
        asker.ask(question.text)
        times.append(time.perf_counter() - start)
    some = tokenizer([question.text for question in questions[::9]], return_tensors="pt", padding=True)
    result["quantized"] = quantized_recall(model, bank, some.to(model.device))
    result["seconds"]["one question, median"] = round(statistics.median(times), 4)
    result["bank_bytes"] = sum(
        part.numel() * part.element_size()
        for memory in bank.layers.values()
        for part in (memory.routing_keys, memory.pooled_kv)
    )
    return result


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--documents", type=int, nargs="+", default=[1000])
    parser.add_argument("--questions", type=int, default=300, help="of each kind")
    parser.add_argument("--prose", type=Path, required=True, help="the prose.json that train_tiny.py tokenizer wrote")
    parser.add_argument("--out", type=Path, help="JSON file; the figures of other banks in it are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument(
        "--bank", type=Path, help="folder that keeps the banks, a directory for each number of documents"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on an accelerator")
    parser.add_argument(
        "--compile", action="store_true", help="compile norms and MLPs: about 1.5 times as fast on CPUs"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that make documents")
    parser.add_argument("--bm25", type=int, default=100_000, help="largest bank that BM25 is asked about")
    parser.add_argument(
        "--conditions",
        nargs="+",
        default=["routed", "single_round", "forced_gold", "gold_text", "bm25", "no_memory", "ids"],
    )
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), choices=list(SELECTIONS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    # Before there is a CUDA context, which forked processes could not share; they start at once.
    pool = multiprocessing.get_context("fork").Pool(arguments.workers) if arguments.workers else None
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, padding_side="left")
    model = MSAForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype).eval().to(device)
    if arguments.compile:
        for module in model.modules():
            if type(module).__name__.endswith(("RMSNorm", "MLP")):
                module.compile(dynamic=True)
    protocol = PromptProtocol.from_pretrained(arguments.checkpoint)
    report: dict[str, Any] = {"banks": []}
    if arguments.out is not None and arguments.out.exists():
        report = json.loads(arguments.out.read_text())
    made_on = {
        "hardware": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }
    for size in sorted(arguments.documents):
        bank = {**measure(model, tokenizer, protocol, size, pool, arguments), **made_on}
        others = [item for item in report["banks"] if item["documents"] != size]
        report["banks"] = sorted([*others, bank], key=lambda item: item["documents"])
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
