"""Generating with a memory: what transformers' `generate` takes and hands on, for a causal LM."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Self

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Cache, CompileConfig, GenerationConfig, PreTrainedModel
from transformers.generation import CandidateGenerator, StoppingCriteriaList
from transformers.utils import ModelOutput

from .cache_msa import MSAStaticCache, contexts_of
from .compat_msa import CACHE, NEWEST_TESTED, rename_cache
from .compiled_msa import compile_from_now_on, current_runs, may_compile, options_of
from .decoding_msa import can_decode_ahead, decode_ahead, make_stop_strings_criteria
from .drafting_msa import (
    drafting_arguments,
    has_memory,
    memory_arguments,
    refuse_assistant,
    refuse_drafts,
    refuse_drafts_behind_a_window,
    refuse_drafts_of_offloaded,
)
from .inference_msa import (
    FORCED_WITHOUT_ROUTING,
    MEMORY_ARGUMENTS,
    MemoryMixin,
    current,
    refuse_forgetful_cache,
    seen_by,
)
from .memory_msa import Memory
from .options_msa import (
    STATIC,
    GenerationOptions,
    bind_positional,
    cache_for,
    leave_out,
    most_tokens,
    refuse_attentions,
    refuse_small_cache,
)
from .spare_caches_msa import free_all, free_displaced, keep_spare, spare_cache
from .types_msa import Arguments
from .wrapping_msa import input_device

# A run is compiled when it comes first and recorded when it comes again; contexts of a prompt are settled behind that.
WARMUP_RUNS, WARMUP_TOKENS = 3, 4
PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # names of the first argument of generate()


class GeneratingMixin(MemoryMixin):
    """The causal LM's part of it: generating with a memory."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: object,
        memory: Memory | None = None,
        **kwargs: object,
    ) -> ModelOutput | Tensor:
        """`GenerationMixin.generate` with a memory.

        Args:
            inputs: [B, T] prompt without the prefix; also as `input_ids`.
            generation_config, args: as in transformers, in its order.
            memory: the bank to draw on, or an open one, of which the current state is taken; in a later turn None keeps
                the documents of the turns before.
            routing_mask: [B, T] bool, the tokens of the prompt that route (default: all but padding; in a later turn
                all new ones). Cover the whole `input_ids`, or the attention mask where that is longer.
            force_documents: [B, n] documents to attend to instead of the routed ones.
            kwargs: what `generate` takes. Positions and prefix are handled inside. An `assistant_model` with a memory
                drafts from the same bank, a plain one without.

        Raises:
            ValueError: for an option that a memory cannot follow: a cache without room, a `prefill_chunk_size` that
                would cut the prompt before its last routing token, an assistant that cannot read the bank.
        """
        base = super().generate
        given = bind_positional(base, (inputs, generation_config, *args), kwargs)
        memory = current(memory)  # one state of an open bank for all steps
        cache = rename_cache(given)
        options = GenerationOptions(given, self.generation_config)
        if memory is None and not contexts_of(cache):
            return base(**given)
        refuse_forgetful_cache(cache)
        prompt = next((given[name] for name in PROMPTS if given.get(name) is not None), None)
        if prompt is None:
            raise ValueError("generate() with a memory needs a prompt.")
        if prompt.dim() < 2:
            raise ValueError(f"A prompt must be [batch, tokens], got {tuple(prompt.shape)}; one alone: `ids[None]`.")
        refuse_assistant(given.get("assistant_model"), memory, options)
        refuse_drafts_of_offloaded(self, options)
        refuse_attentions(options, self.config._attn_implementation)
        custom = given.get("custom_generate")
        if callable(custom):
            # Transformers keeps these two from a decoding method that is a function, whatever its signature says.
            wanted = inspect.signature(custom).parameters.keys() & {"tokenizer", "streamer"}
            given["custom_generate"] = functools.partial(
                custom, **{name: given[name] for name in wanted if given.get(name) is not None}
            )

        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            pad, eos = options["pad_token_id"], options["eos_token_id"]
            stops = eos if isinstance(eos, list | tuple) else [eos]
            if prompt.dim() == 2 and pad is not None and pad not in stops:
                mask = (prompt != pad).long()
            given["attention_mask"] = mask
        own = cache is None and options["use_cache"] is not False
        if own:
            samples = prompt.shape[0] * max(options["num_beams"] or 1, options["num_return_sequences"] or 1)
            if options["cache_implementation"] == STATIC and not options["return_dict_in_generate"]:
                # Not where it is handed out: nobody would give it back, nor what was recorded for it.
                cache = spare_cache(self, samples, most_tokens(options, mask.shape[1]))
            else:
                cache = cache_for(options, self.config, input_device(self), mask.shape[1])
            given[CACHE] = cache
            leave_out("cache_implementation", given, options)
            if options["is_assistant"]:
                cache.activate_past_recording()  # drafts that are turned down are taken back
        refuse_small_cache(cache, options, mask.shape[1])
        refuse_drafts_behind_a_window(cache, options)
        past = seen_by(cache)
        if past and options["is_assistant"]:
            given.pop("force_documents", None)  # the prompt has been seen, and its documents stay
        elif past:
            refuse_drafts(options)
        if not mask.shape[1]:
            raise ValueError("The prompt has no tokens: without a question no documents can be chosen.")
        if mask.shape[1] <= past:
            raise ValueError(
                f"The cache holds {past} tokens, `attention_mask` covers {mask.shape[1]}: pass the whole history, or "
                "the new tokens with the attention mask of the whole history."
            )

        routing_mask = given.get("routing_mask")
        if routing_mask is None:
            routing_mask = mask.bool() if memory is not None else torch.zeros_like(mask, dtype=torch.bool)
        if (missing := mask.shape[1] - routing_mask.shape[1]) > 0:
            # An assistant is called with the tokens generated so far behind the prompt.
            sides = (0, missing) if options["is_assistant"] else (missing, 0)
            routing_mask = torch.nn.functional.pad(routing_mask.bool(), sides)
        if routing_mask.shape != mask.shape:
            raise ValueError(f"`routing_mask` must be [batch, {mask.shape[1]}], got {tuple(routing_mask.shape)}.")
        if given.get("routing_mask") is not None or past:
            routing_mask = routing_mask.bool() & mask.bool()
            routing_mask[:, :past] = False
        piece = options["prefill_chunk_size"]
        if piece is not None and bool(routing_mask[:, past + piece :].any()):
            raise ValueError(
                f"`prefill_chunk_size={piece}` cuts the prompt before its last routing token, but documents must be "
                "chosen before the first token that attends to them. Put the routing tokens into the first piece with "
                "`routing_mask`, or make the pieces longer."
            )
        if given.get("force_documents") is not None and past and not bool(routing_mask.any()):
            raise ValueError(FORCED_WITHOUT_ROUTING)
        given["routing_mask"] = routing_mask
        if given.get("position_ids") is None:
            first = self.config.first_position
            given["position_ids"] = (mask.long().cumsum(1) + (first - 1)).clamp(min=first)
        pad = options["pad_token_id"]
        if pad is not None and not 0 <= int(pad) < self.config.vocab_size:
            given["padding_id"] = int(pad)
        if isinstance(cache, MSAStaticCache) and can_decode_ahead(options, cache, prompt.device):
            make_stop_strings_criteria(given, options)
            whole = mask.shape[1] == prompt.shape[1]
            given["custom_generate"] = functools.partial(
                decode_ahead,
                new_tokens=prompt.shape[1] - past if whole else None,
                streamer=given.get("streamer"),
            )
        # Transformers hands what it does not know to every step: `memory` arrives at the model's `forward`.
        with may_compile():
            output = base(memory=memory, **given)
        if cache is not None and custom is None:
            refuse_lost_cache(cache, prompt.shape[1])
        if own and isinstance(cache, MSAStaticCache) and isinstance(output, Tensor):
            keep_spare(self, samples, cache)
        return output

    def _get_candidate_generator(
        self,
        *args: object,
        model_kwargs: Arguments,
        input_ids: Tensor,
        assistant_model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> CandidateGenerator:
        """Who drafts tokens in assisted generation; transformers would hand it all that the model itself gets."""
        make = functools.partial(super()._get_candidate_generator, assistant_model=assistant_model)
        if model_kwargs.get("routing_mask") is None:  # no memory in this call
            return make(*args, model_kwargs=model_kwargs, input_ids=input_ids, **kwargs)
        drafting = drafting_arguments(model_kwargs, (*MEMORY_ARGUMENTS, "padding_id"))
        generator = make(*args, model_kwargs=drafting, input_ids=input_ids, **kwargs)
        if assistant_model is not None and has_memory(assistant_model) and model_kwargs.get("memory") is not None:
            generator.assistant_kwargs.update(memory_arguments(model_kwargs, input_ids, assistant_model.device))
        return generator

    def warmup(
        self,
        memory: Memory,
        prompt_tokens: Sequence[int] = (16, 32, 64, 128, 256),
        batch_sizes: Sequence[int] = (1,),
        max_new_tokens: int = 128,
        compile_config: CompileConfig | None = None,
        show_progress: bool = True,
    ) -> dict[tuple[int, int], float]:
        """Compile ahead what `generate(memory=memory, cache_implementation="static")` runs, and record it.

        Args:
            memory: any bank of the size and kind that will be asked; others of like documents need nothing more.
            prompt_tokens: lengths of prompts; each stands for all that are padded to the same power of two.
            batch_sizes: prompts at once.
            max_new_tokens: as of the calls to come; it decides, with the prompt, how much room the cache has.
            compile_config: as of the calls to come.
            show_progress: a progress bar (default yes).

        Returns:
            Seconds by (batch size, tokens of the prompt). Where transformers does not compile, as on the CPU, they are
            those of a plain run.

        Raises:
            TypeError, ValueError: without a memory, and for lengths and sizes that are no whole numbers from 1.
        """
        if memory is None:
            raise TypeError("warmup() compiles what runs with a memory: pass a bank of the kind that will be asked.")
        _check_sizes("prompt_tokens", prompt_tokens)
        _check_sizes("batch_sizes", batch_sizes)
        _check_sizes("max_new_tokens", (max_new_tokens,))
        seconds: dict[tuple[int, int], float] = {}
        cases = [(batch, length) for batch in batch_sizes for length in prompt_tokens]
        for batch, length in tqdm(cases, "warming up", disable=not show_progress):
            start = time.perf_counter()
            ids = torch.full((batch, length), min(self.config.vocab_size - 1, length), device=input_device(self))
            for _ in range(WARMUP_RUNS):
                self.generate(
                    ids,
                    memory=memory,
                    attention_mask=torch.ones_like(ids),
                    cache_implementation="static",
                    compile_config=compile_config,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([_stop_behind(length + WARMUP_TOKENS)]),
                )
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            seconds[batch, length] = time.perf_counter() - start
        return seconds

    def free_spare_caches(self) -> None:
        """Free the static caches that calls of `generate` have left for the next ones, and what was recorded for them.

        The next call of a kind makes its own, and records anew. Those that do not fit the model any more are freed by
        themselves when it moves to another device or dtype. What a device has for PyTorch is given back by
        `torch.cuda.empty_cache()`.
        """
        free_all(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # All that moves a model (`to`, `cuda`, `half`, ...) comes through here, a wrapper of PEFT's included.
        moved = super()._apply(fn, recurse)
        free_displaced(self)
        return moved

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., ModelOutput]:
        """The base's; with a memory, the forward, which compiles its runs by itself."""
        if compile_from_now_on(self, options_of(compile_config)):
            return self.__call__
        return super().get_compiled_call(compile_config)

    def generate_batch(self, *args: object, **kwargs: object) -> Arguments:
        """`generate_batch` of the base: continuous batching, without a memory.

        Raises:
            ValueError: where one is given, which it would not see.
        """
        if given := [name for name in MEMORY_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate_batch` got `{given[0]}`, but continuous batching knows no memory; use generate() with a "
                "batch of prompts."
            )
        return super().generate_batch(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: object,
        inputs_embeds: Tensor | None = None,
        padding_id: int | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        **kwargs: object,
    ) -> Arguments:
        """The base's, with what a step of a memory takes.

        Args:
            padding_id: a token id that stands for padding and has no row in the embedding.
        """
        # generate() takes these only where this signature names them.
        cache = rename_cache(kwargs)
        if (
            routing_mask is not None
            and kwargs.get("use_cache") is not False
            and input_ids.shape[1] > routing_mask.shape[1]
            and not kwargs.get("is_first_iteration")  # drafted tokens may come with the prompt
        ):
            refuse_lost_cache(cache, routing_mask.shape[1])
        if routing_mask is None and force_documents is not None:
            kwargs["force_documents"] = force_documents
        prepare = super().prepare_inputs_for_generation
        if routing_mask is not None and self.config.rope_length is not None:
            # Such bases drop the cache where their frequencies would switch, which they do not here.
            prepare = functools.partial(transformers.GenerationMixin.prepare_inputs_for_generation, self)
        new = kwargs.get("next_sequence_length")
        if isinstance(new, Tensor) and isinstance(cache, MSAStaticCache) and inputs_embeds is None:
            # Behind what the cache holds; transformers asks its device, and would wait for it to cut the prompt.
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.seen()
        mask = kwargs.get("attention_mask")
        own_mask = current_runs() is not None and isinstance(cache, MSAStaticCache)
        if own_mask:  # compiled runs make that of all pairs; the base makes none where one of four dimensions is there
            kwargs["attention_mask"] = input_ids.new_ones(1, 1, 1, 1)
        model_inputs = prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if own_mask:
            model_inputs["attention_mask"] = mask
        if padding_id is not None and model_inputs.get("input_ids") is not None:
            # Samples that have ended go on with padding, of which nobody reads what the model makes.
            ids = model_inputs["input_ids"]
            model_inputs["input_ids"] = ids.masked_fill(ids == padding_id, 0)
        if routing_mask is not None:
            ids = model_inputs.get("input_ids")
            length = (ids if ids is not None else model_inputs["inputs_embeds"]).shape[1]
            past = seen_by(cache)
            # Generated tokens do not route.
            if past < routing_mask.shape[1]:
                if "attention_mask" in model_inputs:  # one of all pairs, where the cache is static
                    model_inputs["attention_mask"] = mask
                part = routing_mask[:, past : past + length]
                model_inputs["routing_mask"] = torch.nn.functional.pad(part, (0, length - part.shape[1]))
                if force_documents is not None and (not past or bool(part.any())):
                    model_inputs["force_documents"] = force_documents
        return model_inputs


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    if not isinstance(sizes, Sequence) or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"`{name}` takes whole numbers, as in [16, 32], got {sizes!r}.")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"`{name}` takes numbers from 1, got {list(sizes)}.")


def _stop_behind(tokens: int) -> Callable[..., Tensor]:
    """A stopping criterion: sequences of so many tokens are done."""

    def done(input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= tokens, device=input_ids.device)

    return done


def refuse_lost_cache(cache: Cache | None, tokens: int) -> None:
    """Raise RuntimeError where a cache of `generate` did not come back with the documents and the `tokens` it has seen.

    A version of transformers that loses it, for example because it calls it by another name, would else route anew at
    every token, and answer wrongly without an error.
    """
    if cache is None or not contexts_of(cache) or seen_by(cache) < tokens:
        raise RuntimeError(
            f"transformers {transformers.__version__} did not hand the cache of the memory from one step of generate() "
            "to the next, so what is generated would be wrong. Update msa-hf, or install transformers "
            f"{NEWEST_TESTED}, the newest that this code was tested with; use_cache=False works too, and is slow."
        )
