"""Measure a coarse index of routing keys: clusters, of which a question reads a few, against reading all keys.

    python benchmarks/bench_coarse.py keys model_cards/msa-hf-tiny --invented 40000 --out tiny.pt
    python benchmarks/bench_coarse.py keys SMOLLM2 --passages PASSAGES --questions QUESTIONS --out smollm2.pt
    python benchmarks/bench_coarse.py probe tiny.pt --sizes 250k 1M 4M --out coarse.json
    python benchmarks/bench_coarse.py crossover coarse.json

`keys` encodes documents and keeps the routing keys of every memory layer, and the router queries of every routing token
of questions about them. `probe` clusters the keys of a layer by k-means, lets a question read the clusters whose
centers score best for any of its tokens, and compares the documents found with those of all keys. `crossover` says from
which size on reading clusters costs less than reading everything.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from msa_hf import MSAForCausalLM
from msa_hf.bank.coarse import cluster_keys
from msa_hf.cli import sizes
from msa_hf.data.padding import pad
from msa_hf.evaluation import make_corpus
from msa_hf.generation import PromptProtocol
from msa_hf.generation.prompting import prompting_of
from msa_hf.model import attention_msa
from msa_hf.model.routing_msa import reduce_queries

K = 16  # documents that a layer attends to
PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# One H200 (docs/performance.md): keys of 1,024 bfloat16 numbers, 1,562,500 chunks in 0.744 ms.
BYTES_PER_MS = 1_562_500 * 2048 / 0.744
LAUNCHES_MS = 0.03  # three further kernels: score centers, choose the best, list their chunks
WANTED = 0.99


# keys -----------------------------------------------------------------------------------------------------------------


def texts_and_questions(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Documents and questions: of an invented world, or of files with one JSON object a line."""
    if arguments.invented:
        corpus = make_corpus(arguments.invented, seed=99, split="test", prose_share=0.0)
        return corpus.texts(), [item.text for item in corpus.questions(arguments.asked, "one_hop", seed=4)]
    texts = torch.load(arguments.passages, weights_only=True) if arguments.passages.suffix != ".jsonl" else None
    if texts is None:
        texts = [json.loads(line)["text"] for line in arguments.passages.open(encoding="utf-8")]
    asked = [json.loads(line)["question"] for line in arguments.questions.open(encoding="utf-8")]
    return list(texts[: arguments.documents]), asked[: arguments.asked]


