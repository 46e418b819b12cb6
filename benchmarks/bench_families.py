"""Every family of the battery in bfloat16 on a GPU against float32 on the CPU, and routing at the 4B shape.

    python benchmarks/bench_families.py --json docs/families.json

Per family a small random model encodes documents, routes, attends and generates on both sides. The error of the
logits stands beside the error that the plain base makes between the same two sides: the memory may cost a small
multiple of it.
Exits with 1 where a family misses that.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from families import FAMILIES, base_model

from msa_hf import MSAForCausalLM
from msa_hf.model.routing_msa import score_documents, select_documents

# A bfloat16 error of the model with memory may be this many times the base's own.
ALLOWED = 3.0
# Scores this close to the last chosen one may fall on either side of the cut in bfloat16.
TIE_MARGIN = 0.02
NEW_TOKENS = 16


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """`|ours - theirs| / |theirs|` in float32."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def selection_agrees(ours: Any, theirs: Any) -> bool:
    """Tell if every document chosen on one side alone lies within the tie margin of the float32 cut."""
    for mine, exact, scores in zip(ours.documents.cpu(), theirs.documents, theirs.document_scores, strict=True):
        cut = scores[exact[exact >= 0]].min()
        swapped = set(mine.tolist()) ^ set(exact.tolist())
        if any(abs(float(scores[document] - cut)) > TIE_MARGIN for document in swapped if document >= 0):
            return False
    return True


