"""The forked processes of the tests take nothing along that their parent waits for."""

import os
import signal

from forking import ended, forked
from tqdm.auto import tqdm
from tqdm.std import TqdmDefaultWriteLock


def test_a_child_that_is_killed_beside_a_progress_bar_holds_up_nobody() -> None:
    with open(os.devnull, "w") as nowhere:
        tqdm(total=1, file=nowhere).close()

    def work() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(work)) == [-signal.SIGKILL]
    shared = TqdmDefaultWriteLock.mp_lock
    assert shared.acquire(timeout=5)
    shared.release()
