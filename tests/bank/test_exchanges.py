"""What processes that share a bank exchange in a layer, how often, and what nobody waits for."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from connected import together
from plain_tape import PlainTape
from setups import Setup, assert_same, batch_of, setup, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from msa_hf.bank import shard_bank
from msa_hf.bank.sharded.collectives import Collectives
from msa_hf.bank.sharded.layer import ShardedLayer
from msa_hf.model import compiled_msa, document_rows_msa, recording_msa

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
QUESTION = batch_of(tokens(6, seed=5))
DOCUMENTS = tokens(*[5, 8, 13, 20] * 4, seed=3)


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch, and those by which processes exchange something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        namespace, name = str(func).split(".")[:2]
        self.found[f"{namespace}.{name}"] += 1
        return func(*args, **(kwargs or {}))

    def exchanges(self) -> dict[str, int]:
        """How often each kind of exchange was made."""
        kinds = {"allgather": "gather", "allreduce": "sum", "reduce_scatter": "sum"}
        found: Counter[str] = Counter()
        for name, count in self.found.items():
            for part, kind in kinds.items():
                if name.startswith("c10d") and part in name:
                    found[kind] += count
        return dict(found)


def layered(layers: int) -> Setup:
    return setup(
        "qwen3",
        "sdpa",
        base={"num_hidden_layers": layers},
        memory_layers=list(range(layers)),
        documents=DOCUMENTS,
        top_k=3,
    )


def counted(made: Setup, memory: Any) -> Operations:
    """The operations of a question that is asked for the second time."""
    made.model(**QUESTION, memory=memory)
    with Operations() as operations:
        made.model(**QUESTION, memory=memory)
    return operations


@pytest.mark.parametrize(
    ("content", "inputs", "exchanges", "beside"),
    [
        ("sharded", "same", {"gather": 1, "sum": 1}, 35),
        ("replicated", "same", {"gather": 1}, 26),
        ("sharded", "different", {"gather": 2, "sum": 1}, 56),
    ],
)
@torch.no_grad()
def test_a_layer_exchanges_once_and_waits_for_nothing(
    content: str, inputs: str, exchanges: dict[str, int], beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many layers: so many exchanges more, no waits, and few operations beside those of an ordinary bank."""

    def width_for(layout: Any, chosen: Tensor) -> int:
        return layout.most_rows(chosen.shape[1])

    monkeypatch.setattr(document_rows_msa.ChunkLayout, "width_for", width_for)
    made = [layered(layers) for layers in (2, 4)]

    def work(rank: int) -> Any:
        found = []
        for each in made:
            with shard_bank(each.bank, inputs=inputs, content=content) as memory, torch.no_grad():
                found.append((counted(each, memory), counted(each, each.bank)))
        return [[(item.found, item.exchanges()) for item in pair] for pair in found]

    few, many = together(2, work)[0]
    (ours, before), (theirs, alone) = ((many[i][0], few[i][1]) for i in (0, 1))
    assert not alone
    added = {name: (count - before[name]) / 2 for name, count in many[0][1].items() if count != before[name]}
    assert added == exchanges
    assert before["gather"] == 2 * exchanges["gather"] + (2 if inputs == "same" else 3)  # messages of the hosts
    waits = [sum(found[0][f"aten.{name}"] for name in WAITS) for found in (few[0], many[0])]
    assert waits[0] == waits[1]
    per_layer = [(sum(many[i][0].values()) - sum(few[i][0].values())) / 2 for i in (0, 1)]
    assert 0 < per_layer[0] - per_layer[1] <= beside


