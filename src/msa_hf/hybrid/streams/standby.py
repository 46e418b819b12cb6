"""Waiting for the right to write a bank: a second consumer stands by until the first one is gone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...bank import BankStore

logger = logging.getLogger(__name__)


def open_when_free(
    open_bank: Callable[[], BankStore],
    patience: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    poll: float = 0.2,
) -> BankStore:
    """Open a bank to write; while another process has it, wait.

    The operating system frees a bank whose process died. Who waits reads nothing from a stream.

    Args:
        open_bank: opens it, as `lambda: BankStore(model, directory, tokenizer)`.
        patience: seconds to wait at most. Default: for ever.
        stop: asked between two tries; gives up once it is true.
        poll: seconds between two tries.

    Raises:
        BankLocked: if the other one had it for that long, naming it.
    """
    from ...bank import BankLocked

    start, told = time.monotonic(), False
    while True:
        try:
            return open_bank()
        except BankLocked as error:
            if stop() or (patience is not None and time.monotonic() - start > patience):
                raise
            if not told:
                logger.warning("Standing by: %s", error)
                told = True
        time.sleep(poll)
