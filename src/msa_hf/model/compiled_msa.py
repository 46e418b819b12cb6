"""The two runs of a question, compiled: its prompt, which chooses documents, and every token behind it.

Shapes stay: prompts are padded to a bucket, contexts have a bucket's rows, and the cache is static. Inside the graph a
memory is one opaque operation, `recall`, which asks the memory of the running forward: whatever kind it is, it stays
out of the graph, so that a commit changes nothing that was compiled, and a memory that lies on disk may wait.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, CompileConfig
from transformers.utils import ModelOutput, logging

from .attention_msa import AttendingPass
from .cache_msa import MemoryContext, MSAStaticCache, bucket_of
from .chunks_msa import ContextRows
from .compat_msa import CACHE, forget_tokens
from .memory_msa import LayerMemory, Memory
from .routing_msa import LayerRouting, RoutingRequest, Scoring, Selection
from .types_msa import Arguments

if TYPE_CHECKING:
    from .generating_msa import GeneratingMixin

logger = logging.get_logger(__name__)

COMPILED_DEVICES = ("cuda", "xpu", "neuron", "tpu")  # on which transformers compiles
LEAST_PROMPT = 16  # tokens of the smallest prompt that is compiled for
MOST_PROMPT = 1024  # longer ones are bound by their arithmetic, not by launches
# Arguments of a forward that is compiled; others change what comes out of it.
INPUTS = {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "logits_to_keep", "use_cache", CACHE}
MOST_ROWS = 2048  # rows of a context for which there is room; where a question needs more, it runs again as it is
NAMESPACE = "msa_hf_memory"
RECALL_SCHEMA = (
    "(Tensor queries, Tensor mask, int layer, int k, int rows, int groups, ScalarType dtype) -> "
    "(Tensor documents, Tensor scores, Tensor keys, Tensor values, Tensor row_mask, Tensor document_index, Tensor nan, "
    "Tensor cut)"
)
Recall = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Asked:
    """The memory that `recall` asks, within one forward.

    Attributes:
        layers: layer -> what is asked.
        request: how.
    """

    layers: Mapping[int, LayerMemory]
    request: RoutingRequest


_asked: contextvars.ContextVar[Asked] = contextvars.ContextVar("asked_memory")
_spare: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, MSAStaticCache]] = weakref.WeakKeyDictionary()
_runs: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, CompiledRuns]] = weakref.WeakKeyDictionary()


@dataclass
class Compiling:
    """Attributes: runs: the compiled runs of a call of `generate`, None until transformers decides for them."""

    runs: CompiledRuns | None = None


_compiling: contextvars.ContextVar[Compiling | None] = contextvars.ContextVar("compiling", default=None)


# The memory in a graph ------------------------------------------------------------------------------------------------


@functools.cache
def recall_operation() -> Recall:
    """The operation `recall`, registered on first use; each copy of this file in a process has its own."""

    def recall(
        queries: Tensor, mask: Tensor, layer: int, k: int, rows: int, groups: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        asked = _asked.get()
        memory, device = asked.layers[layer], queries.device
        selection = memory.route(queries, mask, k, asked.request.scoring)
        found = memory.gather(selection, dtype).to(device, dtype)
        documents, scores = (item.to(device).contiguous() for item in (selection.documents, selection.scores))
        nan = scores.new_zeros((), dtype=torch.bool) if selection.has_nan is None else selection.has_nan.to(device)
        cut = found.row_mask[:, rows:].any()

        def sized(tensor: Tensor, dim: int) -> Tensor:
            missing = rows - tensor.shape[dim]
            if missing > 0:
                return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))
            return tensor.narrow(dim, 0, rows).contiguous()

        keys, values = sized(found.keys, 2), sized(found.values, 2)
        return documents, scores, keys, values, sized(found.row_mask, 1), sized(found.document_index, 1), nan, cut

    def shapes(
        queries: Tensor, mask: Tensor, layer: int, k: int, rows: int, groups: int, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        batch, dim = queries.shape[0], queries.shape[3]
        states = queries.new_empty(batch, groups, rows, dim, dtype=dtype)
        columns = queries.new_empty(batch, rows, dtype=torch.long)
        flag = queries.new_empty((), dtype=torch.bool)
        return (
            queries.new_empty(batch, k, dtype=torch.long),
            queries.new_empty(batch, k, dtype=torch.float32),
            states,
            torch.empty_like(states),
            columns.bool(),
            columns,
            flag,
            torch.empty_like(flag),
        )

    own = re.sub(r"\W", "_", f"{__name__}_recall")
    while hasattr(getattr(torch.ops, NAMESPACE), own):  # this file was imported anew
        own = f"{own}_"
    # CUDA graphs are cut where it stands: it decides on the host where its parts lie.
    tags = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []
    # Not `custom_op`, whose calls take three times as long.
    torch.library.define(f"{NAMESPACE}::{own}", RECALL_SCHEMA, tags=tags)
    torch.library.impl(f"{NAMESPACE}::{own}", "default", recall)
    torch.library.register_fake(f"{NAMESPACE}::{own}", shapes)
    return getattr(getattr(torch.ops, NAMESPACE), own).default


class RecallingLayer:
    """A memory layer as a graph sees it; one question is asked of it.

    Args:
        recall: the operation.
        layer: number of the model's layer.
        rows: of a sample's context.
        groups: key/value heads.
        dtype: of keys and values.
    """

    def __init__(self, recall: Recall, layer: int, rows: int, groups: int, dtype: torch.dtype) -> None:
        self.recall, self.layer, self.rows, self.groups, self.dtype = recall, layer, rows, groups, dtype
        self.found: ContextRows | None = None
        self.cut: Tensor | None = None

    def route(self, queries: Tensor, mask: Tensor, k: int, scoring: Scoring) -> Selection:
        """The documents, and their rows for `gather`."""
        documents, scores, keys, values, row_mask, document_index, nan, self.cut = self.recall(
            queries, mask, self.layer, k, self.rows, self.groups, self.dtype
        )
        self.found = ContextRows(keys, values, row_mask, document_index)
        return Selection(documents, scores, has_nan=nan)

    def score(self, queries: Tensor, mask: Tensor, scoring: Scoring, documents: Tensor | None = None) -> Tensor:
        raise NotImplementedError("A graph holds no scores of all documents.")

    def gather(self, selection: Selection, dtype: torch.dtype) -> ContextRows:
        """The rows that came with the documents."""
        assert self.found is not None
        return self.found


# The runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The results of a compiled prompt.

    Attributes:
        output: of the base.
        contexts, routing: by layer.
        not_finite: by layer, [] bool.
        cut: [] bool, some context needed more rows than there was room for.
    """

    output: ModelOutput
    contexts: dict[int, MemoryContext]
    routing: dict[int, LayerRouting]
    not_finite: dict[int, Tensor]
    cut: Tensor


