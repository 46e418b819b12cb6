"""Exact match and recall of a small checkpoint on held-out names, by Memory Interleave with `select="router"`.

python scripts/eval_tiny.py build/tiny/memory --documents 1000 --questions 300
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.evaluation import exact_match, make_corpus
from msa_hf.evaluation.prose import prose_documents
from msa_hf.generation import COMPACT, MemoryInterleave


@torch.no_grad()
def first_round_recall(model: Any, tokenizer: Any, bank: Any, questions: list[Any]) -> dict[int, tuple[float, float]]:
    """Layer -> shares of questions whose first document is among the chosen, and is the first of them."""
    found: dict[int, list[torch.Tensor]] = {}
    for start in range(0, len(questions), 50):
        part = questions[start : start + 50]
        batch = tokenizer([question.text + "<|ids|>" for question in part], return_tensors="pt", padding=True)
        batch = batch.to(model.device)
        routing_mask = batch["attention_mask"].bool()
        routing_mask[:, -1] = False  # the marker does not route
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            memory=bank,
            routing_mask=routing_mask,
        )
        gold = torch.tensor([question.positives[0] for question in part], device=model.device)[:, None]
        for layer, routing in output.routing.items():
            found.setdefault(layer, []).append((routing.documents == gold).cpu())
    hits = {layer: torch.cat(parts).float() for layer, parts in found.items()}
    return {layer: (float(hit.amax(1).mean()), float(hit[:, 0].mean())) for layer, hit in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=300, help="of each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, padding_side="left")
    model = MSAForCausalLM.from_pretrained(arguments.checkpoint, dtype=dtype).eval().to(arguments.device)
    protocol = replace(COMPACT, answer_opening=" ")
    prose = prose_documents(300, seed=9, words=55)
    corpus = make_corpus(arguments.documents, seed=99, split="test", prose=prose, prose_share=0.2)
    rows = protocol.encode_corpus(corpus.texts(), tokenizer)
    bank = model.encode_documents(rows, tokenizer, show_progress=False, batch_tokens=131_072)
    print(bank, flush=True)

    one_hop = corpus.questions(arguments.questions, "one_hop", seed=4)
    for layer, (among, first) in first_round_recall(model, tokenizer, bank, one_hop).items():
        print(f"layer {layer}: recall@{model.config.top_k} {among:.3f}, @1 {first:.3f}", flush=True)
    for rounds, kind in ((2, "one_hop"), (2, "two_hop"), (1, "two_hop"), (2, "unanswerable")):
        interleave = MemoryInterleave(model, tokenizer, bank, protocol=protocol, max_rounds=rounds, select="router")
        questions = corpus.questions(arguments.questions, kind, seed=4)
        answers = interleave.ask([question.text for question in questions], max_new_tokens=20, batch_size=150)
        right = sum(exact_match(a.text, q.answer) for a, q in zip(answers, questions, strict=True))
        print(f"{kind}, {rounds} rounds: exact match {right / len(questions):.3f}", flush=True)


if __name__ == "__main__":
    main()
