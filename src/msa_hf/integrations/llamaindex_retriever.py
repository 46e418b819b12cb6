"""A bank as a retriever of LlamaIndex."""

from __future__ import annotations

import asyncio
from typing import Any

from .searching import DEFAULTS, FOUND, Searched, check_options, hits_of, metadata_of

try:
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise ImportError("LlamaIndex is not installed: `pip install 'msa-hf[llamaindex]'`.") from error


class LlamaIndexRetriever(BaseRetriever):
    """The documents of a bank that fit a query, by `bank.search`, as nodes with scores.

    A node's id is the document's key, its metadata are those that it was encoded with; `metadata["msa_hf"]`, which no
    prompt shows, says rank, mode and why it was found. A `BankStore` is searched as it is when the retriever is asked.

    Args:
        bank: a `MemoryBank` of any kind or a `BankStore`.
        k: nodes at most.
        mode: `"router"`, `"lexical"`, `"dense"` or `"hybrid"`.
        search_kwargs: further ones of `bank.search`, as `model`, `tokenizer` and `where`.
        callback_manager: as of every retriever.
        options: further ones of `BaseRetriever`.

    Raises:
        TypeError: for a `bank` that is none.
        ValueError: for a `k`, `mode` or other option that `search` does not take, and for `k` or `mode` in
            `search_kwargs`.
    """

    def __init__(
        self,
        bank: Searched,
        k: int = 10,
        mode: str = "hybrid",
        search_kwargs: dict[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> None:
        for name in DEFAULTS:
            if name in (search_kwargs or {}):
                raise ValueError(f"`{name}` is an argument of its own: take it out of `search_kwargs`, give `{name}=`.")
        self.bank = bank
        self.search_kwargs = {**DEFAULTS, **(search_kwargs or {}), "k": k, "mode": mode}
        check_options(bank, self.search_kwargs)
        super().__init__(callback_manager=callback_manager, **options)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        mode = self.search_kwargs["mode"]
        return [
            NodeWithScore(
                node=TextNode(
                    id_=hit.key,
                    text=text,
                    metadata=metadata_of(hit, mode),
                    excluded_llm_metadata_keys=[FOUND],
                    excluded_embed_metadata_keys=[FOUND],
                ),
                score=hit.score,
            )
            for hit, text in hits_of(self.bank, query_bundle.query_str, self.search_kwargs)
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