def _run_prompt(
    model: GeneratingMixin,
    recall: Recall,
    request: RoutingRequest,
    prefix: Mapping[int, tuple[Tensor, Tensor]],
    contexts: dict[int, MemoryContext],
    rows: int,
    groups: int,
    dtype: torch.dtype,
    inputs: Arguments,
) -> tuple[Any, ...]:
    layers = {layer: RecallingLayer(recall, layer, rows, groups, dtype) for layer in model.config.memory_layers}
    attending = AttendingPass(
        config=model.config,
        layers=layers,
        prefix=prefix,
        request=request,
        contexts=dict(contexts),
        keep_contexts=True,
    )
    output = model.run_plainly(**inputs, memory_pass=attending, return_dict=True)
    cut = torch.stack([layer.cut for layer in layers.values() if layer.cut is not None]).any()
    return output, attending.contexts, attending.routing, attending.not_finite, cut


def _run_token(model: GeneratingMixin, contexts: dict[int, MemoryContext], inputs: Arguments) -> ModelOutput:
    attending = AttendingPass(config=model.config, layers={}, prefix={}, request=None, contexts=contexts)
    return model.run_plainly(**inputs, memory_pass=attending, return_dict=True)


class CompiledRuns:
    """Prompts and single tokens of one model, compiled on first use: tens of seconds each, once.

    Args:
        prompt, token: options of torch.compile for either.
    """

    def __init__(self, prompt: Mapping[str, Any], token: Mapping[str, Any]) -> None:
        self.recall = recall_operation()  # tracing would look into what makes it
        self.prompt = torch.compile(_run_prompt, **prompt)
        self.token = torch.compile(_run_token, **token)

    def taken(self, model: GeneratingMixin, cache: Cache | None, inputs: Arguments) -> MSAStaticCache | None:
        """The cache of a forward that is compiled for: its tokens go into a static one, and logits come out."""
        if not isinstance(cache, MSAStaticCache) or torch.is_grad_enabled():
            return None
        known = {name for name, value in inputs.items() if value is not None and value is not False}
        problem = None
        if any(cache.is_sliding):
            problem = "its layers with a window keep tokens in another way"
        elif model.config.rope_length is not None:
            problem = "its positions change with the length of a text"
        elif known - INPUTS:
            problem = f"{sorted(known - INPUTS)[0]!r} changes what comes out"
        if problem is not None:
            logger.warning_once(f"The runs of this model with a memory are not compiled: {problem}.")
        return cache if problem is None else None

    def run_token(
        self, model: GeneratingMixin, contexts: dict[int, MemoryContext], cache: MSAStaticCache, inputs: Arguments
    ) -> ModelOutput:
        """One token of every sample, behind those that `cache` holds."""
        mask = inputs.get("attention_mask")
        if not isinstance(mask, dict) and (mask is None or mask.dim() == 2):
            inputs = {**inputs, "attention_mask": visible_tokens(model, cache, mask, 1)}
        return self.token(model, contexts, inputs)

    def run_prompt(
        self,
        model: GeneratingMixin,
        memory: Memory,
        asked: Asked,
        contexts: dict[int, MemoryContext],
        cache: MSAStaticCache,
        inputs: Arguments,
    ) -> Chosen | None:
        """A prompt that chooses documents by itself.

        Returns:
            None where the documents have more rows than there is room for; `cache` is then as before.
        """
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        batch, length = inputs[name].shape[:2]
        room, past = cache.get_max_length(), int(cache.get_seq_length())
        width = bucket_of_prompt(length)
        width = width if past + width <= room else length
        missing = width - length

        def padded(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))

        request = replace(asked.request, routing_mask=padded(asked.request.routing_mask), inputs=None)
        groups, dim = heads_of(model)
        if not cache.is_initialized:
            cache.early_initialization(batch, groups, dim, model.dtype, inputs[name].device)
        kept = inputs.get("logits_to_keep", 0)
        if isinstance(kept, int):
            kept = torch.arange(length - kept if kept else 0, length, device=inputs[name].device)
        given = {
            **inputs,
            name: padded(inputs[name]),
            "position_ids": padded(inputs["position_ids"]),
            "attention_mask": visible_tokens(model, cache, inputs.get("attention_mask"), width),
            "logits_to_keep": kept,
        }
        # A context is the prefix and the chunks of documents, together as many rows as a bucket.
        prefixed = max((keys.shape[-2] for keys, _ in memory.prefix.values()), default=0)
        most = memory.documents.most_chunks(request.k)
        rows = min(bucket_of(prefixed + most), MOST_ROWS) - prefixed
        token = _asked.set(Asked(asked.layers, request))
        try:
            found = self.prompt(
                model, self.recall, request, dict(memory.prefix), dict(contexts), rows, groups, model.dtype, given
            )
        finally:
            _asked.reset(token)
        chosen = Chosen(*found)
        cut = bool(chosen.cut)  # the device is waited for here
        if cut or missing:
            forget_tokens(cache, width if cut else missing)
        return None if cut else chosen


