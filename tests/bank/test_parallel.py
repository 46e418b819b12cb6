"""A bank shared among processes gives what it gives in one, and no process waits for ever for one that failed."""

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from setups import Setup, assert_same, batch_of, setup, tokens

from msa_hf.bank.parallel import RankFailed, ShardedBank, merge, pack, shard_bank, shares
from msa_hf.routing_msa import select_documents

LIMIT = 40.0  # seconds until a test's processes count as hung
FORK = get_context("fork")  # the models are made once, in this process


def together(size: int, work: Callable[[int], Any], dead: tuple[int, ...] = ()) -> list[Any]:
    """Run `work(rank)` in `size` connected processes; what each returned, None for those that are to die.

    Fails where a process raises, dies unasked or hangs.
    """
    with tempfile.TemporaryDirectory() as directory:
        processes, pipes = [], []
        for rank in range(size):
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_run, args=(rank, size, f"{directory}/store", work, sender), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        results: list[Any] = [None] * size
        waiting, deadline = {pipe: rank for rank, pipe in enumerate(pipes)}, time.monotonic() + LIMIT
        while waiting and (ready := wait(list(waiting), max(deadline - time.monotonic(), 0))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    assert rank in dead, f"rank {rank} died"
        for process in processes:
            process.join(5.0 if not waiting else 0.0)
            process.kill()
    assert not waiting, f"ranks {sorted(waiting.values())} hang"
    raised = [result for result in results if isinstance(result, BaseException)]
    if raised:
        raise raised[0]
    return results


def _run(rank: int, size: int, store: str, work: Callable[[int], Any], sender: Any) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = work(rank)
    except BaseException as error:
        error.add_note(f"in rank {rank}")
        result = error
    sender.send_bytes(pickle.dumps(result))
    sender.close()
    os._exit(0)  # what pytest registered to run at exit is its own


@cache
def made(documents: int = 11, **fields: Any) -> Setup:
    """A model and a bank of documents of 1 to 20 tokens in chunks of 3."""
    lengths = torch.randint(1, 21, (documents,), generator=torch.Generator().manual_seed(documents)).tolist()
    return setup(documents=tokens(*lengths, seed=documents), **{"top_k": 3, **fields})


def questions(seed: int = 5, *lengths: int) -> dict[str, torch.Tensor]:
    return batch_of(tokens(*(lengths or (6, 3, 9)), seed=seed))


@torch.no_grad()
def answers(model: Any, memory: Any, **inputs: Any) -> tuple[torch.Tensor, dict[int, tuple[Any, ...]]]:
    output = model(**inputs, memory=memory)
    routing = {layer: (found.documents, found.scores, found.document_scores) for layer, found in output.routing.items()}
    return output.logits, routing


def assert_equal(ours: Any, theirs: Any) -> None:
    """The same documents, and scores and logits up to float32's error."""
    assert ours[1].keys() == theirs[1].keys()
    assert_same(ours[0], theirs[0])
    for layer, (documents, scores, all_scores) in theirs[1].items():
        assert torch.equal(ours[1][layer][0], documents)
        torch.testing.assert_close(ours[1][layer][1], scores, atol=1e-5, rtol=1e-5)
        if all_scores is not None:
            torch.testing.assert_close(ours[1][layer][2], all_scores, atol=1e-5, rtol=1e-5)


each_size = pytest.mark.parametrize("size", [1, 2, 3, 4])


@each_size
@pytest.mark.parametrize("documents", [1, 2, 5, 11])
def test_documents_scores_and_logits_are_those_of_one_process(size: int, documents: int) -> None:
    """Also where processes have fewer documents than k, or none."""
    made_ = made(documents)
    expected = answers(made_.model, made_.bank, **questions())

    def work(rank: int) -> Any:
        with shard_bank(made_.bank) as memory:
            return answers(made_.model, memory, **questions()), memory.own_rows

    results = together(size, work)
    for result, _ in results:
        assert_equal(result, expected)
    assert [rows.start for _, rows in results] + [documents] == [0] + [rows.stop for _, rows in results]


@each_size
def test_uneven_batches_of_different_questions(size: int) -> None:
    """Process r asks r batches, of other sizes and lengths than the others' (the first asks nothing)."""
    made_ = made()
    batches = {
        rank: [questions(10 * rank + turn, *range(2 + turn, 3 + rank + 2 * turn)) for turn in range(rank)]
        for rank in range(size)
    }

    def work(rank: int) -> Any:
        with shard_bank(made_.bank, inputs="different") as memory:
            return [answers(made_.model, memory, **batch) for batch in batches[rank]]

    for rank, results in enumerate(together(size, work)):
        assert len(results) == rank
        for result, batch in zip(results, batches[rank], strict=True):
            assert_equal(result, answers(made_.model, made_.bank, **batch))
