"""Banks and stores as other libraries know them: LangChain and LlamaIndex (docs/integrations.md).

Importing this package imports neither; asking for a class that needs one names the extra where it is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .langchain_history import LangChainHistory
    from .langchain_retriever import LangChainRetriever
    from .llamaindex_retriever import LlamaIndexRetriever

__all__ = ["LangChainHistory", "LangChainRetriever", "LlamaIndexRetriever"]

__getattr__ = exports(
    __name__,
    {
        ".langchain_history": ["LangChainHistory"],
        ".langchain_retriever": ["LangChainRetriever"],
        ".llamaindex_retriever": ["LlamaIndexRetriever"],
    },
)
