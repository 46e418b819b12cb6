"""A teacher of routing: an embedding model whose similarities are soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ..model.bounds_msa import read_json


class Teacher(Protocol):
    """Embeds texts."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] L2-normalized embeddings."""
        ...


def load_teacher(name: str, device: str | torch.device = "cpu") -> Teacher:
    """A teacher by the name or directory of a sentence-transformers model.

    Raises:
        ImportError: where sentence-transformers is missing and the model does not say that it pools means, which is
            done here.
        OSError: where there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        if not _pools_means(Path(name)):
            raise ImportError(f"The teacher {name} needs sentence-transformers: pip install msa-hf[teacher]") from error
        return EmbeddingTeacher(name, device)
    return SentenceTeacher(SentenceTransformer(name, device=str(device)))


def _pools_means(path: Path) -> bool:
    """Tell whether a directory holds a model whose sentence embeddings are means of its last states."""
    try:
        modules = read_json(path / "modules.json")
        pooling = next(module["path"] for module in modules if module["type"].rpartition(".")[2] == "Pooling")
        options = read_json(path / pooling / "config.json")
        chosen = [name for name, value in options.items() if name.startswith("pooling_mode_") and value]
        kinds = {module["type"].rpartition(".")[2] for module in modules}
        return chosen == ["pooling_mode_mean_tokens"] and kinds <= {"Transformer", "Pooling", "Normalize"}
    except (OSError, ValueError, KeyError, StopIteration, TypeError, AttributeError):
        return False


class SentenceTeacher:
    """A model of sentence-transformers.

    Args:
        model: a `SentenceTransformer`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 L2-normalized embeddings, on the model's device."""
        found: Tensor = self.model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return found.float()


class EmbeddingTeacher:
    """A sentence embedding model that pools the mean of its last states, as all-MiniLM-L6-v2 does.

    Args:
        path: of the model, in transformers' format.
        device: that it runs on; float16 there where that is a GPU.
        max_length: tokens of a text, cut behind them.
        batch_tokens: tokens at a time, padding included.
    """

    def __init__(
        self, path: str | Path, device: str | torch.device = "cpu", max_length: int = 256, batch_tokens: int = 262_144
    ) -> None:
        self.device, self.max_length, self.batch_tokens = torch.device(device), max_length, batch_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.model: Any = AutoModel.from_pretrained(path, dtype=dtype).to(self.device).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] L2-normalized embeddings, on the device and in the model's dtype."""
        coded = []
        if texts:  # tokenizers refuse none
            coded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)["input_ids"]
        order = sorted(range(len(coded)), key=lambda place: len(coded[place]))
        found = torch.empty(len(coded), self.model.config.hidden_size, dtype=self.model.dtype, device=self.device)
        start = 0
        while start < len(order):
            stop = start
            while stop < len(order) and len(coded[order[stop]]) * (stop + 1 - start) <= self.batch_tokens:
                stop += 1
            stop = max(stop, start + 1)
            rows = [coded[place] for place in order[start:stop]]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(self.device)
            lengths = torch.tensor([len(row) for row in rows]).to(self.device)
            mask = torch.arange(width, device=self.device) < lengths[:, None]
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            means = (states * mask[..., None]).sum(1).float() / lengths[:, None]
            places = torch.tensor(order[start:stop], device=self.device)
            found[places] = torch.nn.functional.normalize(means, dim=1).to(found.dtype)
            start = stop
        return found
