"""Searching a bank by its routers, by words, by an embedding model, and by all of them (docs/retrieval.md)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dense import DenseSearcher
    from .embedders import Embedder, MeanPoolingEmbedder, SentenceEmbedder
    from .fusion import FusionWeights, fit_fusion, fuse
    from .hits import Found, FoundByLayer, Hit, Why
    from .keeping import add_lexical_index, add_vectors, keep_indexes
    from .lexical import LexicalSearcher
    from .searcher import Searcher, search

# Loaded when they are asked for: banks that change need what keeps indexes, and searching needs what puts questions.
HOMES = {
    "DenseSearcher": "dense",
    "Embedder": "embedders",
    "Found": "hits",
    "FoundByLayer": "hits",
    "FusionWeights": "fusion",
    "Hit": "hits",
    "LexicalSearcher": "lexical",
    "MeanPoolingEmbedder": "embedders",
    "Searcher": "searcher",
    "SentenceEmbedder": "embedders",
    "Why": "hits",
    "add_lexical_index": "keeping",
    "add_vectors": "keeping",
    "fit_fusion": "fusion",
    "fuse": "fusion",
    "keep_indexes": "keeping",
    "search": "searcher",
}

__all__ = [
    "DenseSearcher",
    "Embedder",
    "Found",
    "FoundByLayer",
    "FusionWeights",
    "Hit",
    "LexicalSearcher",
    "MeanPoolingEmbedder",
    "Searcher",
    "SentenceEmbedder",
    "Why",
    "add_lexical_index",
    "add_vectors",
    "fit_fusion",
    "fuse",
    "keep_indexes",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
