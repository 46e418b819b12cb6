"""The runs of a question, compiled: its prompt, which chooses documents, and what stands behind it.

Shapes stay: prompts are padded to a bucket (prompt_buckets_msa.py), contexts have a bucket's rows, and the cache is
static. Inside the graph a memory is one opaque operation (recalling_msa.py).

On a GPU what is compiled can also be recorded (recording_msa.py): a token is one launch, and a prompt is one for what
lies between two memory layers. Nothing of Python runs but what asks the memory.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, CompileConfig
from transformers.utils import logging

from .attending_layers_msa import AttendingLayers
from .attention_msa import AttendingPass, refuse_nan
from .cache_msa import MemoryContext, MSAStaticCache, bucket_of
from .compat_msa import CACHE
from .memory_msa import Memory
from .prompt_buckets_msa import (
    bucket_of_prompt,
    heads_of,
    is_in_bucket,
    kept_places,
    padded,
    real_places,
    visible_tokens,
)
from .recalling_msa import Asked, RecallingLayer, asking, recall_operation
from .recording_msa import Inputs, Step, autocast_of, is_recordable, state_of
from .routing_msa import LayerRouting
from .types_msa import Arguments

if TYPE_CHECKING:
    from .generating_msa import GeneratingMixin

logger = logging.get_logger(__name__)

COMPILED_DEVICES = ("cuda", "xpu", "neuron", "tpu")  # on which transformers compiles
# Arguments of a forward that is compiled; others change what comes out of it.
INPUTS = {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "logits_to_keep", "use_cache", CACHE}
MOST_ROWS = 2048  # rows of a context for which there is room; where a question needs more, it runs again as it is
Result = TypeVar("Result")
# Modes of torch.compile that ask for CUDA graphs -> the same without, for runs that are recorded here.
RECORDED_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}

_runs: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, CompiledRuns]] = weakref.WeakKeyDictionary()


@dataclass
class Compiling:
    """A call of `generate`.

    Attributes:
        runs: its compiled runs, None until transformers decides for them.
        state: of the model, as recorded runs take it for granted; None until it was looked at.
    """

    runs: CompiledRuns | None = None
    state: object = None


_compiling: contextvars.ContextVar[Compiling | None] = contextvars.ContextVar("compiling", default=None)


# The runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """The results of a compiled prompt. The next one may overwrite their tensors.

    Attributes:
        output: fields of the base's output.
        contexts: by layer.
        layers: those with a memory, in order.
        documents: [layers, B, k] int64.
        scores: [layers, B, k] float32.
        flags: [layers + 1] bool: in a layer router queries were not finite; behind these, some context needed more rows
            than there was room for.
    """

    output: Arguments
    contexts: dict[int, MemoryContext]
    layers: list[int]
    documents: Tensor
    scores: Tensor
    flags: Tensor

    @classmethod
    def of(cls, output: Arguments, attending: AttendingPass) -> Chosen:
        """What a pass recorded, whose layers were `RecallingLayer`s."""
        cuts = [layer.cut for layer in attending.layers.values() if isinstance(layer, RecallingLayer)]
        cut = torch.stack([cut for cut in cuts if cut is not None]).any()
        routing = attending.routing
        return cls(
            output=output,
            contexts=attending.contexts,
            layers=list(routing),
            documents=torch.stack([item.documents for item in routing.values()]),
            scores=torch.stack([item.scores for item in routing.values()]),
            flags=torch.stack([*attending.not_finite.values(), cut]),
        )

    def kept(self) -> Chosen:
        """The same in tensors that nobody overwrites; contexts, which a cache copies, and flags stay where they are."""
        documents, scores = self.documents.clone(), self.scores.clone()
        return Chosen(_kept(self.output), self.contexts, self.layers, documents, scores, self.flags)

    def routing(self) -> dict[int, LayerRouting]:
        """Layer -> its choice."""
        parts = zip(self.layers, self.documents.unbind(), self.scores.unbind(), strict=True)
        return {layer: LayerRouting(documents, scores) for layer, documents, scores in parts}


def _kept(output: Arguments) -> Arguments:
    """The fields of an output in tensors that nobody overwrites."""
    return {name: item.clone() if isinstance(item, Tensor) else item for name, item in output.items()}


class CompiledRuns:
    """Prompts, turns and single tokens of one model, compiled on first use: seconds each, once.

    Args:
        options: of torch.compile.
        recorded: runs are recorded where the device can.
    """

    def __init__(self, options: Mapping[str, Any], recorded: bool) -> None:
        self.recall = recall_operation()  # tracing would look into what makes it
        self.layers = AttendingLayers(options)
        self.recorded = recorded

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
        if not cache.is_initialized and autocast_of(model.device) is not None:
            # Layers differ in whether autocast leaves their keys as wide as the weights.
            logger.warning_once(
                "Under autocast the first prompt of a cache is not compiled: it shows in which dtypes tokens are kept. "
                "A model in 16 bits (`dtype=torch.bfloat16`) needs no autocast."
            )
            return None
        if problem is not None:
            logger.warning_once(f"The runs of this model with a memory are not compiled: {problem}.")
        return cache if problem is None else None

    def run(
        self,
        cache: MSAStaticCache,
        kind: tuple[Hashable, ...],
        function: Callable[[Inputs], Result],
        inputs: Inputs,
        device: torch.device,
        contexts: Mapping[int, MemoryContext],
    ) -> Result:
        """The result of `function(inputs)`, which also reads `contexts`, recorded where that is possible; see
        `Recordings.run`."""
        if not self.recorded:
            return function(inputs)
        # Others after samples changed places.
        places = tuple(item.data_ptr() for layer in cache.layers for item in (layer.keys, layer.values))
        kind = id(self), places, _identities(contexts), *kind
        return cache.recordings.run(kind, function, inputs, device, lambda: _lengths_of(cache), contexts)

    def look_at(self, model: GeneratingMixin, cache: MSAStaticCache, anew: bool) -> None:
        """Forget recorded runs that hold no more for the model; it is looked at once per `generate`, or `anew`."""
        compiling = _compiling.get()
        if not self.recorded or compiling is None:
            return
        if anew or compiling.state is None:
            settings = model.config._attn_implementation, autocast_of(model.device)
            compiling.state = settings, state_of(model)
        cache.recordings.renew(compiling.state)

    def run_turn(self, model: GeneratingMixin, cache: MSAStaticCache, inputs: Arguments) -> Arguments | None:
        """Tokens that choose no documents, behind those that `cache` holds, with the contexts that it keeps: each token
        that is generated, or what stands behind a prompt.

        Returns:
            The fields of the base's output; None for several tokens whose mask is not one of tokens that are there:
            `cache` is then as before.
        """
        mask, length = inputs.get("attention_mask"), inputs["position_ids"].shape[1]
        made = not isinstance(mask, dict) and (mask is None or mask.dim() == 2)
        if length > 1 and not made:
            return None
        self.look_at(model, cache, anew=False)
        cache.settle_contexts()  # others after beams changed places
        contexts = dict(cache.contexts)
        width = 1 if length == 1 else self._width(cache, length)
        if length > 1:
            inputs = {**padded(inputs, width - length), "logits_to_keep": kept_places(inputs, length)}
        if made:
            inputs = {**inputs, "attention_mask": real_places(cache, mask, inputs["position_ids"])}
        tensors = {name: item for name, item in inputs.items() if isinstance(item, Tensor)}
        fixed = {name: item for name, item in inputs.items() if name not in tensors}

        def run(found: Inputs) -> Arguments:
            visible = {"attention_mask": visible_tokens(model, cache, found["attention_mask"], width)} if made else {}
            attending = AttendingPass(config=model.config, layers={}, prefix={}, request=None, contexts=contexts)
            with self.layers.of(model, token=length == 1):
                output = model.run_plainly(**{**fixed, **found, **visible}, memory_pass=attending, return_dict=True)
            return dict(output)

        if isinstance(mask, dict) or not (width == 1 or is_in_bucket(width)):
            output = run(tensors)
        else:
            kind = "turn", _settings(fixed)
            output = _kept(self.run(cache, kind, run, tensors, inputs["position_ids"].device, contexts))
        if width > length:
            cache.crop(length - width)
        return output

    @staticmethod
    def _width(cache: MSAStaticCache, length: int) -> int:
        """The tokens that a run of `length` is padded to, where the cache has room for them."""
        width = bucket_of_prompt(length)
        return width if cache.seen() + width <= cache.get_max_length() else length

    def run_prompt(
        self,
        model: GeneratingMixin,
        memory: Memory,
        asked: Asked,
        contexts: dict[int, MemoryContext],
        cache: MSAStaticCache,
        inputs: Arguments,
        meanwhile: Callable[[], None],
    ) -> Chosen | None:
        """A prompt that chooses documents by itself; the cache goes on with their contexts.

        Args:
            meanwhile: done once the prompt is launched.

        Returns:
            None where the documents have more rows than there is room for; `cache` is then as before.
        """
        self.look_at(model, cache, anew=True)
        name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
        (batch, length), device = inputs[name].shape[:2], inputs[name].device
        width = self._width(cache, length)
        missing = width - length
        groups, dim = heads_of(model)
        if not cache.is_initialized:
            cache.early_initialization(batch, groups, dim, model.dtype, device)
        tensors = {
            **padded({key: inputs[key] for key in (name, "position_ids")}, missing),
            "attention_mask": real_places(cache, inputs.get("attention_mask"), inputs["position_ids"]),
            "logits_to_keep": kept_places(inputs, length),
            **padded({"routing_mask": asked.request.routing_mask}, missing),
        }
        for layer, (keys, values) in memory.prefix.items():
            tensors |= {f"{layer} keys": keys, f"{layer} values": values}
        fixed = {key: item for key, item in inputs.items() if key not in tensors}
        request, prefixes = replace(asked.request, inputs=None), list(memory.prefix)
        # A context is the prefix and the chunks of documents, together as many rows as a bucket.
        prefixed = max((keys.shape[-2] for keys, _ in memory.prefix.values()), default=0)
        most = memory.documents.most_chunks(request.k)
        rows = min(bucket_of(prefixed + most), MOST_ROWS) - prefixed
        if rows < min(most, 1):  # the prefix alone takes all of it
            return None
        contexts = dict(contexts)

        def run(found: Inputs) -> Chosen:
            prefix = {layer: (found[f"{layer} keys"], found[f"{layer} values"]) for layer in prefixes}
            given = {
                **fixed,
                name: found[name],
                "position_ids": found["position_ids"],
                "attention_mask": visible_tokens(model, cache, found["attention_mask"], width),
                "logits_to_keep": found["logits_to_keep"],
            }
            layers = {
                layer: RecallingLayer(self.recall, torch.tensor(layer), rows, groups, model.dtype)
                for layer in model.config.memory_layers
            }
            attending = AttendingPass(
                config=model.config,
                layers=layers,
                prefix=prefix,
                request=replace(request, routing_mask=found["routing_mask"]),
                contexts=dict(contexts),
                keep_contexts=True,
            )
            with self.layers.of(model, token=False):
                output = model.run_plainly(**given, memory_pass=attending, return_dict=True)
            return Chosen.of(dict(output), attending)

        kind = "prompt", rows, request.k, request.scoring, request.score_bias, _settings(fixed)
        # Prompts of every length there is are not recorded: their contexts, which stay, would fill the device.
        recordable = is_in_bucket(width)
        with asking(Asked(asked.layers, replace(request, routing_mask=tensors["routing_mask"]))):
            chosen = self.run(cache, kind, run, tensors, device, contexts) if recordable else run(tensors)
        # All that is known to be wanted is launched before the device is waited for.
        if missing:
            cache.crop(-missing)
        settled = None if contexts else self._settled(cache, chosen, device)
        kept = chosen.kept()
        meanwhile()
        *not_finite, cut = chosen.flags.tolist()  # the device is waited for here
        if cut:
            cache.crop(-length)
            return None
        # Contexts of before, which a prompt that was cut is to find again, are overwritten now at the soonest.
        cache.take_settled(self._settled(cache, chosen, device) if settled is None else settled)
        refuse_nan(dict(zip(kept.layers, not_finite, strict=True)))
        return kept

    def _settled(self, cache: MSAStaticCache, chosen: Chosen, device: torch.device) -> dict[int, MemoryContext]:
        """The contexts of a prompt in tensors that stay."""
        found = chosen.contexts
        if not cache.recordings.holds(chosen):
            return cache.settled(found)
        return self.run(cache, ("settle",), lambda _: cache.settled(found), {}, device, found)


def _identities(contexts: Mapping[int, MemoryContext]) -> tuple[tuple[int, int], ...]:
    """What tells contexts from others whose tensors lie elsewhere, while these are held."""
    return tuple((layer, id(item)) for layer, item in contexts.items())


def _settings(inputs: Arguments) -> tuple[tuple[str, str], ...]:
    """Inputs that are no tensors, to be compared; the cache is told by where they are kept."""
    return tuple((name, repr(item)) for name, item in inputs.items() if not isinstance(item, Cache))


def _lengths_of(cache: MSAStaticCache) -> Step:
    """Note how many tokens a cache holds; the result takes those behind out again."""
    noted = [(layer.cumulative_length, layer.cumulative_length.clone()) for layer in cache.layers]

    def restore() -> None:
        for place, length in noted:
            place.copy_(length)

    return restore


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
        compile_config: options; see `options_of`.
    """
    token = _compiling.set(Compiling())
    try:
        if compiles_on(model.device, compile_config):
            compile_from_now_on(model, options_of(compile_config))
        yield
    finally:
        _compiling.reset(token)


def options_of(compile_config: CompileConfig | None) -> Mapping[str, Any]:
    """Options of torch.compile. Runs are recorded where the configuration has such a mode, as that of transformers' own
    default."""
    return (CompileConfig() if compile_config is None else compile_config).to_dict()


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
        mode = options.get("mode")
        plain = options if mode is None else {**options, "mode": RECORDED_MODES.get(mode, mode)}
        made[key] = CompiledRuns(plain, recorded=mode in RECORDED_MODES and is_recordable(model))
    return made[key]


def current_runs() -> CompiledRuns | None:
    """The compiled runs of the current `generate`, None where nothing is compiled."""
    compiling = _compiling.get()
    return None if compiling is None else compiling.runs
