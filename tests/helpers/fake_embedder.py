"""An embedding model for tests: the sum of random vectors of a text's words; counts what it embedded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class FakeEmbedder:
    def __init__(self, name: str = "fake", dimension: int = 24) -> None:
        self.name, self.dimension = name, dimension
        self.embedded: list[str] = []

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{self.name}/{word}".encode()).digest()[:4], "little")
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(self.dimension))

    def _embed(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([sum((self._word(word) for word in text.split()), self._word("")) for text in texts])

    def embed_documents(self, texts: Sequence[str]) -> Tensor:
        self.embedded += texts
        return self._embed(texts)

    def embed_queries(self, texts: Sequence[str]) -> Tensor:
        return self._embed(texts)
