"""Work done in several connected processes, forked from this one."""

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any

import torch.distributed as dist

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