@pytest.mark.parametrize(
    ("content", "size", "inputs"), [("replicated", 3, "same"), ("replicated", 2, "different"), ("sharded", 4, "same")]
)
@torch.no_grad()
def test_rows_are_those_of_one_process_to_the_bit(content: str, size: int, inputs: str) -> None:
    """With numbers whose sign an addition would lose; and so the logits."""
    made = layered(2)
    for layer in made.bank.layers.values():
        layer.pooled_kv[::3] = -0.0
    expected = made.model(**QUESTION, memory=made.bank)

    def work(rank: int) -> Any:
        with shard_bank(made.bank, inputs=inputs, content=content) as memory, torch.no_grad():
            asked = [made.model(**QUESTION, memory=memory) for _ in range(1 + rank % 2 * (inputs == "different"))]
            contexts = asked[-1].past_key_values.contexts
            rows = {layer: (item.keys, item.values, item.row_mask) for layer, item in contexts.items()}
            return asked[-1].logits, rows, {layer: item.documents for layer, item in asked[-1].routing.items()}

    whole = expected.past_key_values.contexts
    for logits, rows, documents in together(size, work):
        assert_same(logits, expected.logits)
        for layer, (keys, values, there) in rows.items():
            assert torch.equal(documents[layer], expected.routing[layer].documents)
            for ours, theirs in ((keys, whole[layer].keys), (values, whole[layer].values)):
                real, known = ours[0][:, there[0]], theirs[0][:, whole[layer].row_mask[0]]
                assert torch.equal(real.contiguous().view(torch.int32), known.contiguous().view(torch.int32))


def test_nobody_waits_for_others_before_the_first_layer_exchanges(tmp_path: Path) -> None:
    """A process begins its forward, and comes to its first memory layer, while another one does something else."""
    made, begun = layered(2), tmp_path / "begun"

    def work(rank: int) -> Any:
        with shard_bank(made.bank) as memory, torch.no_grad():
            made.model(**QUESTION, memory=memory)
            if rank == 0:
                made.model.base_model.layers[0].register_forward_pre_hook(lambda *_: begun.touch())
            else:
                deadline = time.monotonic() + 20
                while not begun.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
            there = begun.exists()
            made.model(**QUESTION, memory=memory)
        return there

    assert together(2, work)[1], "the first waits for the second before its first layer"


@pytest.mark.parametrize("content", ["sharded", "replicated"])
def test_layers_and_their_exchanges_are_recorded(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth question on they are played; one that the others do not ask is refused, and not played."""
    config = CompileConfig()
    config._compile_all_devices = True
    monkeypatch.setattr(recording_msa, "tape_for", lambda device: PlainTape())
    monkeypatch.setattr(compiled_msa, "is_recordable", lambda model: True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(
        document_rows_msa.ChunkLayout, "width_for", lambda layout, chosen: layout.known_width(*chosen.shape)
    )
    monkeypatch.setattr(Collectives, "is_queued_on", lambda ranks, device: True)
    made, exactly = layered(2), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    recorded = {"cache_implementation": "static", "compile_config": config}
    routed: list[int] = []
    route = ShardedLayer.route
    monkeypatch.setattr(ShardedLayer, "route", lambda *args: (routed.append(1), route(*args))[1])

    def work(rank: int) -> Any:
        found = []
        with shard_bank(made.bank, content=content) as memory:
            for seed in range(6):
                routed.clear()
                question = batch_of(tokens(9, seed=seed))
                answer = made.model.generate(**question, memory=memory, **exactly, **recorded)
                found.append((answer.tolist(), len(routed)))
            with pytest.raises(ValueError, match="same inputs"):
                other = batch_of(tokens(9, seed=10 + rank))
                made.model.generate(**other, memory=memory, **exactly, **recorded)
        return found

    expected = [
        made.model.generate(**batch_of(tokens(9, seed=seed)), memory=made.bank, **exactly).tolist() for seed in range(6)
    ]
    for found in together(2, work):
        assert [answer for answer, _ in found] == expected
        assert [count for _, count in found] == [2, 2, 2, 0, 0, 0]


def test_what_content_cannot_be_is_refused(tmp_path: Any) -> None:
    made = layered(2)
    with pytest.raises(ValueError, match="must be one of"):
        shard_bank(made.bank, content="elsewhere")
    with pytest.raises(ValueError, match="host_bank"):
        shard_bank(tmp_path, content="replicated")
