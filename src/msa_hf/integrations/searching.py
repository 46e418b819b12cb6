"""The part that all retrievers share: `bank.search`, checked options, and metadata that say where a hit came from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ..json_object import JsonObject
from ..retrieval import Hit

FOUND = "msa_hf"  # under which a document's metadata say how it was found; what was given with it stays beside that
DEFAULTS: Mapping[str, object] = {"k": 10, "mode": "hybrid"}


@runtime_checkable
class Searched(Protocol):
    """Whatever can be searched: a `MemoryBank` of any kind, or a `BankStore`, as it is when it is asked."""

    def search(self, query: str | Sequence[str], k: int = 10, mode: str = "hybrid", **options: Any) -> Any: ...


def option_names() -> list[str]:
    """Names of the options of `bank.search`."""
    from ..retrieval import search

    return [name for name in inspect.signature(search).parameters if name not in ("bank", "query")]


def check_options(bank: object, options: Mapping[str, Any]) -> None:
    """Check what a retriever is made with, before it is asked anything.

    Raises:
        TypeError: for what is no bank.
        ValueError: for an option, number, mode or `where` that `bank.search` does not take.
    """
    from ..retrieval.searcher import MODES
    from ..retrieval.where import checked_where

    if not isinstance(bank, Searched):
        raise TypeError(
            f"`bank` must be a MemoryBank or a BankStore, got {type(bank).__name__}; `MemoryBank.from_pretrained` "
            "loads one."
        )
    known = option_names()
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"`{unknown[0]:.80}` is no option of `bank.search`, which takes {', '.join(known)}.")
    k, mode = options["k"], options["mode"]
    if type(k) is not int or k < 1:
        raise ValueError(f"`k` must be an integer of at least 1, got {k!r:.80}.")
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}, got {mode!r:.80}.")
    checked_where(options.get("where"))


def hits_of(bank: Searched, query: str, options: Mapping[str, Any]) -> list[tuple[Hit, str]]:
    """The hits of a query, best first, and their texts.

    Raises:
        ValueError: for a hit whose text the bank does not keep; and what `bank.search` raises.
    """
    hits: list[Hit] = bank.search(query, **options)
    found = []
    for hit in hits:
        if hit.text is None:
            raise ValueError(
                f"The bank does not keep the text of {hit.key!r:.80}, so that there is nothing to hand on: encode "
                "texts rather than token ids."
            )
        found.append((hit, hit.text))
    return found


def metadata_of(hit: Hit, mode: str) -> JsonObject:
    """The metadata of a document as they were given, and under `FOUND` how it was found: rank, score, mode, why."""
    about = hit.to_dict()
    kept = {name: about[name] for name in ("key", "position", "id", "rank", "score", "why")}
    return {**(hit.metadata or {}), FOUND: {**kept, "mode": mode}}
