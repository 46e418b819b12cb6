"""Work in a forked process: the imports are there already, which a process of its own would spend seconds on."""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable

LIMIT = 240


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does some work and ends, after `LIMIT` seconds at the latest."""
    # What a test before left behind must not be taken apart in the child: a process group would wait for threads that
    # the child does not have.
    gc.collect()
    if (child := os.fork()) == 0:
        gc.freeze()
        code = 1
        try:
            signal.alarm(LIMIT)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(*children: int) -> list[int]:
    """The exit codes of processes, waited for."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
