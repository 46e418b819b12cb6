"""One of two processes that train together, which fails where they differ from one."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from setups import batch_of, setup, tokens
from steps import assert_same_gradients, four, gradients
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def halves(plain: bool) -> list[dict[str, Any]]:
    """The questions of each process; `plain`: those of the second without documents."""
    first, second = (four().only(*part).pool() for part in ((0, 1), (2, 3)))
    if plain:
        second = {name: second[name] for name in ("input_ids", "attention_mask", "labels")}
    return [first, second]


def expected_gradients(model: Any, parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The mean of what the halves give in one process."""
    found = [gradients(model, model(**part).loss) for part in parts]
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = setup(score_bias=True, answer_loss_weight=0.5, memory_layers=[0, 2, 3], aux_layers=[2]).model.train()
    spread = DistributedDataParallel(copy.deepcopy(whole))
    parted = copy.deepcopy(whole)
    for layer in parted.model.layers:
        fully_shard(layer)
    fully_shard(parted)
    for plain in (False, True, False):
        parts = halves(plain)
        expected = expected_gradients(whole, parts)
        found = gradients(spread, spread(**parts[rank]).loss)
        assert_same_gradients({name.removeprefix("module."): part for name, part in found.items()}, expected)
        found = gradients(parted, parted(**parts[0 if plain else rank]).loss)  # FSDP's processes run the same layers
        if plain:
            expected = gradients(whole, whole(**parts[0]).loss)
        together = {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}
        assert_same_gradients(together, expected)
    documents = four().documents
    bank = whole.eval().encode_documents(documents, show_progress=False)
    ours = parted.eval().encode_documents(documents, show_progress=False)
    questions = batch_of(tokens(6, 3, 9, seed=5))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(
        parted.generate(**questions, memory=ours, **options), whole.generate(**questions, memory=bank, **options)
    )
    dist.destroy_process_group()
