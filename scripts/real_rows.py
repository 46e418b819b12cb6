"""Token rows and files that the stages of `train_real.py` and `eval_real.py` hand each other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from msa_hf.training.contrastive import TokenRows
from msa_hf.training.mining import part_sizes


def log(*words: object) -> None:
    """Print with the time of day, in the first process."""
    if rank() == 0:
        print(f"[{time.strftime('%H:%M:%S')}]", *words, flush=True)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def connect(where: torch.device) -> dist.ProcessGroup | None:
    """The group of the processes that torchrun started; None for one that runs alone."""
    if world() == 1:
        return None
    if where.type == "cuda":
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", device_id=where, timeout=timedelta(minutes=5))
    else:
        dist.init_process_group("gloo")
    return dist.group.WORLD


def wait_for(path: Path) -> Path:
    """A file that another process of this run is making."""
    while not path.exists():
        time.sleep(0.5)
    return path


def save(path: Path, value: object) -> None:
    """Write, so that who waits for the file sees it whole."""
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load(path: Path) -> Any:
    return torch.load(wait_for(path), weights_only=True)


def source_names(parts: str) -> list[str]:
    """`sets` and the parts of the further text that a range such as 0-5 names."""
    first, _, last = parts.partition("-")
    return ["sets", *(f"part{number:02d}" for number in range(int(first), int(last or first) + 1))]


class Flat:
    """Token rows of different lengths, one behind the other.

    Attributes:
        tokens: [all tokens] int32. `starts`, `lengths`: [N] int64.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        self.tokens, self.lengths = tokens, lengths
        self.starts = lengths.cumsum(0) - lengths

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Flat:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        tokens = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(lengths.sum()))
        return cls(torch.from_numpy(tokens), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Flat]) -> Flat:
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.lengths for part in parts]))

    def to(self, where: torch.device) -> Flat:
        return Flat(self.tokens.to(where), self.lengths.to(where))

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, starts and lengths."""
        return self.tokens.cpu().numpy(), self.starts.cpu().numpy(), self.lengths.cpu().numpy()

    def row(self, place: int) -> list[int]:
        """The tokens of one row."""
        tokens, starts, lengths = self.on_host
        return tokens[starts[place] : starts[place] + lengths[place]].tolist()

    def rows(self, places: Tensor, multiple: int = 8) -> TokenRows:
        """The rows at `places`, padded to a multiple."""
        lengths = self.lengths[places]
        width = -(-int(lengths.max()) // multiple) * multiple
        within = torch.arange(width, device=places.device)
        mask = within < lengths[:, None]
        index = (self.starts[places][:, None] + within).masked_fill(~mask, 0)
        return TokenRows(self.tokens[index].long().masked_fill(~mask, 0), lengths)

    def at(self, places: Tensor) -> Flat:
        """The rows at `places` alone, in that order."""
        lengths = self.lengths[places]
        within = torch.arange(int(lengths.sum()), device=lengths.device)
        index = within + (self.starts[places] - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        return Flat(self.tokens[index], lengths)

    def parts(self, places: Tensor, budget: int) -> Iterator[tuple[Tensor, TokenRows]]:
        """`places` by length in parts of at most `budget` padded tokens, each with its rows."""
        lengths, order = self.lengths[places].sort(stable=True)
        for chosen in places[order].split(part_sizes(lengths.cpu().numpy(), budget)):
            yield chosen, self.rows(chosen)

    def share(self) -> Tensor:
        """Places that this process takes where all processes divide the rows by their tokens, in order of ranks."""
        ends = self.lengths.cumsum(0)
        owner = (ends - self.lengths) * world() // max(int(self.lengths.sum()), 1)
        return (owner.clamp(max=world() - 1) == rank()).nonzero().squeeze(1)


def tokenized(tokenizer: Any, texts: Sequence[str], longest: int | None = None) -> Flat:
    if not texts:
        return Flat.of([])
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return Flat.of([row[:longest] for row in rows])
