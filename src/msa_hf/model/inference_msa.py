"""A model at work on a memory: encoding documents, attending to a bank, generating."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import logging

from .attention_config_msa import check_holds_memory
from .attention_msa import AttendingPass, EncodingDone, EncodingPass, PrefixPass
from .cache_msa import MSACache
from .compat_msa import CACHE, NEWEST_TESTED, rename_cache
from .drafting_msa import (
    drafting_arguments,
    has_memory,
    memory_arguments,
    refuse_assistant,
    refuse_drafts,
    refuse_drafts_of_offloaded,
)
from .encoding_msa import encode_documents
from .fingerprint_msa import fingerprint_of, read_weights, tokenizer_fingerprint
from .memory_msa import DenseLayer, DocumentTable, LayerMemory, Memory, MemoryBank, Snapshots
from .options_msa import GenerationOptions, bind_positional, cache_for, leave_out, refuse_attentions
from .origin_msa import BankOrigin, check_origin, default_fields, state_configuration
from .positions_msa import equivalent_length, in_positions_of
from .retrofit_msa import renumber_memory_layers
from .routing_msa import LayerRouting, routing_request, scoring_of
from .samples_msa import one_adapter
from .trial_msa import refuse_unseen
from .wrapping_msa import input_device, is_entered_by_its_call, is_sharded

logger = logging.get_logger(__name__)

PROMPTS = ("inputs", "input_ids", "inputs_embeds")  # names of the first argument of generate()
MEMORY_ARGUMENTS = ("memory", "routing_mask", "force_documents", "output_document_scores")
FORCED_WITHOUT_ROUTING = (
    "`force_documents` in a turn without routing tokens: such a turn keeps the documents of the turn before. "
    "Name the tokens that route with `routing_mask`."
)

# Banks that a model may read, and what the model was made of when that was found.
_accepted_banks: weakref.WeakKeyDictionary[Memory, weakref.WeakKeyDictionary[nn.Module, BankOrigin]] = (
    weakref.WeakKeyDictionary()
)


class MemoryMixin:
    """What the headless model and the causal LM do with a memory."""

    output_class: ClassVar[type]
    config: Any

    # Encoding ---------------------------------------------------------------------------------------------------------

    def run_base(self, backbone_only: bool = False, **kwargs: Any) -> Any:
        """One run of the base: its own forward, or only its backbone where logits are not needed.

        Raises:
            ValueError: where the attention implementation knows no memory.
        """
        check_holds_memory(self.config._attn_implementation)
        backbone = cast(Any, self).base_model
        with in_positions_of(self.config, kwargs.get("position_ids")):
            if backbone_only and backbone is not self:
                kwargs.pop("logits_to_keep", None)
                return backbone(**kwargs)
            return super().forward(**kwargs)  # type: ignore[misc]

    def run_from_outside(self, stop: bool = False, **kwargs: Any) -> Any:
        """One run of the backbone that no forward of this model surrounds.

        Args:
            stop: the pass among the arguments ends the run early, by `EncodingDone`.

        Returns:
            The output; None where the run was ended.
        """
        if is_entered_by_its_call(cast(nn.Module, self)):
            return cast(nn.Module, self)(backbone_only=True, **kwargs)
        with contextlib.suppress(EncodingDone) if stop else contextlib.nullcontext():
            return self.run_base(backbone_only=True, **kwargs)
        return None

    def encode_prefix(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [G, p, D] of the configuration's prefix in every layer; empty where there is no prefix."""
        return self.prefix_states(self.run_from_outside)

    def prefix_states(self, run: Callable[..., Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [G, p, D] of the prefix in every layer, from one `run` of the backbone."""
        ids = torch.tensor([self.config.prefix_token_ids], device=input_device(cast(nn.Module, self)))
        if ids.shape[1] == 0:
            return {}
        prefix_pass = PrefixPass()
        output = run(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape),
            use_cache=False,
            memory_pass=prefix_pass,
        )
        states = prefix_pass.finish()
        if is_sharded(cast(nn.Module, self)):
            states = prefix_pass.tied(states, output[0])
        return {layer: (key[0], value[0]) for layer, (key, value) in states.items()}

    def encode_batch(self, ids: Tensor, lengths: Tensor) -> dict[int, DenseLayer]:
        """Encode right-padded documents; nothing behind the last memory layer's keys and values is computed, unless
        the model must be run to its end.

        Args:
            ids: [N, L] int64.
            lengths: [N] int64, tokens of each document.

        Returns:
            Layer -> `DenseLayer` of their chunks, documents in order.
        """
        stop = not is_entered_by_its_call(cast(nn.Module, self))
        encoding = EncodingPass(self.config, lengths, self.config.similarity, stop=stop)
        # Padding stands behind the documents, where causal attention does not look.
        self.run_from_outside(
            stop=stop,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape),
            use_cache=False,
            memory_pass=encoding,
        )
        layers = encoding.finish()
        refuse_unseen(self.config.memory_layers, layers)
        return layers

    def encode_documents(self, documents: Iterable[Any], tokenizer: Any = None, **kwargs: Any) -> MemoryBank:
        """Encode documents into a bank (paper, 3.1). The result does not depend on batch size or order.

        Args:
            documents: an iterable, of any length, of texts, of token id lists, or of mappings such as the rows of a
                `datasets.Dataset`: `text` or `input_ids`, a `key` (default: the document's number) and anything else,
                which becomes its metadata. Where both are given, `input_ids` are encoded and `text` is kept.
            tokenizer: needed for texts.
            batch_tokens: tokens per batch, padding included (default 16384).
            max_length: longest document in tokens (default: the model's positions).
            too_long: `"error"`, or `"split"` to store longer documents in parts `key#0`, `key#1`, ..., cut at a
                paragraph, line, sentence or word where one ends in the last quarter.
            add_special_tokens: whether the tokenizer adds its own (default no).
            text_column, key_column: names of the fields of mappings.
            bank_device: where the bank is built (default: the model's device).
            show_progress: a progress bar (default yes).

        Raises:
            ValueError: for no documents, an empty or too long one, a key used twice, token ids that the model does not
                know, metadata that JSON cannot express, or states that are not finite; naming the document.
            TypeError: for what is no document.
        """
        renumber_memory_layers(self)
        return encode_documents(self, documents, tokenizer, **kwargs)

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        """Everything that a bank made by this model now depends on.

        Weights are read again only where a sample of them, or which adapters are active, has changed since.
        """
        renumber_memory_layers(self)
        weights = read_weights(cast(nn.Module, self))
        configuration = state_configuration(self.config, quantized=bool(weights.quantized))
        return BankOrigin(
            model_fingerprint=fingerprint_of(weights),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            base_model_type=self.config.base_model_type,
            chunk_size=self.config.chunk_size,
            memory_layers=tuple(self.config.memory_layers),
            similarity=self.config.similarity,
            shared_router=self.config.shared_router,
            prefix_token_ids=tuple(self.config.prefix_token_ids),
            configuration=configuration,
            configuration_defaults=default_fields(self.config.base_model_type, configuration),
            weights=weights,
            rope_length=equivalent_length(self.config),
        )

    def load_memory(self, directory: Any, tokenizer: Any = None, **kwargs: Any) -> MemoryBank:
        """Load a bank that this model made; `MemoryBank.from_pretrained` with the model filled in."""
        return MemoryBank.from_pretrained(directory, model=self, tokenizer=tokenizer, **kwargs)

    def accept_bank(self, bank: Memory) -> None:
        """Take `bank` for one that this model made, until the model's weights, adapters or configuration change."""
        _accepted_banks.setdefault(bank, weakref.WeakKeyDictionary())[cast(nn.Module, self)] = self.memory_origin()

    def open_memory(self, directory: Any = None, tokenizer: Any = None, protocol: Any = None, **options: Any) -> Any:
        """Open a bank that documents can be added to and deleted from; see `msa_hf.bank.BankStore`.

        Args:
            directory: a bank of this model, or where a new one is made. None: one that lies in memory alone.
            tokenizer: of the texts.
            protocol: how documents are wrapped, as `msa_hf.generation.PromptProtocol`; None: texts are encoded as they
                are.

        Raises:
            ImportError: where the package is not installed: a checkpoint's own code only reads banks.
        """
        try:
            module = importlib.import_module("msa_hf.bank")
        except ImportError as error:
            raise ImportError("A bank that can be changed needs the package: `pip install msa-hf`.") from error
        return module.BankStore(self, directory, tokenizer, protocol, **options)

    @torch.compiler.disable
    def _check_bank(self, bank: Memory) -> None:
        """Make sure that what this model is now made the bank; takes a few milliseconds for a model of 4B.

        While a step of training is computed, a bank that was accepted before stays so: its keys and values are
        constants there, and the weights are bound to move.
        """
        model = cast(nn.Module, self)
        accepted = _accepted_banks.setdefault(bank, weakref.WeakKeyDictionary())
        if model.training and torch.is_grad_enabled() and model in accepted:
            return
        origin = self.memory_origin()
        if accepted.get(model) != origin:
            check_origin(bank.origin, origin)
            accepted[model] = origin

    # Attending --------------------------------------------------------------------------------------------------------

    def memory_forward(
        self,
        memory: Memory | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        output_document_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Forward with a memory, or with the contexts that a cache kept from one."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "A forward with a memory cannot be exported: a graph has fixed sizes, but which documents are chosen, "
                "and how many rows they have, is known at run time alone. Export the model without `memory`."
            )
        memory = current(memory)
        inputs: Any = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        batch, length = inputs.shape[:2]
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("With a memory, `attention_mask` must be [batch, tokens].")
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache: Any = rename_cache(kwargs)
        if cache is None and use_cache:
            kwargs[CACHE] = cache = MSACache(config=self.config)
        refuse_forgetful_cache(cache)
        past = 0 if cache is None else cache.get_seq_length()
        seen = past + length
        if attention_mask is not None and attention_mask.shape[1] != seen:
            raise ValueError(f"`attention_mask` covers {attention_mask.shape[1]} tokens, but {seen} have been seen.")

        if attention_mask is not None and length > 1 and kwargs.get("input_ids") is not None:
            # What stands in the place of padding has no effect, and not always a row in the embedding.
            nowhere = (inputs < 0) | (inputs >= self.config.vocab_size)
            padding = ~attention_mask[:, past:].bool().to(inputs.device)
            kwargs["input_ids"] = inputs.masked_fill(nowhere & padding, 0)
        routing_mask = self._routing_tokens(routing_mask, attention_mask, batch, length, past, inputs.device)
        if routing_mask is not None and memory is None:
            raise ValueError(
                "This turn has routing tokens but no `memory`; pass the bank, or an all-false routing_mask."
            )
        if force_documents is not None and routing_mask is None:
            raise ValueError(FORCED_WITHOUT_ROUTING)
        request = None
        session: AbstractContextManager[Mapping[int, LayerMemory]] = contextlib.nullcontext({})
        if routing_mask is not None and memory is not None:  # not while decoding: these look at the device's data
            self._check_bank(memory)
            look_at_first_position(self, len(memory.documents))
            refuse_padding_only(attention_mask)
            if force_documents is not None:
                force_documents = self.checked_documents(force_documents, batch, len(memory.documents))
                force_documents = memory.documents.rows_of(force_documents)
            request = routing_request(
                self.config,
                scoring_of(self.config, self.config.similarity),
                routing_mask,
                memory.documents.num_rows,
                documents=force_documents,
                all_scores=output_document_scores,
                inputs=inputs,
            )
            session = memory.session(request)
        if kwargs.get("position_ids") is None:
            positions = torch.arange(past, seen, device=inputs.device).expand(batch, length)
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:].to(inputs.device)
            kwargs["position_ids"] = positions + self.config.first_position

        return_dict = kwargs.pop("return_dict", None)
        with session as layers, one_adapter(cast(nn.Module, self)) if request else contextlib.nullcontext():
            attending = AttendingPass(
                config=self.config,
                layers=layers,
                prefix={} if memory is None else memory.prefix,
                request=request,
                contexts={} if cache is None else cache.contexts,
                keep_contexts=cache is not None,
            )
            output = self.run_base(**kwargs, memory_pass=attending, return_dict=True)
        # What a mixture calls `aux_loss` is the balance of its experts, which its `loss` holds.
        fields = {name: value for name, value in output.items() if name != "aux_loss"}
        routing = attending.finish()
        if torch.is_grad_enabled() and is_sharded(cast(nn.Module, self)):
            routing = attending.tied(routing, output[0] if output.get("loss") is None else output[1])
        if request is not None:
            refuse_unseen(self.config.memory_layers, routing)
        if memory is not None:
            routing = {layer: _of_documents(found, memory.documents) for layer, found in routing.items()}
        result = type(self).output_class(**fields, routing=routing)
        return result if return_dict is not False else result.to_tuple()

    @staticmethod
    def _routing_tokens(
        routing_mask: Tensor | None, attention_mask: Tensor | None, batch: int, length: int, past: int, device: Any
    ) -> Tensor | None:
        """[B, T] bool tokens that route, or None where this turn keeps the contexts of the last."""
        real = None if attention_mask is None else attention_mask[:, past:].bool().to(device)
        if routing_mask is None:
            if past:
                return None
            return torch.ones(batch, length, dtype=torch.bool, device=device) if real is None else real
        if routing_mask.shape != (batch, length):
            raise ValueError(
                f"`routing_mask` must be [{batch}, {length}] like the input, got {tuple(routing_mask.shape)}."
            )
        routing_mask = routing_mask.bool().to(device)
        if real is not None:
            routing_mask = routing_mask & real
        return routing_mask if not past or bool(routing_mask.any()) else None

    @staticmethod
    def checked_documents(documents: Tensor, batch: int, count: int) -> Tensor:
        documents = torch.as_tensor(documents)
        if documents.dim() != 2 or documents.shape[0] != batch or documents.is_floating_point():
            raise ValueError(
                f"`force_documents` must be [{batch}, n] positions in the bank, got {tuple(documents.shape)}."
            )
        wrong = documents[(documents < -1) | (documents >= count)]
        if wrong.numel():
            raise ValueError(
                f"`force_documents` names document {int(wrong[0])}, but there are {count}; -1 stands for none."
            )
        ordered = documents.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("`force_documents` names a document twice for one sample.")
        return documents.long()


class GeneratingMixin(MemoryMixin):
    """The causal LM's part of it: generating with a memory."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        memory: Memory | None = None,
        **kwargs: Any,
    ) -> Any:
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
            ValueError: for an option that a memory cannot follow: a cache of fixed shape, a `prefill_chunk_size` that
                would cut the prompt before its last routing token, an assistant that cannot read the bank.
        """
        base = super().generate  # type: ignore[misc]
        kwargs = bind_positional(base, (inputs, generation_config, *args), kwargs)
        memory = current(memory)  # one state of an open bank for all steps
        cache: Any = rename_cache(kwargs)
        options = GenerationOptions(kwargs, cast(Any, self).generation_config)
        if memory is None and not getattr(cache, "contexts", None):
            return base(**kwargs)
        refuse_forgetful_cache(cache)
        if memory is not None:
            self._check_bank(memory)
        prompt: Any = next((kwargs[name] for name in PROMPTS if kwargs.get(name) is not None), None)
        if prompt is None:
            raise ValueError("generate() with a memory needs a prompt.")
        refuse_assistant(kwargs.get("assistant_model"), memory, options)
        refuse_drafts_of_offloaded(self, options)
        refuse_attentions(options, self.config._attn_implementation)
        custom = kwargs.get("custom_generate")
        if callable(custom):
            # Transformers keeps these two from a decoding method that is a function, whatever its signature says.
            wanted = inspect.signature(custom).parameters.keys() & {"tokenizer", "streamer"}
            kwargs["custom_generate"] = functools.partial(
                custom, **{name: kwargs[name] for name in wanted if kwargs.get(name) is not None}
            )

        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            pad, eos = options["pad_token_id"], options["eos_token_id"]
            stops = eos if isinstance(eos, list | tuple) else [eos]
            if prompt.dim() == 2 and pad is not None and pad not in stops:
                mask = (prompt != pad).long()
            kwargs["attention_mask"] = mask
        if cache is None and options["use_cache"] is not False:
            kwargs[CACHE] = cache = cache_for(options, self.config, input_device(cast(nn.Module, self)))
            leave_out("cache_implementation", kwargs, options)
            if options["is_assistant"]:
                cache.activate_past_recording()  # drafts that are turned down are taken back
        past = 0 if cache is None else cache.get_seq_length()
        if past and options["is_assistant"]:
            kwargs.pop("force_documents", None)  # the prompt has been seen, and its documents stay
        elif past:
            refuse_drafts(options)
        if mask.shape[1] <= past:
            raise ValueError(
                f"The cache holds {past} tokens, `attention_mask` covers {mask.shape[1]}: pass the whole history, or "
                "the new tokens with the attention mask of the whole history."
            )

        routing_mask = kwargs.get("routing_mask")
        if routing_mask is None:
            routing_mask = torch.full_like(mask, memory is not None, dtype=torch.bool)
        if (missing := mask.shape[1] - routing_mask.shape[1]) > 0:
            # An assistant is called with the tokens generated so far behind the prompt.
            sides = (0, missing) if options["is_assistant"] else (missing, 0)
            routing_mask = torch.nn.functional.pad(routing_mask.bool(), sides)
        if routing_mask.shape != mask.shape:
            raise ValueError(f"`routing_mask` must be [batch, {mask.shape[1]}], got {tuple(routing_mask.shape)}.")
        routing_mask = routing_mask.bool() & mask.bool()
        routing_mask[:, :past] = False
        piece = options["prefill_chunk_size"]
        if piece is not None and bool(routing_mask[:, past + piece :].any()):
            raise ValueError(
                f"`prefill_chunk_size={piece}` cuts the prompt before its last routing token, but documents must be "
                "chosen before the first token that attends to them. Put the routing tokens into the first piece with "
                "`routing_mask`, or make the pieces longer."
            )
        if kwargs.get("force_documents") is not None and past and not bool(routing_mask.any()):
            raise ValueError(FORCED_WITHOUT_ROUTING)
        kwargs["routing_mask"] = routing_mask
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0) + self.config.first_position
        pad = options["pad_token_id"]
        if pad is not None and not 0 <= int(pad) < self.config.vocab_size:
            kwargs["padding_id"] = int(pad)
        output = base(memory=memory, **kwargs)
        if cache is not None and custom is None:
            refuse_lost_cache(cache, prompt.shape[1])
        return output

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: dict[str, Any], input_ids: Tensor, **kwargs: Any
    ) -> Any:
        """Who drafts tokens in assisted generation; transformers would hand it all that the model itself gets."""
        make = super()._get_candidate_generator  # type: ignore[misc]
        if model_kwargs.get("routing_mask") is None:  # no memory in this call
            return make(*args, model_kwargs=model_kwargs, input_ids=input_ids, **kwargs)
        assistant = kwargs.get("assistant_model")
        drafting = drafting_arguments(model_kwargs, (*MEMORY_ARGUMENTS, "padding_id"))
        generator = make(*args, model_kwargs=drafting, input_ids=input_ids, **kwargs)
        if assistant is not None and has_memory(assistant) and model_kwargs.get("memory") is not None:
            generator.assistant_kwargs.update(memory_arguments(model_kwargs, input_ids, assistant.device))
        return generator

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """`generate_batch` of the base: continuous batching, without a memory.

        Raises:
            ValueError: where one is given, which it would not see.
        """
        if given := [name for name in MEMORY_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate_batch` got `{given[0]}`, but continuous batching knows no memory; use generate() with a "
                "batch of prompts."
            )
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        padding_id: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The base's, with what a step of a memory takes.

        Args:
            padding_id: a token id that stands for padding and has no row in the embedding.
        """
        # generate() takes `inputs_embeds` and `padding_id` only where this signature names them.
        cache: Any = rename_cache(kwargs)
        routing_mask = kwargs.pop("routing_mask", None)
        if (
            routing_mask is not None
            and kwargs.get("use_cache") is not False
            and input_ids.shape[1] > routing_mask.shape[1]
            and not kwargs.get("is_first_iteration")  # drafted tokens may come with the prompt
        ):
            refuse_lost_cache(cache, routing_mask.shape[1])
        force_documents = None if routing_mask is None else kwargs.pop("force_documents", None)
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        if routing_mask is not None and self.config.rope_length is not None:
            # Such bases drop the cache where their frequencies would switch, which they do not here.
            prepare = functools.partial(transformers.GenerationMixin.prepare_inputs_for_generation, cast(Any, self))
        model_inputs = prepare(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if padding_id is not None and model_inputs.get("input_ids") is not None:
            # Samples that have ended go on with padding, of which nobody reads what the model makes.
            ids = model_inputs["input_ids"]
            model_inputs["input_ids"] = ids.masked_fill(ids == padding_id, 0)
        if routing_mask is not None:
            ids = model_inputs.get("input_ids")
            length = (ids if ids is not None else model_inputs["inputs_embeds"]).shape[1]
            past = 0 if cache is None else cache.get_seq_length()
            # Generated tokens do not route.
            if past < routing_mask.shape[1]:
                part = routing_mask[:, past : past + length]
                model_inputs["routing_mask"] = torch.nn.functional.pad(part, (0, length - part.shape[1]))
                if force_documents is not None and (not past or bool(part.any())):
                    model_inputs["force_documents"] = force_documents
        return model_inputs


def current(memory: Memory | None) -> Memory | None:
    """The state that an open bank is in now; a bank is its own, and so is None.

    Raises:
        TypeError: for what is no memory.
    """
    if memory is None:
        return None
    if not isinstance(memory, Snapshots):
        raise TypeError(f"`memory` must be a MemoryBank, as encode_documents() returns, got {type(memory).__name__}.")
    return memory.snapshot()


def look_at_first_position(model: Any, documents: int) -> None:
    """Say, once, where `top_k` leaves so much room that a question stands behind the positions that a model knows.

    Raises:
        ValueError: where it knows positions by a table, which has no row there.
    """
    first, limit = model.config.first_position, getattr(model.config, "max_position_embeddings", None)
    if limit is None or first < limit:
        return
    problem = (
        f"`top_k={model.config.top_k}` puts the first token of a question at position {first}, but the model knows "
        f"{limit} positions. {documents} documents need no more than `model.config.top_k = {documents}`."
    )
    tables = (name for name, item in model.named_modules() if isinstance(item, nn.Embedding))
    if any("position" in name or name.endswith("wpe") for name in tables):
        raise ValueError(problem)
    logger.warning_once(f"{problem} What the model answers beyond them may be of no use.")


def refuse_forgetful_cache(cache: Any) -> None:
    """Raise TypeError for a cache that has no place for the documents chosen."""
    if cache is not None and not hasattr(cache, "contexts"):
        raise TypeError(
            f"A memory needs an MSACache, which keeps the chosen documents, got {type(cache).__name__}; "
            f"leave `{CACHE}` out or pass MSACache(config=model.config)."
        )


def refuse_lost_cache(cache: Any, tokens: int) -> None:
    """Raise RuntimeError where a cache of `generate` did not come back with the documents and the `tokens` it has seen.

    A version of transformers that loses it, for example because it calls it by another name, would else route anew at
    every token, and answer wrongly without an error.
    """
    if not getattr(cache, "contexts", None) or cache.get_seq_length() < tokens:
        raise RuntimeError(
            f"transformers {transformers.__version__} did not hand the cache of the memory from one step of generate() "
            "to the next, so what is generated would be wrong. Update msa-hf, or install transformers "
            f"{NEWEST_TESTED}, the newest that this code was tested with; use_cache=False works too, and is slow."
        )


def _of_documents(routing: LayerRouting, documents: DocumentTable) -> LayerRouting:
    """What was routed over the rows of a bank, of which some may be deleted, in terms of its documents."""
    if not len(documents.deleted):
        return routing
    scores = routing.document_scores
    if scores is not None:
        scores = scores.index_select(1, documents.rows_of(torch.arange(len(documents))).to(scores.device))
    return LayerRouting(documents.positions_of(routing.documents), routing.scores, scores)


def refuse_padding_only(attention_mask: Tensor | None) -> None:
    """Raise ValueError where a row of `attention_mask` [B, T] has no token."""
    if attention_mask is not None and not bool(attention_mask.bool().any(1).all()):
        question = int((~attention_mask.bool().any(1)).nonzero()[0])
        raise ValueError(f"Question {question} of the batch is only padding; leave it out.")


def attends(kwargs: dict[str, Any]) -> bool:
    """Tell whether a forward call has a memory, given now or kept in its cache."""
    if kwargs.get("memory") is not None:
        return True
    contexts = getattr(rename_cache(kwargs), "contexts", None)
    if not contexts and any(kwargs.get(name) is not None for name in ("routing_mask", "force_documents")):
        raise ValueError("`routing_mask` and `force_documents` need a `memory`.")
    return bool(contexts)


def without_memory(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in MEMORY_ARGUMENTS}