def keep_keys(arguments: argparse.Namespace) -> None:
    """Encode documents; keep their routing keys, and the queries of questions."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = MSAForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    protocol = PromptProtocol.from_pretrained(arguments.model)
    texts, asked = texts_and_questions(arguments)
    start = time.time()
    rows = protocol.encode_corpus(texts, tokenizer)
    bank = model.encode_documents(rows, tokenizer, batch_tokens=arguments.batch_tokens)
    seconds = time.time() - start
    print(f"{len(bank)} documents, {bank.num_tokens} tokens, {bank.num_chunks} chunks in {seconds:.0f} s", flush=True)
    prompting = prompting_of(tokenizer, protocol)
    found: dict[int, list[Tensor]] = {layer: [] for layer in model.config.memory_layers}
    for question in asked:
        for layer, queries in queries_of(model, bank, prompting.prompt(question)).items():
            found[layer].append(queries)
    torch.save(
        {
            "keys": {layer: memory.routing_keys.bfloat16() for layer, memory in bank.layers.items()},
            "queries": found,
            "offsets": bank.offsets,
            "tokens": torch.tensor([document.tokens for document in bank.documents]),
            "model": str(arguments.model),
        },
        arguments.out,
    )


@torch.no_grad()
def queries_of(model: Any, bank: Any, prompt: Any) -> dict[int, Tensor]:
    """Layer -> [T, G * D] float32, vectors of the routing tokens whose inner product with a routing key is a score."""
    found: list[Tensor] = []
    route = attention_msa.OPERATIONS["route_documents"]

    def recorded(queries: Tensor, mask: Tensor, keys: Tensor, offsets: Tensor, *rest: Any, **options: Any) -> Any:
        groups = keys.shape[1] // queries.shape[-1]
        found.append(reduce_queries(queries, groups, options["similarity"]).flatten(2)[mask])
        return route(queries, mask, keys, offsets, *rest, **options)

    attention_msa.OPERATIONS["route_documents"] = recorded
    try:
        ids = pad([prompt.input_ids], 0)
        routes = pad([[int(item) for item in prompt.routes]], 0).bool()
        model(input_ids=ids, routing_mask=routes, memory=bank, logits_to_keep=1, use_cache=False)
    finally:
        attention_msa.OPERATIONS["route_documents"] = route
    return dict(zip(model.config.memory_layers, found, strict=True))


# probe ----------------------------------------------------------------------------------------------------------------


def document_scores(scores: Tensor, owners: Tensor, documents: int) -> Tensor:
    """[N] the best score of any chunk of a document, -inf for a document without one."""
    return torch.full((documents,), -math.inf).scatter_reduce_(0, owners, scores, "amax")


def probe_layer(keys: Tensor, owners: Tensor, queries: Sequence[Tensor], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Recall of reading clusters, for numbers of clusters and of probes.

    Returns:
        one row for each: clusters, probes, the share of chunks read, recall@16 and @1 of what all keys give.
    """
    documents = int(owners[-1]) + 1
    exact = [document_scores((queries_ @ keys.T).amax(0), owners, documents).topk(K).indices for queries_ in queries]
    rows = []
    for count in counts:
        start = time.time()
        centers, nearest = cluster_keys(keys, count)
        seconds = time.time() - start
        sizes = torch.bincount(nearest, minlength=count)
        probes = [number for number in PROBES if number < count]
        found: dict[int, list[tuple[float, float, float]]] = {number: [] for number in probes}
        for vectors, best in zip(queries, exact, strict=True):
            order = (vectors @ centers.T).amax(0).argsort(descending=True)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(count)
            scores, of_chunk = (vectors @ keys.T).amax(0), rank[nearest]
            for number in probes:
                seen = of_chunk < number
                ranked = document_scores(scores[seen], owners[seen], documents).topk(K)
                chosen = {place for place, score in zip(*map(Tensor.tolist, ranked[::-1]), strict=True) if score > -9}
                share = float(sizes[order[:number]].sum()) / len(keys)
                found[number].append((len(chosen & set(best.tolist())) / K, float(int(best[0]) in chosen), share))
        for number, items in found.items():
            recall, first, share = (sum(column) / len(items) for column in zip(*items, strict=True))
            rows.append({"clusters": count, "probes": number, "share": share, "recall@16": recall, "recall@1": first})
            rows[-1]["seconds"] = round(seconds, 2)
    return rows