@torch.no_grad()
def measure(family: str, device: str, hidden: int) -> dict[str, Any]:
    """One row of figures for `family`."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "vocab_size": 1024}
    if "head_dim" in FAMILIES[family]:
        sizes["head_dim"] = hidden // 4
    # Random weights of this size keep states of order one through the layers, as training does.
    exact_base = base_model(family, scale=hidden**-0.5, **sizes)
    fast_base = copy.deepcopy(exact_base).to(device, torch.bfloat16)
    torch.manual_seed(1)
    documents = [torch.randint(3, 1024, (length,)).tolist() for length in (1, 63, 64, 65, 130, 17, 200, 40, 90, 128)]
    ids = torch.randint(3, 1024, (3, 33))
    base_error = relative_error(fast_base(ids.to(device)).logits, exact_base(ids).logits)

    exact, fast = (
        MSAForCausalLM.from_base(model, chunk_size=16, top_k=3, prefix_token_ids=[5, 6, 7])
        for model in (exact_base, fast_base)
    )
    exact_bank = exact.encode_documents(documents, show_progress=False)
    start = time.perf_counter()
    fast_bank = fast.encode_documents(documents, show_progress=False)
    encode_ms = 1e3 * (time.perf_counter() - start)
    encode_error = max(
        relative_error(fast_bank.layer(i).pooled_kv, exact_bank.layer(i).pooled_kv) for i in exact_bank.layers
    )

    theirs = exact(ids, memory=exact_bank, output_document_scores=True)
    ours = fast(ids.to(device), memory=fast_bank, output_document_scores=True)
    score_error = max(
        float((ours.routing[i].document_scores.cpu() - theirs.routing[i].document_scores).abs().max())
        for i in theirs.routing
    )
    agrees = all(selection_agrees(ours.routing[i], theirs.routing[i]) for i in theirs.routing)

    forced = torch.tensor([[0, 4, 7], [2, 3, 8], [9, 1, -1]])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = exact(ids, memory=exact_bank, force_documents=forced)
    ours = fast(ids.to(device), memory=fast_bank, force_documents=forced.to(device))
    error = relative_error(ours.logits, theirs.logits)
    told = exact.generate(ids, memory=exact_bank, force_documents=forced, **options)[:, ids.shape[1] :]
    fast.generate(ids.to(device), memory=fast_bank, force_documents=forced.to(device), **options)
    start = time.perf_counter()
    said = fast.generate(ids.to(device), memory=fast_bank, force_documents=forced.to(device), **options)
    said = said[:, ids.shape[1] :].cpu()
    seconds = time.perf_counter() - start
    # Greedy decoding follows its own past, so only tokens up to the first difference can be compared. Where the two
    # part, the exact model must have been undecided: its own best two logits within the error.
    agree = (said == told).long().cumprod(1)
    margin_at_split = split_margin(exact, exact_bank, ids, forced, told, agree)
    noise = ALLOWED * max(error, base_error) * float(theirs.logits.norm() / theirs.logits.numel() ** 0.5)
    passed = error <= ALLOWED * base_error and encode_error <= ALLOWED * base_error and agrees
    return {
        "family": family,
        "implementation": fast.config._attn_implementation,
        "memory_layers": fast.config.memory_layers,
        "base_error": base_error,
        "encode_error": encode_error,
        "logits_error": error,
        "score_error": score_error,
        "selection_agrees": agrees,
        "tokens_agree": float(agree.float().mean()),
        "split_margin": margin_at_split,
        "encode_ms": encode_ms,
        "ms_per_token": 1e3 * seconds / NEW_TOKENS,
        "passed": bool(passed and margin_at_split <= noise * 4),
    }


def split_margin(model: Any, bank: Any, ids: Any, forced: Any, told: Any, agree: Any) -> float:
    """The largest gap between the exact model's best two logits at a sample's first differing token; 0 without one."""
    worst = 0.0
    for sample in range(len(ids)):
        same = int(agree[sample].sum())
        if same == told.shape[1]:
            continue
        row = torch.cat([ids[sample], told[sample, :same]])[None]
        mask = torch.arange(row.shape[1])[None] < ids.shape[1]
        logits = model(row, memory=bank, force_documents=forced[[sample]], routing_mask=mask).logits[0, -1]
        best = logits.topk(2).values
        worst = max(worst, float(best[0] - best[1]))
    return worst


@torch.no_grad()
def measure_routing(device: str, chunks: int, layers: int, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Route `layers` layers of `chunks` chunks of 1024 numbers (8 groups of 128), documents of 16 chunks, top 16."""
    torch.manual_seed(0)
    keys = [torch.nn.functional.normalize(torch.randn(chunks, 8, 128, device=device), dim=-1) for _ in range(layers)]
    keys = [key.flatten(1).to(dtype) for key in keys]
    offsets = torch.arange(0, chunks + 1, 16, device=device)
    offsets = torch.cat([offsets, offsets.new_tensor([chunks])]).unique()
    query = torch.randn(1, tokens, 32, 128, device=device, dtype=dtype)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)

    def route() -> None:
        for key in keys:
            select_documents(score_documents(query, mask, key, offsets), 16)

    route()
    extra = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        route()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if device == "cuda":
        extra = torch.cuda.max_memory_allocated() - before
    moved = sum(key.numel() * key.element_size() for key in keys)
    seconds = sorted(times)[len(times) // 2]
    return {
        "chunks": chunks,
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "ms": 1e3 * seconds,
        "GB/s": moved / seconds / 1e9,
        "extra_MB": extra / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the models")
    parser.add_argument("--chunks", type=int, default=15625, help="chunks per layer: 15,625 are 1M tokens")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--json", type=Path, help="where to save all figures")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{name}, {versions}: bfloat16 against float32 on the CPU")
    print("| family | attention | memory layers | base error | encode | logits | scores | routed | tokens | ms/token |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for family in arguments.families:
        row = measure(family, arguments.device, arguments.hidden)
        rows.append(row)
        routed = "same" if row["selection_agrees"] else "DIFFER"
        print(
            f"| {family} | {row['implementation']} | {row['memory_layers']} | {row['base_error']:.4f} "
            f"| {row['encode_error']:.4f} | {row['logits_error']:.4f} | {row['score_error']:.4f} "
            f"| {routed} | {row['tokens_agree']:.2f} | {row['ms_per_token']:.1f} |"
            f"{'' if row['passed'] else ' MISSED'}",
            flush=True,
        )
    print("| chunks | layers | keys | tokens | ms | GB/s of keys | extra MB |\n|---|---|---|---|---|---|---|")
    routing = []
    for tokens in (32, 256, 1024):
        row = measure_routing(arguments.device, arguments.chunks, 18, torch.bfloat16, tokens)
        routing.append(row)
        print(
            "| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True
        )
    if arguments.json:
        record = {"hardware": name, "versions": versions, "families": rows, "routing": routing}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if not all(row["passed"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
