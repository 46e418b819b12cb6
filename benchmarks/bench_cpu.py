"""A question over a bank on one CPU core: the first token, and a token behind it.

    python benchmarks/bench_cpu.py model_cards/msa-hf-tiny
    python benchmarks/bench_cpu.py CHECKPOINT --document-tokens 200 --repeats 7

A few random documents are encoded and repeated up to `--bank-tokens`, so that routing sees its true size. Medians,
float32.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from bench_model import repeated

from msa_hf import MSAForCausalLM

STEPS = 16  # tokens behind the first, by which the time of one is measured


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint with a memory")
    parser.add_argument("--bank-tokens", type=float, default=1e6)
    parser.add_argument("--documents", type=int, default=40, help="that are encoded")
    parser.add_argument("--document-tokens", type=int, default=100)
    parser.add_argument("--question", type=int, default=48, help="tokens of the question")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = MSAForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = torch.randint(10, 4000, (arguments.documents, arguments.document_tokens)).tolist()
    bank = model.encode_documents(texts, show_progress=False)
    bank = repeated(bank, max(round(arguments.bank_tokens / bank.num_tokens), 1))
    ids = torch.randint(10, 4000, (1, arguments.question))

    def median_ms(tokens: int) -> float:
        times = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            model.generate(ids, memory=bank, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            times.append(1e3 * (time.perf_counter() - start))
        return sorted(times)[len(times) // 2]

    median_ms(2)
    first, whole = median_ms(1), median_ms(1 + STEPS)
    token = (whole - first) / STEPS
    print(json.dumps({"tokens": bank.num_tokens, "first_token_ms": round(first, 1), "token_ms": round(token, 2)}))


if __name__ == "__main__":
    main()
