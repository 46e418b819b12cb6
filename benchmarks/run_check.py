"""Runs that are compiled, recorded and played, compared with those that are launched one kernel after the other.

What a run leaves is looked at in the order in which it was computed, so that the first tensor that differs tells where
to look:

* own keys or values of a layer, behind layers that are right: what comes out of the layer before, such as its attention
  over the context, or what the graph keeps between two of its parts;
* its documents or scores, with the same keys: its router queries, or how the memory is asked;
* rows, keys or values of its context, with the same documents: how they are fetched, or settled in the cache;
* logits alone: what is behind the last layer.

A question is a prompt that chooses documents, tokens behind it, and a turn of several that choose nothing.

All of it three times: compiled alone; recorded, with the memory asked through the host; recorded, the memory too. What
is wrong in the last alone is wrong in the recordings that lie between the parts of a prompt. The number of the question
tells what was done: runs of a kind are compiled with the first and recorded with the second, a memory's layers with
the third, and all is played from the fourth on. From the sixth on another bank is asked, and its layers are recorded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from msa_hf.model.cache_msa import MSACache, contexts_of
from msa_hf.model.chunks_msa import ContextRows
from msa_hf.model.compat_msa import CACHE
from msa_hf.model.compiled_msa import RECORDED_MODES, compiling
from msa_hf.model.memory_msa import LayerMemory, Memory
from msa_hf.model.options_msa import static_cache
from msa_hf.model.routing_msa import RoutingRequest, Scoring, Selection

QUESTIONS = (5, 3)  # of the first bank, and of another
TOKENS = 5  # decoded behind each
TURN = 7  # tokens that choose nothing, behind these
# The length of a difference, over that of what is right: a sum in another order, through all layers.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class HostLayer:
    """A memory layer that never says where its tensors lie, so that nobody records how it is asked."""

    layer: LayerMemory

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        return self.layer.route(queries, mask, k, scoring)

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        return self.layer.score(queries, mask, scoring, documents)

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        return self.layer.gather(selection, dtype)


class ThroughHost:
    """A memory whose layers are `HostLayer`s.

    Args:
        memory: what is asked.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.documents, self.origin, self.prefix = memory.documents, memory.origin, memory.prefix

    def snapshot(self) -> ThroughHost:
        return self

    @contextlib.contextmanager
    def session(self, request: RoutingRequest) -> Iterator[Mapping[int, LayerMemory]]:
        with self.memory.session(request) as layers:
            yield {number: HostLayer(layer) for number, layer in layers.items()}


