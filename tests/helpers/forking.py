"""Work in a forked process: the imports are there already, which a process of its own would spend seconds on."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

LIMIT = 240


def forked(work: Callable[[], object], streams: Sequence[int] = ()) -> int:
    """The number of a process that does some work and ends, after `LIMIT` seconds at the latest.

    Args:
        streams: descriptors that are its input, output and errors, and all that it has; default those of this process.
    """
    # What a test before left behind must not be taken apart in the child: a process group would wait for threads that
    # the child does not have.
    gc.collect()
    if (child := os.fork()) == 0:
        gc.freeze()
        code = 1
        try:
            signal.alarm(LIMIT)
            _have_threads()
            _share_no_lock()
            if streams:
                _take(*streams)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def _have_threads() -> None:
    """Make torch's pool of threads anew before there are others: the first two that miss it would race for it, and one
    find none ("Invalid thread pool!")."""
    torch.set_num_threads(torch.get_num_threads())


def _share_no_lock() -> None:
    """Give progress bars a lock of this process: theirs goes across forks, and a child that is killed keeps it."""
    classes, lock = [tqdm], threading.RLock()
    for bar in classes:
        bar.set_lock(lock)
        classes += bar.__subclasses__()


def _take(*streams: int) -> None:
    for place, descriptor in enumerate(streams):
        os.dup2(descriptor, place)
    os.closerange(len(streams), os.sysconf("SC_OPEN_MAX"))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(place, "w", buffering=1, closefd=False) for place in (1, 2))


def ended(*children: int) -> list[int]:
    """The exit codes of processes, waited for."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
