"""Feeding transcripts to a model: padded batches, and the cache behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache

from ..model.cache_msa import MSAStaticCache
from ..model.compat_msa import CACHE, cache_of
from ..model.configuration_msa import full_attention_layers
from ..model.memory_msa import Memory
from ..model.modeling_msa import MSAForCausalLM
from ..model.routing_msa import LayerRouting
from ..model.spare_caches_msa import keep_spare, spare_cache
from . import protocol


class Transcript(Protocol):
    """A transcript as it is fed.

    Attributes:
        segments: all of it so far.
        fed: how many of them the last prefill covered.
    """

    segments: list[protocol.Segment]
    fed: int


class TranscriptFeeder:
    """The transcripts of a batch on their way through the model.

    A prefill starts anew, with rows for the transcripts asked for, unless what the cache holds is still right: where no
    block was added to any of them, the routing tokens are the same and so are all states, and it has room for more.

    Args:
        model, bank: as given.
        pad_id: token of padding.
        transcripts: all of a batch.
        keep: never start anew: every prefill is a further turn of one cache, in which every transcript has its row;
            those that are not asked for get padding. Earlier tokens then keep what they saw.
        static: caches are static ones, of those that the model has to spare; default: they grow.
        behind: tokens of steps or of an answer that may follow a prefill.
    """

    def __init__(
        self,
        model: MSAForCausalLM,
        bank: Memory,
        pad_id: int,
        transcripts: Sequence[Transcript],
        keep: bool,
        static: bool = False,
        behind: int = 0,
    ) -> None:
        self.model, self.bank, self.pad_id, self.keep = model, bank, pad_id, keep
        self.static, self.behind = static, behind
        self.rows: Sequence[Transcript] = transcripts
        self.ids = self.mask = self._empty()
        self.cache: Cache | None = None
        self.steps = 0
        self.windowed = len(full_attention_layers(model.config)) < model.config.num_hidden_layers

    def _empty(self) -> Tensor:
        return torch.empty(len(self.rows), 0, dtype=torch.long, device=self.model.device)

    def row(self, transcript: Transcript) -> int:
        """The row of a transcript in the batch."""
        return next(row for row, item in enumerate(self.rows) if item is transcript)

    def _continues(self, transcripts: Sequence[Transcript]) -> bool:
        if self.cache is None or self.keep:
            return self.cache is not None
        same = len(transcripts) == len(self.rows) and all(map(lambda a, b: a is b, transcripts, self.rows))
        new = [item.segments[item.fed :] for item in transcripts]
        return same and all(part.kind != "block" for parts in new for part in parts) and self._has_room(new)

    def _has_room(self, new: list[list[protocol.Segment]]) -> bool:
        """Tell whether the cache takes new segments of each transcript, and what may follow; one that grows does."""
        if self.cache is None or not self.static:
            return True
        more, room = max(sum(len(part.input_ids) for part in parts) for parts in new), self.cache.get_max_length()
        return room <= 0 or self.ids.shape[1] + more + self.behind <= room

    def turn(self, transcripts: Sequence[Transcript]) -> tuple[dict[str, Tensor | Cache], list[int]]:
        """The inputs of the next forward of `transcripts`, and the number of new tokens of each.

        `input_ids` and `attention_mask` cover all that is cached as well, `routing_mask` the new tokens.
        """
        if not self._continues(transcripts):
            self.leave_cache()
            self.rows = self.rows if self.keep else transcripts
            self.ids = self.mask = self._empty()
            for item in transcripts:
                item.fed = 0
        wanted = {id(item) for item in transcripts}
        new = [
            protocol.PromptProtocol.join(item.segments[item.fed :] if id(item) in wanted else []) for item in self.rows
        ]
        for item in transcripts:
            item.fed = len(item.segments)
        width = max(len(ids) for ids, _ in new)

        def padded(rows: Sequence[Sequence[int]], padding: int, dtype: torch.dtype) -> Tensor:
            lines = [[padding] * (width - len(row)) + list(row) for row in rows]
            return torch.tensor(lines, dtype=dtype, device=self.model.device)

        self.ids = torch.cat([self.ids, padded([ids for ids, _ in new], self.pad_id, torch.long)], 1)
        self.mask = torch.cat([self.mask, padded([[1] * len(ids) for ids, _ in new], 0, torch.long)], 1)
        routes = padded([routes for _, routes in new], False, torch.bool)
        if self.cache is None and self.static:
            self.cache = spare_cache(self.model, len(self.rows), self.ids.shape[1] + self.behind)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "routing_mask": routes}
        if self.cache is not None:
            inputs[CACHE] = self.cache
        return inputs, [len(new[self.row(item)][0]) for item in transcripts]

    def prefill(self, transcripts: Sequence[Transcript]) -> tuple[Tensor, Mapping[int, LayerRouting], list[int]]:
        """Feed what is new, and route.

        Returns:
            Logits [n, vocabulary] float32 behind each of `transcripts`; routing, by `row`; new tokens of each.
        """
        inputs, counts = self.turn(transcripts)
        inputs["input_ids"] = inputs["input_ids"][:, -inputs["routing_mask"].shape[1] :]
        output = self.model(**inputs, memory=self.bank, use_cache=True, logits_to_keep=1)
        self.cache = cache_of(output)
        return self._pick(output.logits, transcripts), output.routing, counts

    def step(self, tokens: list[int], transcripts: Sequence[Transcript]) -> Tensor:
        """Feed one token behind each of `transcripts`; logits as from `prefill`."""
        fed = torch.full((len(self.rows), 1), self.pad_id, dtype=torch.long, device=self.model.device)
        for token, item in zip(tokens, transcripts, strict=True):
            fed[self.row(item)] = token
        self.steps += 1
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), self.steps)], 1)
        output = self.model(input_ids=fed, attention_mask=mask, **{CACHE: self.cache}, use_cache=True)
        return self._pick(output.logits, transcripts)

    def rewind(self) -> None:
        """Forget the tokens of `step`: the transcript goes on in the protocol's spelling."""
        if self.steps and self.windowed:
            self.leave_cache()  # what has left the window cannot be brought back
        elif self.steps and self.cache is not None:
            self.cache.crop(-self.steps)
        self.steps = 0

    def leave_cache(self) -> None:
        """Go on without the cache; a static one is there for the next, with the runs that were recorded for it."""
        if self.static and isinstance(self.cache, MSAStaticCache):
            keep_spare(self.model, len(self.rows), self.cache)
        self.cache = None

    def _pick(self, logits: Tensor, transcripts: Sequence[Transcript]) -> Tensor:
        return logits[[self.row(item) for item in transcripts], -1].float()
