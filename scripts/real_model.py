"""The model that `train_real.py` trains and `eval_real.py` measures, what it keeps of passages, and its recall."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from real_data import sets_among
from real_rows import Flat
from torch import Tensor

from msa_hf import MSAForCausalLM
from msa_hf.generation import PromptProtocol
from msa_hf.model.memory_msa import DenseLayer
from msa_hf.training.contrastive import encode_rows, route_rows
from msa_hf.training.sharing import gather_rows
from msa_hf.training.weights import TrainedWeights, linear_ranks

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MEASURED = ("nq", "squad11", "squadshifts_newwiki", "fairytaleqa", "multihop")
NOT_FOUND = "not in memory"
PROTOCOL = PromptProtocol(
    document="{text}{id!s:.0}",  # routers choose; no model reads ids from this memory
    prompt=(("{question}\n", True),),
    id_format="[{id}]",
    ids_end="\n",
    block_item="[{id}]\n{text}\n",
    block_end="---\n",
    retrieval_end="Question:",
    restated=" {question}\nAnswer:",
    answer_opening=" ",
    answer_end="<|im_end|>",
    special_tokens=("<|im_end|>",),
)


def fresh_model(arguments: argparse.Namespace, where: torch.device) -> Any:
    """The base with a memory, its routers untrained."""
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = MSAForCausalLM.from_base(
        arguments.base,
        memory_layers=[int(layer) for layer in arguments.layers.split(",")],
        query_reduction="last",
        similarity=arguments.similarity,
        chunk_size=arguments.chunk,
        score_bias=True,
        aux_temperature=0.05,
        dtype=dtype,
    )
    return model.to(where).eval()


def trained_weights(arguments: argparse.Namespace, model: Any) -> TrainedWeights:
    """What is trained: low-rank updates up to and above the last memory layer, and the routers whole."""
    last = model.config.memory_layers[-1]
    ranks = {
        layer: arguments.rank if layer < last else arguments.upper_rank
        for layer in range(model.config.num_hidden_layers)
    }
    whole = [name for name, _ in model.named_parameters() if "router_" in name]
    return TrainedWeights(model, linear_ranks(model, {layer: rank for layer, rank in ranks.items() if rank}), whole)


def load_trained(path: Any, base: str, where: torch.device) -> Any:
    """The model with the weights of a checkpoint that training wrote."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # Checkpoints from before these options say nothing of them.
    made = argparse.Namespace(**{"similarity": "cosine", "chunk": 64, **checkpoint["arguments"], "base": base})
    model = fresh_model(made, where)
    weights = {name: value.to(where).float() for name, value in checkpoint["weights"].items()}
    trained_weights(made, model).load_state_dict(weights)
    return model


def load_start(start: str, base: str, where: torch.device) -> Any:
    """The model with the weights of a checkpoint or of an adapter's directory, merged."""
    if not Path(start).is_dir():
        return load_trained(start, base, where)
    fields = json.loads(Path(start, "memory.json").read_text())
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = MSAForCausalLM.from_base(base, **fields, dtype=dtype).to(where)
    return PeftModel.from_pretrained(model, start).merge_and_unload().eval()


@torch.no_grad()
def encode_all(model: Any, flat: Flat, budget: int, group: dist.ProcessGroup | None = None) -> dict[int, DenseLayer]:
    """What the memory layers keep of all passages, in order; of the last layer, to which nothing attends while
    questions are routed, only the routing keys.

    Args:
        budget: tokens encoded at a time.
        group: of processes that divide the passages among them; all of them get everything.
    """
    size, last = model.config.chunk_size, model.config.memory_layers[-1]
    parts: dict[int, list[DenseLayer]] = {layer: [] for layer in model.config.memory_layers}
    owners = []
    mine = torch.arange(len(flat.lengths), device=flat.lengths.device) if group is None else flat.share()
    for places, rows in flat.parts(mine, budget):
        for layer, memory in encode_rows(model, rows).items():
            content = memory.pooled_kv[:, :, :0] if layer == last else memory.pooled_kv
            parts[layer].append(DenseLayer(memory.routing_keys, content))
        owners.append(places.repeat_interleave((rows.lengths + size - 1) // size))
    order = torch.cat(owners).argsort(stable=True)
    found = {}
    for layer, items in parts.items():
        keys = torch.cat([part.routing_keys for part in items])[order]
        content = torch.cat([part.pooled_kv for part in items])[order]
        if layer != last:
            content = gather_rows(content, group)
        keys = gather_rows(keys, group)
        found[layer] = DenseLayer(keys, content if layer != last else keys.new_zeros(len(keys), *content.shape[1:]))
    return found


@torch.no_grad()
def measure(
    model: Any,
    passages: Flat,
    dev: dict[str, Any],
    budget: int,
    limit: int = 400,
    sets: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, float]]:
    """Set -> recall at 1 and 10 of any gold passage, by the sum of the layers' scores, among all passages given."""
    where = passages.lengths.device
    pool = encode_all(model, passages, budget, group)
    flat = Flat(dev["tokens"], dev["lengths"]).to(where)
    found = {}
    for name in sets_among({item["set"] for item in dev["questions"]}, MEASURED) if sets is None else sets:
        numbers = [n for n, item in enumerate(dev["questions"]) if item["set"] == name][:limit]
        if not numbers:
            continue
        ranks = []
        for start in range(0, len(numbers), 100):
            some = numbers[start : start + 100]
            scores = route_rows(model, flat.rows(torch.tensor(some, device=where)), pool, passages.lengths)
            best = total_scores(scores).topk(min(10, len(passages.lengths)), dim=1).indices.tolist()
            for number, row in zip(some, best, strict=True):
                gold = {place for group_ in dev["questions"][number]["wanted"] for place in group_}
                ranks.append(next((rank for rank, place in enumerate(row) if place in gold), 10))
        found[name] = {
            "@1": sum(rank < 1 for rank in ranks) / len(ranks),
            "@10": sum(rank < 10 for rank in ranks) / len(ranks),
        }
    return found


def total_scores(scores: dict[int, Tensor]) -> Tensor:
    """The sum over layers, [Q, N]."""
    return torch.stack(list(scores.values())).sum(0)


def shown(figures: dict[str, dict[str, float]]) -> str:
    return "  ".join(f"{name} {item['@1']:.3f}/{item['@10']:.3f}" for name, item in figures.items())
