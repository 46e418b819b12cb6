"""Work beside the model while a corpus is encoded: reading and tokenizing ahead of it, writing behind it.

Reading is Python for the most part. Beside a GPU it is done by processes: a thread would hold Python's lock while the
model waits for it to launch its next kernel. Writing waits for copies, checksums and the disk, which hold no lock, and
is done by a thread. Beside a model on the CPU neither gains anything: both need the cores that the model computes on.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch

from ..user_errors import UserError
from .corpus_parts import Part, Record
from .corpus_rows import PartRows, RowReader

WORKERS = 3  # beside a GPU: a core tokenizes about 400,000 tokens a second
AHEAD = 2  # parts that are read ahead, besides one for every worker
BEHIND = 2  # parts that are written, or wait for it, while the next one is encoded

# Reading ahead --------------------------------------------------------------------------------------------------------


def default_workers(device: torch.device) -> int:
    """The number of processes that read ahead of a model: none beside one that computes on the cores they need."""
    if device.type == "cpu" or sys.platform != "linux":  # macOS has libraries that no forked process may use
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine that do the same
    return max(min(WORKERS, len(os.sched_getaffinity(0)) // here - 1), 0)


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods()


@contextmanager
def reading_ahead(reader: RowReader, parts: list[Part], workers: int) -> Iterator[Iterator[PartRows]]:
    """The rows of parts, in order, made by `workers` other processes ahead of being asked for; by this one where 0.

    An error about a part is raised where its rows are asked for.

    Raises:
        ValueError: for workers where processes cannot be forked.
        UserError: where a worker died.
    """
    if not workers:
        yield map(reader.rows, parts)
        return
    if not _can_fork():
        raise ValueError("This system has no way to fork processes that read ahead: leave out `workers`.")
    global _reader
    _reader = reader  # which workers inherit: a corpus holds open files, and cannot be sent
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (os.getpid(),))
    try:
        waiting = deque(pool.submit(_rows, part) for part in parts[: workers + AHEAD])
        yield _in_order(pool, waiting, iter(parts[workers + AHEAD :]))
    finally:
        pool.shutdown(cancel_futures=True)
        _reader = None


def _in_order(pool: ProcessPoolExecutor, waiting: deque[Future[PartRows]], later: Iterable[Part]) -> Iterator[PartRows]:
    later = iter(later)
    try:
        while waiting:
            yield waiting.popleft().result()
            if (part := next(later, None)) is not None:
                waiting.append(pool.submit(_rows, part))
    except BrokenProcessPool as error:
        raise UserError(
            "A process that reads and tokenizes documents ahead ended unasked; the system may have run out of memory. "
            "What was encoded is kept: run the same command again, with fewer of them (--workers 1) or none (0)."
        ) from error


_reader: RowReader | None = None  # of this process


def _rows(part: Part) -> PartRows:
    assert _reader is not None
    return _reader.rows(part)


def _begin(parent: int) -> None:
    """Prepare a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what threads the parent had are not here
    torch.set_num_threads(1)
    gc.freeze()  # what the parent has on a device is not for this process to take apart
    assert _reader is not None
    _reader.corpus.reopen()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed, and nobody wants the rows

    threading.Thread(target=watch, daemon=True).start()


# Writing behind -------------------------------------------------------------------------------------------------------


class WritingBehind:
    """Writes parts in a thread, in order, while the next ones are encoded.

    Use it in a `with` block. However that ends, what was given before is written first, unless writing itself failed.

    Args:
        write: writes a part and returns its record.
        most: parts that may be written, or wait for it, while the next one is encoded; 0: each is written at once.
    """

    def __init__(self, write: Callable[..., Record], most: int) -> None:
        self._write, self._most = write, most
        self._pool = ThreadPoolExecutor(1, "writing")
        self._waiting: deque[Future[Record]] = deque()
        self._written: list[Record] = []

    def __enter__(self) -> WritingBehind:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            while self._waiting and self._waiting[0].exception() is None:
                self._waiting.popleft()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(self, *arguments: object) -> None:
        """Have a part written; waits while more than `most` of them are.

        Raises:
            Exception: what writing this or an earlier one raised.
        """
        self._waiting.append(self._pool.submit(self._write, *arguments))
        self._take(self._most)

    def written(self, all: bool = False) -> list[Record]:
        """The records that were written since this was last asked, of `all` that were given if they are waited for.

        Raises:
            Exception: what writing one raised.
        """
        self._take(0 if all else len(self._waiting))
        while self._waiting and self._waiting[0].done():
            self._take(len(self._waiting) - 1)
        written, self._written = self._written, []
        return written

    def _take(self, left: int) -> None:
        """Wait until no more than `left` parts are waited for."""
        while len(self._waiting) > left:
            self._written.append(self._waiting.popleft().result())
