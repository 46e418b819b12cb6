"""Encoding, question and decoding speed of a model with a memory, random weights, beside its base.

    python benchmarks/bench_model.py --json docs/bench_model.json

Documents are encoded for real; the bank is then repeated up to `--bank-tokens`, so that routing sees its true size.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from msa_hf import MemoryBank, MSAForCausalLM
from msa_hf.model.memory_msa import DenseLayer, Document, DocumentTable

SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}


def median_ms(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median wall-clock milliseconds of `run`, the device drained before and after."""
    run()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[repeats // 2]


def repeated(bank: MemoryBank, times: int) -> MemoryBank:
    """The same bank `times` times over."""
    counts = bank.offsets.diff().repeat(times)
    rows = [
        Document(f"{copy}-{document.key}", None, None, document.tokens, document.chunks)
        for copy in range(times)
        for document in bank.documents
    ]
    return MemoryBank(
        layers={
            layer: DenseLayer(memory.routing_keys.repeat(times, 1), memory.pooled_kv.repeat(times, 1, 1, 1))
            for layer, memory in bank.layers.items()
        },
        offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        prefix=bank.prefix,
        documents=DocumentTable(rows),
        origin=bank.origin,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="4b")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per document")
    parser.add_argument("--bank-tokens", type=int, default=1_048_576)
    parser.add_argument("--question", type=int, default=48, help="tokens of the question")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = arguments.device

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", max_position_embeddings=4096, **SHAPES[arguments.shape])
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    vocabulary = config.vocab_size
    ids = torch.randint(3, vocabulary, (1, arguments.question), device=device)
    repeats = 7

    def decode(model: Any, steps: int, **kwargs: Any) -> float:
        def run(count: int) -> float:
            options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return median_ms(lambda: model.generate(ids, **options, **kwargs), device, 3)

        return (run(steps + 1) - run(1)) / steps

    figures: dict[str, Any] = {"base_prefill_ms": median_ms(lambda: base(ids), device, repeats)}
    figures["base_ms_per_token"] = decode(base, 32)

    model = MSAForCausalLM.from_base(base, prefix_token_ids=[5, 6, 7])
    documents = torch.randint(3, vocabulary, (arguments.documents, arguments.tokens)).tolist()
    model.encode_documents(documents[:32], show_progress=False)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    bank = model.encode_documents(documents, show_progress=False)
    if device == "cuda":
        torch.cuda.synchronize()
        figures["encode_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    figures["encode_tokens_per_s"] = bank.num_tokens / (time.perf_counter() - start)
    big = repeated(bank, max(arguments.bank_tokens // bank.num_tokens, 1))
    model.accept_bank(big)
    figures["bank"] = repr(big)

    figures["prefill_ms"] = median_ms(lambda: model(ids, memory=big, logits_to_keep=1), device, repeats)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, memory=big, logits_to_keep=1)
        figures["prefill_extra_MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    figures["ms_per_token"] = decode(model, 32, memory=big)

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    record = {
        "hardware": name,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "figures": figures,
    }
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
