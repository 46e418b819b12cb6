"""A bank as a retriever of LangChain."""

from __future__ import annotations

import asyncio
from typing import Any

from .searching import DEFAULTS, check_options, hits_of, metadata_of, option_names

try:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from pydantic import ConfigDict, Field, model_validator
except ImportError as error:
    raise ImportError("LangChain is not installed: `pip install 'msa-hf[langchain]'`.") from error


class LangChainRetriever(BaseRetriever):
    """The documents of a bank that fit a query, by `bank.search`.

    A document's `id` is its key, its metadata are those that it was encoded with; `metadata["msa_hf"]` says rank,
    score, mode and why it was found. A `BankStore` is searched as it is when the retriever is asked.

    Args:
        bank: a `MemoryBank` of any kind or a `BankStore`.
        search_kwargs: of `bank.search`: `k`, `mode`, and what the mode needs, as `model` and `tokenizer`. Default: 10
            documents, `"hybrid"`. `invoke(query, k=2)` changes them for one call.

    Raises:
        ValueError: for a `bank` that is none, or options that `search` does not take.
    """

    # What is passed over might be a filter: documents would be found that it keeps out.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    bank: Any = Field(repr=False)
    search_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        names = given if isinstance(given, dict) else {}
        for name in option_names():
            if name in names and name not in cls.model_fields:
                raise ValueError(f"`{name}` is an option of the search: give it as search_kwargs={{{name!r}: ...}}.")
        return given

    @model_validator(mode="after")
    def _check(self) -> LangChainRetriever:
        try:
            check_options(self.bank, self._options({}))
        except TypeError as error:
            raise ValueError(str(error)) from error
        return self

    def _options(self, changed: dict[str, Any]) -> dict[str, Any]:
        return {**DEFAULTS, **self.search_kwargs, **changed}

    def _search(self, query: str, changed: dict[str, Any]) -> list[Document]:
        options = self._options(changed)
        check_options(self.bank, options)
        return [
            Document(page_content=text, metadata=metadata_of(hit, options["mode"]), id=hit.key)
            for hit, text in hits_of(self.bank, query, options)
        ]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **changed: Any
    ) -> list[Document]:
        return self._search(query, changed)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **changed: Any
    ) -> list[Document]:
        return await asyncio.to_thread(self._search, query, changed)