def probe(arguments: argparse.Namespace) -> None:
    """Recall of clusters in nested parts of a bank."""
    kept = torch.load(arguments.keys, weights_only=True)
    ends, offsets = kept["tokens"].cumsum(0), kept["offsets"]
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for size in arguments.sizes:
        documents = int((ends <= size).sum())
        chunks = int(offsets[documents])
        owners = torch.arange(documents).repeat_interleave(offsets[: documents + 1].diff())
        counts = sorted({2 ** round(math.log2(math.sqrt(chunks)) + step) for step in arguments.steps})
        for layer, keys in kept["keys"].items():
            if arguments.layers and layer not in arguments.layers:
                continue
            queries = [item.float() for item in kept["queries"][layer][: arguments.asked]]
            for row in probe_layer(keys[:chunks].float(), owners, queries, counts):
                fields = {"model": kept["model"], "layer": layer, "tokens": int(ends[documents - 1]), "chunks": chunks}
                report.append({**fields, "width": keys.shape[1], "questions": len(queries), **row})
            print(f"{kept['model']} layer {layer} {size}:", cheapest(report, layer, chunks), flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def cheapest(rows: Sequence[dict[str, Any]], layer: int, chunks: int, wanted: float = WANTED) -> dict[str, Any] | None:
    """The clusters and probes that reach the wanted recall and read least, centers counted."""
    fitting = [row for row in rows if (row["layer"], row["chunks"]) == (layer, chunks) and row["recall@16"] >= wanted]
    return min(fitting, key=lambda row: row["share"] + row["clusters"] / chunks, default=None)


# crossover ------------------------------------------------------------------------------------------------------------


def milliseconds(chunks: float, width: int, share: float, clusters: float) -> float:
    """Time of one layer on one H200: what is read over the rate of its memory, and the launches beside."""
    return (clusters + share * chunks) * width * 2 / BYTES_PER_MS + LAUNCHES_MS


def crossover(arguments: argparse.Namespace) -> None:
    """Print, for every model and layer, the cheapest way to the wanted recall, and from which size on it pays."""
    rows = json.loads(arguments.report.read_text())
    for key in sorted({(row["model"], row["layer"], row["chunks"]) for row in rows}):
        of_bank = [row for row in rows if (row["model"], row["layer"], row["chunks"]) == key]
        for wanted in arguments.recall:
            best = cheapest(of_bank, key[1], key[2], wanted)
            if best is None:
                print(*key, f"recall {wanted}: not reached by {max(row['recall@16'] for row in of_bank):.3f}")
                continue
            found = [
                f"width {width}: from {tokens_of(best, width, growing):,.0f} tokens if {how}"
                for width in (best["width"], *arguments.widths)
                for growing, how in ((True, "the share of chunks stays"), (False, "the number of probes stays"))
            ]
            print(
                *key,
                f"recall {wanted}: {best['clusters']} clusters, {best['probes']} probes, {best['share']:.3f} of the "
                f"chunks read ({best['recall@16']:.3f}); " + "; ".join(found),
            )


def tokens_of(best: dict[str, Any], width: int, growing: bool) -> float:
    """The smallest bank, in tokens, in which reading clusters costs less than reading all keys; infinite for none."""
    sizes = (10 ** (3 + step / 20) for step in range(160))
    chunks = next((size for size in sizes if saves(best, size, width, growing)), math.inf)
    return chunks * best["tokens"] / best["chunks"]


def saves(best: dict[str, Any], chunks: float, width: int, growing: bool) -> bool:
    """Tell whether clusters cost less in a bank of so many chunks; their number grows as the root of it.

    Args:
        growing: questions read the share of the chunks that was measured; else as many clusters as were measured.
    """
    root = math.sqrt(chunks / best["chunks"])
    share = best["share"] if growing or root < 1 else best["share"] / root
    return milliseconds(chunks, width, share, best["clusters"] * root) < chunks * width * 2 / BYTES_PER_MS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("keys", help=keep_keys.__doc__)
    made.set_defaults(run=keep_keys)
    made.add_argument("model")
    made.add_argument("--invented", type=int, help="documents of an invented world")
    made.add_argument("--passages", type=Path, help="else: a list of texts (.texts), or text of each line (.jsonl)")
    made.add_argument("--questions", type=Path, help="question of each line (.jsonl)")
    made.add_argument("--documents", type=int, help="passages at most")
    made.add_argument("--asked", type=int, default=100, help="questions")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--batch-tokens", type=int, default=3072)
    made.add_argument("--out", type=Path, required=True)
    made = commands.add_parser("probe", help=probe.__doc__)
    made.set_defaults(run=probe)
    made.add_argument("keys", type=Path)
    made.add_argument("--sizes", type=sizes.count, nargs="+", default=[1_000_000], help="tokens")
    made.add_argument("--layers", type=int, nargs="+")
    made.add_argument("--asked", type=int, default=100)
    made.add_argument("--steps", type=int, nargs="+", default=[-1, 1, 2], help="clusters: root of chunks, times 2^step")
    made.add_argument("--out", type=Path, required=True)
    made = commands.add_parser("crossover", help=crossover.__doc__)
    made.set_defaults(run=crossover)
    made.add_argument("report", type=Path)
    made.add_argument("--widths", type=int, nargs="*", default=[1024], help="of routing keys of other models")
    made.add_argument("--recall", type=float, nargs="+", default=[0.9, 0.95, WANTED])
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
