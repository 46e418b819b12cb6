"""One of two processes that share a pool, which fails if their gradients are not one's."""

import torch
import torch.distributed as dist
from families import base_model

from msa_hf import MSAForCausalLM
from msa_hf.training.contrastive import (
    Temperatures,
    TokenRows,
    contrastive_step,
    encode_rows,
    pool_loss,
    route_rows,
    soft_targets,
)

DOCUMENTS = ([3, 4, 9, 12, 5], [8, 1, 11, 7])
QUESTIONS = ([4, 2], [6, 5, 3])
GOLD = ([0, 7], [4, 8, 2])  # in both processes some are the other's


def rows_of(lengths: list[int], seed: int) -> TokenRows:
    torch.manual_seed(seed)
    counts = torch.tensor(lengths)
    ids = torch.randint(3, 128, (len(lengths), 12))
    return TokenRows(ids.masked_fill(torch.arange(12) >= counts[:, None], 0), counts)


def targets_of(gold: list[int]) -> torch.Tensor:
    positives = torch.zeros(len(gold), 9, dtype=torch.bool)
    positives[torch.arange(len(gold)), torch.tensor(gold)] = True
    return soft_targets(positives, None)


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = MSAForCausalLM.from_base(
        base_model("llama"), chunk_size=4, top_k=3, query_reduction="last", score_bias=True
    ).eval()
    temperatures = Temperatures(len(model.config.memory_layers))
    documents = [rows_of(lengths, 10 + place) for place, lengths in enumerate(DOCUMENTS)]
    questions = [rows_of(lengths, 20 + place) for place, lengths in enumerate(QUESTIONS)]

    # One process: the mean of both losses over the pool of both.
    both = TokenRows(torch.cat([part.ids for part in documents]), torch.cat([part.lengths for part in documents]))
    pool = encode_rows(model, both)
    losses = [
        pool_loss(route_rows(model, part, pool, both.lengths), targets_of(gold), temperatures())
        for part, gold in zip(questions, GOLD, strict=True)
    ]
    (sum(losses) / 2).backward()
    expected = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    model.zero_grad(set_to_none=True)

    mine = documents[rank]
    halves = [TokenRows(mine.ids[:2], mine.lengths[:2]), TokenRows(mine.ids[2:], mine.lengths[2:])]
    result = contrastive_step(
        model, halves, [questions[rank]], targets_of(GOLD[rank]), temperatures, group=dist.group.WORLD
    )
    torch.testing.assert_close(result.loss, losses[rank].detach())
    assert torch.equal(result.lengths, both.lengths)
    for name, gradient in expected.items():
        found = dict(model.named_parameters())[name].grad
        found = torch.zeros_like(gradient) if found is None else found
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, gradient, atol=1e-5, rtol=1e-3, msg=name)
    dist.destroy_process_group()
