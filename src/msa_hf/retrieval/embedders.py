"""Embedding models: texts in, vectors out, whose inner product says how alike they are."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..json_object import JsonObject


class Embedder(Protocol):
    """An embedding model as a bank's vectors are made with.

    Attributes:
        name: of the model, which the bank notes.
    """

    name: str

    def embed_documents(self, texts: Sequence[str]) -> Tensor:
        """[N, D] floating vectors of passages, on any device."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> Tensor:
        """[N, D] floating vectors of queries."""
        ...


class SentenceEmbedder:
    """Any model of sentence-transformers, with its own pooling and prompts for queries and documents.

    Args:
        name: a directory or a Hub id.
        device: that it runs on.
        batch_size: texts at a time.

    Raises:
        ImportError: where sentence-transformers is missing, naming the extra.
    """

    def __init__(self, name: str | Path, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        try:
            module: Any = importlib.import_module("sentence_transformers")
        except ImportError as error:
            raise ImportError(
                "An embedding model needs sentence-transformers: pip install 'msa-hf[dense]'. One that pools the mean "
                "of its last states works without it, as MeanPoolingEmbedder."
            ) from error
        self.name, self.batch_size = str(name), batch_size
        self.model = module.SentenceTransformer(str(name), device=str(device))

    def _options(self) -> JsonObject:
        return {"batch_size": self.batch_size, "convert_to_tensor": True, "show_progress_bar": False}

    def embed_documents(self, texts: Sequence[str]) -> Tensor:
        """[N, D] vectors of passages."""
        found: Tensor = self.model.encode_document(list(texts), **self._options())
        return found

    def embed_queries(self, texts: Sequence[str]) -> Tensor:
        """[N, D] vectors of queries."""
        found: Tensor = self.model.encode_query(list(texts), **self._options())
        return found


class MeanPoolingEmbedder:
    """A model in transformers' format that pools the mean of its last states, as all-MiniLM-L6-v2 does.

    Args:
        path: a directory or a Hub id.
        device: that it runs on.
        batch_tokens: tokens at a time, padding included.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", batch_tokens: int = 16384) -> None:
        from ..training.teacher import EmbeddingTeacher  # here, because training needs banks, and these embedders

        self.name = str(path)
        self.teacher = EmbeddingTeacher(path, device, batch_tokens=batch_tokens)

    def embed_documents(self, texts: Sequence[str]) -> Tensor:
        """[N, D] vectors of passages."""
        return self.teacher.embed(texts)

    def embed_queries(self, texts: Sequence[str]) -> Tensor:
        """[N, D] vectors of queries."""
        return self.teacher.embed(texts)