def left_by(output: Any, cache: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that a run left, in the order in which it was computed.

    Args:
        output: of the model.
        cache: that it wrote to, of any kind.
    """
    length, contexts, routing = int(cache.get_seq_length()), contexts_of(cache), getattr(output, "routing", None) or {}
    for number, own in enumerate(cache.layers):
        yield f"own keys of layer {number}", own.keys[:, :, :length]
        yield f"own values of layer {number}", own.values[:, :, :length]
        if number in routing:
            yield f"scores of layer {number}", routing[number].scores
            yield f"documents of layer {number}", routing[number].documents
        if number in contexts:
            context = contexts[number]
            yield f"rows of the context of layer {number}", context.rows_per_sample
            shown = context.row_mask[:, None, :, None]
            yield f"keys of the context of layer {number}", context.keys.masked_fill(~shown, 0)
            yield f"values of the context of layer {number}", context.values.masked_fill(~shown, 0)
    yield "logits", output.logits


def first_difference(
    found: Iterator[tuple[str, Tensor]],
    expected: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    elsewhere: bool = False,
) -> tuple[str | None, bool]:
    """The first of two runs' tensors that differs by more than sums in another order do, in words; None if none does.

    Args:
        dtype: of the model. In 16 bits another document may be as good: behind a layer that chose one, only numbers
            that are not finite count.
        elsewhere: whether the runs chose other documents before, as for the prompt behind which a token stands.

    Returns:
        The difference, and whether the runs have chosen other documents by now.
    """
    before = "nothing"
    for (name, ours), (_, theirs) in zip(found, expected, strict=True):
        wrong = None
        if theirs.is_floating_point():
            if ours.dim() == theirs.dim() == 4:  # contexts are padded
                rows = min(ours.shape[2], theirs.shape[2])
                ours, theirs = ours[:, :, :rows], theirs[:, :, :rows]
            ours, theirs = ours.float(), theirs.float()
            lost = int((theirs.isfinite() & ~ours.isfinite()).sum())
            both = theirs.isfinite() & ours.isfinite()
            apart = float((ours - theirs)[both].norm() / theirs[both].norm().clamp(min=1e-9))
            if lost:
                wrong = f"{lost} of {theirs.numel()} numbers are not finite"
            elif apart > TOLERANCES[dtype] and not elsewhere:
                wrong = f"{apart:.2g} of their length from what is right"
        elif not torch.equal(ours, theirs):
            elsewhere = True
            if dtype == torch.float32:
                wrong = f"{ours.tolist()} instead of {theirs.tolist()}"
        if wrong is not None:
            return f"{name}: {wrong}; right before: {before}", elsewhere
        before = name
    return None, elsewhere


def first_wrong_run(model: Any, banks: Sequence[Any], config: CompileConfig, length: int) -> str | None:
    """The first run that leaves something else compiled than it does uncompiled, and the first tensor that differs.

    Args:
        banks: two, which the model accepts.
        length: tokens of the shortest question.
    """
    device, cache = model.device, static_cache(model.config, length + sum(QUESTIONS) + TOKENS + 2 * TURN)
    steps = ["the prompt", *(f"token {number + 1}" for number in range(TOKENS)), "the turn behind it"]
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
    for number, bank in enumerate(bank for bank, times in zip(banks, QUESTIONS, strict=True) for _ in range(times)):
        ids = torch.randint(3, 2000, (1, length + number), device=device)
        plain, memory = MSACache(config=model.config), bank
        cache.reset()
        elsewhere = False
        for step in steps:
            if step == steps[-1]:
                ids = torch.randint(3, 2000, (1, TURN), device=device)
            with compiling(model, config):
                found = model(ids, memory=memory, **options, **{CACHE: cache})
            expected = model(ids, memory=memory, **options, **{CACHE: plain})
            wrong, elsewhere = first_difference(left_by(found, cache), left_by(expected, plain), model.dtype, elsewhere)
            if wrong is not None:
                return f"question {number + 1}, {step}: {wrong}"
            ids, memory = expected.logits[:, -1:].argmax(-1), None
    if device.type == "cuda" and config.mode in RECORDED_MODES and len(cache.recordings.known) < 3:
        return "all of it right, but runs are not recorded"
    return None


def runs_are_right(
    model: Any, banks: Sequence[Any], config: CompileConfig, length: int, say: Callable[[str], None]
) -> None:
    """Refuse to measure what is not right.

    Args:
        model, banks, length: as of `first_wrong_run`.
        config: that asks for recorded runs.
        say: is told how it went, for each way to run.

    Raises:
        SystemExit: where a way is wrong.
    """
    compiled = copy.copy(config)
    compiled.mode = None if config.mode is None else "default"
    through_host = [ThroughHost(bank) for bank in banks]
    for bank in (*banks, *through_host):
        model.accept_bank(bank)
    ways = {
        "compiled": (banks, compiled),
        "recorded, the memory through the host": (through_host, config),
        "recorded, the memory too": (banks, config),
    }
    failed = False
    for way, (asked, how) in ways.items():
        wrong = first_wrong_run(model, asked, how, length)
        failed = failed or wrong is not None
        say(f"{way}: {'right' if wrong is None else wrong}")
    if failed:
        raise SystemExit("Runs are wrong, and nothing was measured; benchmarks/run_check.py says where to look.")
