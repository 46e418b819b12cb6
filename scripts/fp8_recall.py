"""Whether routers find as much where documents were encoded with projections of 8-bit floats.

    python scripts/merge_adapter.py --base build/real/base --adapter model_cards/msa-hf-smollm2-135m --out build/model
    python scripts/fp8_recall.py --model build/model --data DATA

DATA is a directory as `real_data.py` describes it. Its passages are encoded twice, once in each way, and its
development questions ask both banks: recall of any gold passage, the questions that one way alone got right, and tokens
encoded a second, compiling left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from real_data import passages_of, read_passages, read_questions, wanted_passages
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.generation import protocol_beside
from msa_hf.retrieval.searcher import Searcher

AT = (1, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, help="documents of each set, for a first look")
    parser.add_argument("--questions", type=int, default=400, help="of each set")
    parser.add_argument("--sets", default="nq,squad11,squadshifts_newwiki,fairytaleqa,multihop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers in both ways")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = MSAForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(arguments.device).eval()
    tokenizer, protocol = AutoTokenizer.from_pretrained(arguments.model), protocol_beside(arguments.model)
    passages = read_passages(arguments.data, arguments.limit)
    of_document = passages_of(passages)
    asked: list[dict[str, Any]] = []
    for name in arguments.sets.split(","):
        questions = [item for item in read_questions(arguments.data, "dev") if item["set"] == name]
        asked += [item for item in questions if all(key in of_document for key in item["gold"])][: arguments.questions]
    gold = [{place for group in wanted_passages(item, passages, of_document) for place in group} for item in asked]
    ranks: dict[str, list[int]] = {}
    figures: dict[str, Any] = {}
    for way, options in {"plain": {}, "fp8": {"fp8_projections": True}}.items():
        options = {**options, "compile_layers": arguments.compile, "show_progress": False}
        rows = list(protocol.encode_corpus(passages.texts, tokenizer))
        if arguments.compile:
            model.encode_documents(rows[:200], tokenizer, **options)
        start = time.perf_counter()
        bank = model.encode_documents(rows, tokenizer, **options)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        figures[f"{way}, tokens/s"] = bank.num_tokens / (time.perf_counter() - start)
        figures["tokens"] = bank.num_tokens
        searcher = Searcher(bank, model=model, tokenizer=tokenizer, protocol=protocol)
        ranks[way] = []
        for first in range(0, len(asked), 64):
            part = [item["question"] for item in asked[first : first + 64]]
            for found, wanted in zip(searcher.rankings("router", part, max(AT)), gold[first : first + 64], strict=True):
                places = [place for place, _ in found]
                ranks[way].append(next((rank for rank, place in enumerate(places) if place in wanted), max(AT)))
    for name in arguments.sets.split(","):
        numbers = [number for number, item in enumerate(asked) if item["set"] == name]
        for at in AT:
            plain, narrow = ([ranks[way][number] < at for number in numbers] for way in ("plain", "fp8"))
            lost = sum(one and not other for one, other in zip(plain, narrow, strict=True))
            won = sum(other and not one for one, other in zip(plain, narrow, strict=True))
            figures[f"{name}, R@{at}"] = {
                "questions": len(numbers),
                "plain": round(sum(plain) / max(len(numbers), 1), 4),
                "fp8": round(sum(narrow) / max(len(numbers), 1), 4),
                "won": won,
                "lost": lost,
            }
    for what, value in figures.items():
        print(f"{what:32} {value:,.0f}" if isinstance(value, float) else f"{what:32} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
