"""Searching a bank by its routers, by words, by an embedding model, and by all of them (docs/retrieval.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .dense import DenseSearcher
    from .embedders import Embedder, MeanPoolingEmbedder, SentenceEmbedder
    from .fusion import FusionWeights, fit_fusion, fuse
    from .hits import Found, FoundByLayer, Hit, Why
    from .keeping import add_lexical_index, add_vectors, keep_indexes
    from .lexical import LexicalSearcher
    from .reranking import QueryLikelihood, reread
    from .searcher import Searcher, search
    from .wording import fit_wording, rank_by_wording

__all__ = [
    "DenseSearcher",
    "Embedder",
    "Found",
    "FoundByLayer",
    "FusionWeights",
    "Hit",
    "LexicalSearcher",
    "MeanPoolingEmbedder",
    "QueryLikelihood",
    "Searcher",
    "SentenceEmbedder",
    "Why",
    "add_lexical_index",
    "add_vectors",
    "fit_fusion",
    "fit_wording",
    "fuse",
    "keep_indexes",
    "rank_by_wording",
    "reread",
    "search",
]


# Banks that change need what keeps indexes, and searching needs what puts questions: no circle, loaded like this.
__getattr__ = exports(
    __name__,
    {
        ".dense": ["DenseSearcher"],
        ".embedders": ["Embedder", "MeanPoolingEmbedder", "SentenceEmbedder"],
        ".fusion": ["FusionWeights", "fit_fusion", "fuse"],
        ".hits": ["Found", "FoundByLayer", "Hit", "Why"],
        ".keeping": ["add_lexical_index", "add_vectors", "keep_indexes"],
        ".lexical": ["LexicalSearcher"],
        ".reranking": ["QueryLikelihood", "reread"],
        ".searcher": ["Searcher", "search"],
        ".wording": ["fit_wording", "rank_by_wording"],
    },
)
