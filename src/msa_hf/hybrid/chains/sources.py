"""Documents that a step gets: what searches a bank for them, with filters on metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...json_object import JsonObject

if TYPE_CHECKING:
    from ...retrieval import Hit

Filters = Mapping[str, Sequence[Any]]  # metadata field -> values of which a document has one
FIRST_LOOK = 64  # hits at least that are looked at where there are filters


@dataclass(frozen=True, slots=True)
class Source:
    """A document that a step got.

    Attributes:
        key: its name in the bank.
        text: None where the bank does not keep it.
        score: of the search, or None.
        position: in the bank as it was then.
        id: by which a memory model names it.
        metadata: as it was given, or None.
    """

    key: str
    text: str | None
    score: float | None = None
    position: int = -1
    id: int = -1
    metadata: JsonObject | None = None

    def to_dict(self) -> JsonObject:
        """JSON values, all of the above."""
        return asdict(self)


class Retriever(Protocol):
    """A source of documents for the steps of a chain.

    Attributes:
        name: for traces.
    """

    name: str

    def retrieve(self, query: str, mode: str, k: int, filters: Filters) -> list[Source]:
        """The k best documents for a query that pass the filters, best first.

        Raises:
            ValueError: for a mode that is not there, with the remedy.
        """
        ...


class Searchable(Protocol):
    """A bank that can be searched: `MemoryBank` of any kind, `BankStore`."""

    def __len__(self) -> int: ...

    def search(self, query: str, k: int, mode: str, **options: Any) -> list[Hit]:
        """See `msa_hf.retrieval.search`."""
        ...


class BankRetriever:
    """Searches a bank.

    Args:
        bank: that is searched, as it is at every step.
        name: for traces.
        options: as of `bank.search`: `model` and `tokenizer` for routers, `protocol`, `embedder`, `fusion`. A
            `BankStore` has its own.
    """

    def __init__(self, bank: Searchable, name: str = "bank", **options: Any) -> None:
        self.bank, self.name, self.options = bank, name, options

    def retrieve(self, query: str, mode: str, k: int, filters: Filters) -> list[Source]:
        """See `Retriever.retrieve`. With filters, more and more hits are looked at until k pass."""
        size = len(self.bank)
        if not size:
            return []
        wanted = min(k, size)
        look = wanted if not filters else min(max(4 * k, FIRST_LOOK), size)
        while True:
            hits = self.bank.search(query, look, mode, **self._options(mode, look))
            passed = [hit for hit in hits if passes(hit.metadata, filters)][:k]
            if len(passed) >= wanted or len(hits) < look or look >= size:
                return [Source(hit.key, hit.text, hit.score, hit.position, hit.id, hit.metadata) for hit in passed]
            look = min(4 * look, size)

    def _options(self, mode: str, look: int) -> dict[str, Any]:
        # A hybrid fuses the first hundred of each way; whoever wants to look further has more of them fused.
        return {**self.options, "depth": max(look, 100)} if mode == "hybrid" and look > 100 else self.options


def passes(metadata: Mapping[str, Any] | None, filters: Filters) -> bool:
    """Tell whether a document with this metadata passes."""
    return all(
        metadata is not None and name in metadata and any(_equal(metadata[name], value) for value in values)
        for name, values in filters.items()
    )


def _equal(one: object, other: object) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def sources_text(sources: Sequence[Source]) -> str:
    """Sources as prompts show them: each key in brackets, and its text."""
    return "\n".join(f"[{source.key}] {source.text or ''}".rstrip() for source in sources)