def bucket_of_prompt(length: int) -> int:
    """Tokens to which a prompt is padded: the next power of two, or what there is where that is long already."""
    return length if length > MOST_PROMPT else max(1 << (length - 1).bit_length(), LEAST_PROMPT)


def heads_of(model: GeneratingMixin) -> tuple[int, int]:
    """Key/value heads and their width, of every attention layer."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, width


def visible_tokens(model: GeneratingMixin, cache: MSAStaticCache, mask: Tensor | None, length: int) -> Tensor:
    """The mask [B, 1, T, room] of the next T tokens over all places of a static cache, as the base takes it.

    Args:
        mask: [B, past + t] of the tokens that are there, t at most T; None for all.
        length: T.
    """
    device = model.device
    past = cache.get_seq_length()
    places = torch.arange(cache.get_max_length(), device=device)
    queries = torch.arange(length, device=device) + past
    visible = (places <= queries[:, None])[None, None]
    if mask is not None:
        real = torch.nn.functional.pad(mask.bool().to(device), (0, places.shape[0] - mask.shape[1]), value=True)
        visible = visible & real[:, None, None]
    if model.config._attn_implementation != "eager":
        return visible
    low = torch.finfo(model.dtype).min
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, low)


# Caches that are used again -------------------------------------------------------------------------------------------


def spare_cache(model: GeneratingMixin, samples: int, wanted: MSAStaticCache) -> MSAStaticCache:
    """The cache that the last call left, where it is like the one `wanted` for so many samples; else `wanted`.

    What was recorded of a run, as a CUDA graph, holds for the tensors it ran on, so these are used again.
    """
    kept = _spare.pop(model, None)
    if kept is None or kept[0] != samples or kept[1].get_max_length() != wanted.get_max_length():
        return wanted
    kept[1].reset()
    return kept[1]


def keep_spare(model: GeneratingMixin, samples: int, cache: MSAStaticCache) -> None:
    """Keep a cache, one for each model, that nobody uses any more."""
    _spare[model] = samples, cache


# Which runs are compiled ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def may_compile() -> Iterator[None]:
    """A call of `generate`, in which transformers decides whether to compile, by asking for a compiled call."""
    token = _compiling.set(Compiling())
    try:
        yield
    finally:
        _compiling.reset(token)


@contextlib.contextmanager
def compiling(model: GeneratingMixin, compile_config: CompileConfig | None = None) -> Iterator[None]:
    """Forwards with a memory and an `MSAStaticCache` are compiled within, on a device where that pays.

    Args:
        compile_config: options; default those of `generate`.
    """
    token = _compiling.set(Compiling())
    try:
        if compiles_on(model.device, compile_config):
            compile_from_now_on(model, (compile_config or CompileConfig()).to_dict())
        yield
    finally:
        _compiling.reset(token)


def compiles_on(device: torch.device, compile_config: CompileConfig | None) -> bool:
    """Tell whether transformers compiles what runs on a device."""
    everywhere = bool(getattr(compile_config, "_compile_all_devices", None))
    return device.type in COMPILED_DEVICES or everywhere


def compile_from_now_on(model: GeneratingMixin, options: Mapping[str, Any]) -> bool:
    """Compile the runs of the current `generate`; tell whether there is one."""
    compiling = _compiling.get()
    if compiling is None:
        return False
    compiling.runs = compiled_runs(model, options)
    return True


def compiled_runs(model: GeneratingMixin, options: Mapping[str, Any]) -> CompiledRuns:
    """The compiled runs of a model with these options of torch.compile, made once."""
    made = _runs.setdefault(model, {})
    key = repr(sorted(options.items(), key=str))
    if key not in made:
        # A prompt is long enough to keep the device busy while kernels are launched one by one.
        prompt = {**options, "mode": "default"} if options.get("mode") == "reduce-overhead" else options
        made[key] = CompiledRuns(prompt, options)
    return made[key]


def current_runs() -> CompiledRuns | None:
    """The compiled runs of the current `generate`, None where nothing is compiled."""
    compiling = _compiling.get()
    return None if compiling is None else compiling.runs
