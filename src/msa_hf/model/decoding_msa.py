"""Greedy decoding and sampling on a device that never waits for the host.

Transformers' own loop asks the device after every token whether all samples have ended, and launches nothing meanwhile.
Here the next forward is launched before the host waits for that answer: while the device computes it, the host looks
at the last tokens and prepares what comes behind. Where all have ended the forward was in vain, once per call.

What is generated is the same: no logits processor, stopping criterion or random number is asked once more for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import BaseStreamer, GenerationMode, StoppingCriteriaList, StopStringCriteria

from .cache_msa import MSAStaticCache
from .compat_msa import CACHE
from .options_msa import GenerationOptions, leave_out
from .types_msa import Arguments

if TYPE_CHECKING:
    from .generating_msa import GeneratingMixin

QUEUED = ("cuda",)  # kinds of devices that work through what the host has launched while it goes on
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Options that transformers' loop follows and this one does not.
LEFT = ("custom_generate", "is_assistant", "prefill_chunk_size", "return_dict_in_generate", "token_healing")


def can_decode_ahead(options: GenerationOptions, cache: MSAStaticCache, device: torch.device) -> bool:
    """Tell whether a call of `generate` gives with `decode_ahead` what it gives without.

    Several processes that generate together agree on every step, so these are left to transformers, and so are caches
    with windowed layers, whose last token cannot be taken out again.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if device.type not in QUEUED or several or any(cache.is_sliding):
        return False
    if any(options[name] for name in LEFT) or options["inputs_embeds"] is not None:
        return False
    if options["stop_strings"] is not None and options["tokenizer"] is None:
        return False  # transformers says what is missing
    return options.mode() in MODES


def make_stop_strings_criteria(arguments: Arguments, options: GenerationOptions) -> None:
    """Put a criterion in the place of `stop_strings`, in the keywords `arguments` of a call, in place: transformers has
    no tokenizer to make one where the decoding method is a function."""
    strings = options["stop_strings"]
    if strings is None:
        return
    made = StopStringCriteria(tokenizer=options["tokenizer"], stop_strings=strings)
    arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or ()), made])
    leave_out("stop_strings", arguments, options)


class EndAsked:
    """An answer on its way to the host: whether all samples have ended, and the tokens they go on with.

    Args:
        device: where the loop's tensors are; on others than CUDA's they arrive at once.
        samples: how many there are.
    """

    def __init__(self, device: torch.device, samples: int) -> None:
        queued = device.type == "cuda"
        self._ended = torch.empty((), dtype=torch.bool, pin_memory=queued)
        self._tokens = torch.empty(samples, dtype=torch.long, pin_memory=queued)
        self._event = torch.cuda.Event() if queued else None

    def ask(self, running: Tensor, tokens: Tensor, with_tokens: bool) -> None:
        """Queue the question behind what the device has to do.

        Args:
            running: [B] bool, samples that have not ended.
            tokens: [B] int64, read where `with_tokens`.
        """
        self._ended.copy_(~running.any(), non_blocking=True)
        if with_tokens:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(running.device))

    def answer(self) -> tuple[bool, Tensor]:
        """The answer, for which the device is waited for up to the question; tokens are [B] int64."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._ended), self._tokens.clone()


def decode_ahead(
    model: GeneratingMixin,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    new_tokens: int | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """A decoding method for `generate(custom_generate=...)`, which hands all but `new_tokens` to it.

    It calls the hooks of `GenerationMixin` that its own loop calls, so that a base's are heeded.

    Args:
        input_ids: [B, T] int64, the prompt, or the new tokens of a later turn.
        new_tokens: of `input_ids`, so many at the end are not in the cache yet; None for all.
        streamer: gets every token once the next forward is launched.

    Returns:
        [B, T + generated] int64, padded behind the end of a sample.
    """
    device, samples = input_ids.device, input_ids.shape[0]
    compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
    forward = model.get_compiled_call(generation_config.compile_config) if compiled else model.__call__
    # A sample alone is done with where it ends: nothing stands behind it.
    pads = samples > 1 and any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = _padding_of(generation_config) if pads else None
    running = torch.ones(samples, dtype=torch.bool, device=device)
    asked = EndAsked(device, samples)

    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=new_tokens, is_first_iteration=True, **model_kwargs
    )
    output = model(**inputs, return_dict=True)
    with model._optimize_model_for_decode():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs)
            logits = output.logits[:, -1].to(device=device, dtype=torch.float32, copy=True)
            del output  # the logits of a long prompt may be large
            tokens = _choose(logits_processor(input_ids, logits), bool(generation_config.do_sample))
            if pad is not None:
                tokens = tokens.where(running, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            running = running & ~stopping_criteria(input_ids, None)
            asked.ask(running, tokens, streamer is not None)
            longest = stopping_criteria.max_length
            last = longest is not None and input_ids.shape[1] >= longest  # for which the device need not be asked
            if not last:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                output = forward(**inputs, return_dict=True)
            ended, streamed = asked.answer()
            if streamer is not None:
                streamer.put(streamed)
            if ended and not last:
                _take_back_token(model_kwargs)
            if ended or last:
                break
    if streamer is not None:
        streamer.end()
    return input_ids


def _choose(scores: Tensor, sample: bool) -> Tensor:
    """[B, V] -> [B], a token of each sample."""
    if sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)


def _padding_of(config: GenerationConfig) -> int | None:
    """The token behind the end of a sample; as in transformers an end token where none is set."""
    if config.pad_token_id is not None or config.eos_token_id is None:
        return config.pad_token_id
    ends = config.eos_token_id
    return ends if isinstance(ends, int) else ends[0]


def _take_back_token(model_kwargs: Arguments) -> None:
    """Take the token out of the cache whose forward was in vain."""
    cache = model_kwargs[CACHE]
    assert isinstance(cache, MSAStaticCache)
    held = cache.seen()
    cache.crop(-1)
    cache.counted = held - 1
