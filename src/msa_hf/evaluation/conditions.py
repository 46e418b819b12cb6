"""The conditions under which a diagnosis has questions answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generation import PromptProtocol

# In the order in which they are measured: what BM25 reads depends on what was routed.
CONDITIONS = ("routed", "single_round", "forced_gold", "gold_text", "bm25", "no_memory", "ids")
WITH_PROTOCOL = ("single_round", "ids")


def checked_conditions(conditions: Sequence[str] | None, protocol: PromptProtocol | None) -> list[str]:
    """The conditions in the order in which they are measured; None: all that make sense, but `"ids"`.

    Raises:
        ValueError: for an unknown condition, and one that needs a protocol where there is none.
        ImportError: for `"bm25"` where bm25s is missing.
    """
    if conditions is None:
        conditions = [name for name in CONDITIONS if name != "ids" and (protocol or name not in WITH_PROTOCOL)]
    for name in conditions:
        if name not in CONDITIONS:
            raise ValueError(f"`conditions` must be among {', '.join(CONDITIONS)}, got {name!r}.")
        if protocol is None and name in WITH_PROTOCOL:
            raise ValueError(f"The condition {name!r} needs a protocol: without one there are no rounds and no ids.")
    if "bm25" in conditions:
        from .lexical import require_bm25s

        require_bm25s()
    return [name for name in CONDITIONS if name in conditions]
