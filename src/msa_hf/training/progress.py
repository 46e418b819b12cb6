"""Progress bars of the phases of a run, on a terminal alone: from their beginning, and gone with their end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def phase(what: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show how far a phase is; the function that it is told by, with what has been done since.

    Args:
        what: is done, as a participle: `"encoding passages"`.
        total: of the units, all of them.
        unit: of what is counted, as a singular.
    """
    # Of several processes the first one speaks.
    disable = None if os.environ.get("RANK", "0") == "0" else True
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, disable=disable) as bar:
        yield bar.update
