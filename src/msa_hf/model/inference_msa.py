"""A model at work on a memory: encoding documents, attending to a bank, generating."""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput, logging

from .attention_config_msa import check_holds_memory
from .attention_msa import AttendingPass, EncodingDone, EncodingPass, PrefixPass
from .cache_msa import MSACache, MSAStaticCache, SettlesContexts, contexts_of, holds_contexts
from .compat_msa import CACHE, empty_cache, rename_cache
from .compiled_layers_msa import SeparatePass
from .compiled_msa import current_runs
from .configuration_msa import MSAConfig
from .encoded_batches_msa import EncodedWindow, EncodingLayers
from .encoding_msa import encode_documents, encode_rows
from .fingerprint_msa import fingerprint_of, read_weights, tokenizer_fingerprint
from .interface_msa import MEMORY_INTERFACE
from .known_masks_msa import ones_like
from .memory_msa import DenseLayer, DocumentTable, LayerMemory, Memory, MemoryBank, OpenSession, Snapshots
from .origin_msa import BankOrigin, check_origin, state_fields
from .positions_msa import equivalent_length, in_positions_of
from .recalling_msa import Asked
from .retrofit_msa import renumber_memory_layers
from .routing_msa import LayerRouting, routing_request, scoring_of
from .samples_msa import one_adapter
from .trial_msa import refuse_unseen
from .types_msa import Arguments, ModelMixin, RawDocument
from .wrapping_msa import input_device, is_entered_by_its_call, is_sharded

logger = logging.get_logger(__name__)

MEMORY_ARGUMENTS = ("memory", "routing_mask", "force_documents", "output_document_scores")
FORCED_WITHOUT_ROUTING = (
    "`force_documents` in a turn without routing tokens: such a turn keeps the documents of the turn before. "
    "Name the tokens that route with `routing_mask`."
)

# Banks that a model may read, and what the model was made of when that was found.
_accepted_banks: weakref.WeakKeyDictionary[Memory, weakref.WeakKeyDictionary[nn.Module, BankOrigin]] = (
    weakref.WeakKeyDictionary()
)


class MemoryMixin(ModelMixin):
    """What the headless model and the causal LM do with a memory."""

    output_class: ClassVar[type]
    config: MSAConfig
    memory_interface: ClassVar[int] = MEMORY_INTERFACE  # `check_interface` asks models of other releases for it

    # Encoding ---------------------------------------------------------------------------------------------------------

    def run_base(
        self, backbone_only: bool = False, *, position_ids: Tensor | None = None, **kwargs: object
    ) -> ModelOutput:
        """One run of the base: its own forward, or only its backbone where logits are not needed.

        Raises:
            ValueError: where the attention implementation knows no memory.
        """
        check_holds_memory(self.config._attn_implementation)
        backbone = self.base_model
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        with in_positions_of(self.config, position_ids):
            if backbone_only and backbone is not self:
                kwargs.pop("logits_to_keep", None)
                return backbone(**kwargs)
            return super().forward(**kwargs)

    def run_plainly(self, **kwargs: object) -> ModelOutput:
        """The base's own forward, for a graph: `run_base` without what stands around it."""
        return super().forward(**kwargs)

    def run_from_outside(self, stop: bool = False, **kwargs: Any) -> ModelOutput | None:
        """One run of the backbone that no forward of this model surrounds.

        Args:
            stop: the pass among the arguments ends the run early, by `EncodingDone`; only where the caller knows that
                the model is not `is_entered_by_its_call`.

        Returns:
            The output; None where the run was ended.
        """
        if not stop and is_entered_by_its_call(self):
            return self(backbone_only=True, **kwargs)
        with contextlib.suppress(EncodingDone) if stop else contextlib.nullcontext():
            return self.run_base(backbone_only=True, **kwargs)
        return None

    def encode_prefix(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [G, p, D] of the configuration's prefix in every layer; empty where there is no prefix."""
        return self.prefix_states(self.run_from_outside)

    def prefix_states(self, run: Callable[..., ModelOutput]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values [G, p, D] of the prefix in every layer, from one `run` of the backbone."""
        ids = torch.tensor([self.config.prefix_token_ids], device=input_device(self))
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
        if is_sharded(self):
            states = prefix_pass.tied(states, output[0])
        return {layer: (key[0], value[0]) for layer, (key, value) in states.items()}

    def encode_batch(self, ids: Tensor, lengths: Tensor, separately: bool = False) -> dict[int, DenseLayer]:
        """Encode right-padded documents; nothing behind the last memory layer's keys and values is computed, unless
        the model must be run to its end.

        Args:
            ids: [N, L] int64.
            lengths: [N] int64, tokens of each document; on the CPU, so that no layer waits for the device.
            separately: under `CompiledLayers`.

        Returns:
            Layer -> `DenseLayer` of their chunks, documents in order.
        """
        stop = not is_entered_by_its_call(self)
        encoding = EncodingPass(self.config, lengths, self.config.similarity, stop=stop)
        # Padding stands behind the documents, where causal attention does not look. What wraps a model may take its
        # arguments apart, and gets a mask that is a plain tensor.
        self.run_from_outside(
            stop=stop,
            input_ids=ids,
            attention_mask=ones_like(ids) if stop else torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape),
            use_cache=False,
            memory_pass=SeparatePass(encoding) if separately else encoding,
        )
        layers = encoding.finish()
        refuse_unseen(self.config.memory_layers, layers)
        return layers

    def encode_documents(
        self,
        documents: Iterable[RawDocument] | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> MemoryBank:
        """Encode documents into a bank (paper, 3.1). The result does not depend on batch size or order.

        Args:
            documents: an iterable, of any length, of texts, of token id lists, or of mappings such as the rows of a
                `datasets.Dataset`: `text` or `input_ids`, a `key` (default: the document's number) and anything else,
                which becomes its metadata. Where both are given, `input_ids` are encoded and `text` is kept. Or a table
                of pandas, polars or pyarrow; documents of LangChain or LlamaIndex; the `Path` of a file or folder,
                read by the package (`msa_hf.data.read_documents` has options). What has a length is looked through
                before anything is encoded.
            tokenizer: needed for texts.
            batch_tokens: tokens per batch, padding included (default 16384).
            max_length: longest document in tokens (default: the model's positions).
            too_long: `"error"`, or `"split"` to store longer documents in parts `key#0`, `key#1`, ..., cut at a
                paragraph, line, sentence or word where one ends in the last quarter.
            add_special_tokens: whether the tokenizer adds its own (default no).
            text_column, key_column: names of the fields of mappings.
            bank_device: where the bank is built (default: the model's device).
            show_progress: a progress bar (default yes).
            compile_layers: run the decoder layers compiled. The first call compiles, for a minute or more; later ones
                of the process, whatever the documents' lengths, do not. Results differ in the order of a last digit.
            fp8_projections: run the projections of the decoder layers, not the routers', in 8-bit floats (e4m3, a scale
                per token and per output); for GPUs that have them, together with `compile_layers`. Keys and values
                differ by some hundredths of their length from those of the model's dtype (default no).
            non_blocking: return once everything was given to a GPU; the bank's `layers`, when they are first asked for,
                wait for it, and raise for states that are not finite (default no).

        Raises:
            ValueError: for no documents, an empty or too long one, a key used twice, token ids that the model does not
                know, metadata that JSON cannot express, or states that are not finite; naming the document.
            TypeError: for what is no document.
        """
        renumber_memory_layers(self)
        return encode_documents(self, documents, tokenizer, **kwargs)

    def encoding_layers(self, compile_layers: bool = False, fp8_projections: bool = False) -> EncodingLayers:
        """The model's layers as `encode_rows` runs them, with the weights that it has now.

        Args:
            compile_layers, fp8_projections: as of `encode_documents`.

        Raises:
            ValueError: for models and devices that cannot have them.
        """
        renumber_memory_layers(self)
        with torch.inference_mode(False):
            return EncodingLayers(self, compile_layers, fp8_projections)

    def encode_rows(self, keys: Sequence[str], ids: Sequence[Tensor], **kwargs: Any) -> EncodedWindow:
        """Give documents whose token ids are there to the model, in batches sorted by length, for who puts the bank
        together: without a prefix, an origin or a look at what is given.

        Args:
            keys: of the documents, for messages.
            ids: [tokens] int64 of each on the CPU, no fewer than 1 and no more than the model has positions for.
            bank_device: where the memory is to lie.
            counted: called with the places of documents that were given to the model.
            layers: of `encoding_layers`, those of all rows of a corpus (default: the model's own).
            batch_tokens: as of `encode_documents`.

        Returns:
            What may still be computed on a GPU; its `layers()` waits for that, and returns layer -> `DenseLayer`.

        Raises:
            ValueError: for states that are not finite, naming the document; here or from `layers()`.
        """
        renumber_memory_layers(self)
        return encode_rows(self, keys, ids, **kwargs)

    def memory_origin(self, tokenizer: PreTrainedTokenizerBase | None = None) -> BankOrigin:
        """Everything that a bank made by this model now depends on.

        Weights are read again only where a sample of them, or which adapters are active, has changed since.
        """
        renumber_memory_layers(self)
        weights, kind = read_weights(self), self.config.base_model_type
        assert kind is not None
        fields = state_fields(self, kind, quantized=bool(weights.quantized))
        return BankOrigin(
            model_fingerprint=fingerprint_of(weights),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            base_model_type=kind,
            chunk_size=self.config.chunk_size,
            memory_layers=tuple(self.config.memory_layers),
            similarity=self.config.similarity,
            shared_router=self.config.shared_router,
            prefix_token_ids=tuple(self.config.prefix_token_ids),
            configuration=fields.configuration,
            configuration_defaults=fields.defaults,
            weights=weights,
            rope_length=equivalent_length(self.config),
        )

    def load_memory(
        self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any
    ) -> MemoryBank:
        """Load a bank that this model made; `MemoryBank.from_pretrained` with the model filled in."""
        return MemoryBank.from_pretrained(directory, model=self, tokenizer=tokenizer, **kwargs)

    def accept_bank(self, bank: Memory) -> None:
        """Take `bank` for one that this model made, until the model's weights, adapters or configuration change."""
        _accepted_banks.setdefault(bank, weakref.WeakKeyDictionary())[self] = self.memory_origin()

    def open_memory(
        self,
        directory: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        protocol: object = None,
        **options: object,
    ) -> Memory:
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
        accepted = _accepted_banks.setdefault(bank, weakref.WeakKeyDictionary())
        if self.training and torch.is_grad_enabled() and self in accepted:
            return
        origin = self.memory_origin()
        if accepted.get(self) != origin:
            check_origin(bank.origin, origin)
            accepted[self] = origin

    def _check_bank_behind(self, bank: Memory, cache: Cache | None) -> None:
        """`_check_bank` behind a run, of which nothing stays in its cache where the bank is refused."""
        try:
            self._check_bank(bank)
        except BaseException:
            if cache is not None:
                empty_cache(cache)
            raise

    def _accepts(self, bank: Memory) -> bool:
        """Tell whether this model has read `bank` before."""
        return self in _accepted_banks.get(bank, {})

    # Attending --------------------------------------------------------------------------------------------------------

    def memory_forward(
        self,
        memory: Memory | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        output_document_scores: bool = False,
        *,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[object, ...]:
        """Forward with a memory, or with the contexts that a cache kept from one."""
        if torch.compiler.is_exporting():
            raise ValueError(
                "A forward with a memory cannot be exported: a graph has fixed sizes, but which documents are chosen, "
                "and how many rows they have, is known at run time alone. Export the model without `memory`."
            )
        memory = current(memory)
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        batch, length = inputs.shape[:2]
        kwargs |= {} if use_cache is None else {"use_cache": use_cache}
        cache = rename_cache(kwargs)
        if cache is None and (vars(self.config).get("use_cache", True) if use_cache is None else use_cache):
            kwargs[CACHE] = cache = MSACache(config=self.config)
        refuse_forgetful_cache(cache)
        past = seen_by(cache)
        seen = past + length
        kwargs |= {} if attention_mask is None else {"attention_mask": attention_mask}
        if past and routing_mask is None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
            attention_mask = None  # of a step that keeps its documents: the base alone reads it, in whatever form
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("With a memory, `attention_mask` must be [batch, tokens].")
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
        known = False
        if routing_mask is not None and memory is not None:  # not while decoding: these look at the device's data
            # What was read before is looked at again while the device works, before anybody gets what it read.
            known = not past and works_beside_the_host(inputs.device) and self._accepts(memory)
            if not known:
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
        if kwargs.get("position_ids") is None:
            positions = torch.arange(past, seen, device=inputs.device).expand(batch, length)
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:].to(inputs.device)
            kwargs["position_ids"] = positions + self.config.first_position

        session: AbstractContextManager[Mapping[int, LayerMemory]] = OpenSession({})
        if memory is not None and request is not None:
            session = memory.session(request)
        with session as layers, one_adapter(self) if request else contextlib.nullcontext():
            attending = AttendingPass(
                config=self.config,
                layers=layers,
                prefix={} if memory is None else memory.prefix,
                request=request,
                contexts=contexts_of(cache),
                keep_contexts=cache is not None,
            )
            checking = _do_nothing
            if known and memory is not None:
                checking = functools.partial(self._check_bank_behind, memory, cache)
            fields = self._run_compiled(attending, memory, cache, kwargs, checking)
            if fields is None:
                fields = dict(self.run_base(**kwargs, memory_pass=attending, return_dict=True))
                checking()
        if isinstance(cache, MSAStaticCache):
            cache.counted = seen
        routing = attending.finish()
        if torch.is_grad_enabled() and is_sharded(self):
            first, second, *_ = *fields.values(), None
            routing = attending.tied(routing, first if fields.get("loss") is None else second)
        if request is not None:
            refuse_unseen(self.config.memory_layers, routing)
            if isinstance(cache, SettlesContexts):
                cache.settle_contexts()
        if memory is not None:
            routing = {layer: _of_documents(found, memory.documents) for layer, found in routing.items()}
        fields.pop("aux_loss", None)  # of a mixture: the balance of its experts, which its `loss` holds
        result = type(self).output_class(**fields, routing=routing)
        return result if return_dict is not False else result.to_tuple()

    def _run_compiled(
        self,
        attending: AttendingPass,
        memory: Memory | None,
        cache: Cache | None,
        inputs: Arguments,
        meanwhile: Callable[[], None],
    ) -> Arguments | None:
        """The fields of the base's output in a run that `generate` compiles, as if the pass had gone through the
        layers; None for any other run.

        Args:
            meanwhile: what the host does while the device works; for a prompt.
        """
        runs, request = current_runs(), attending.request
        static = None if runs is None else runs.taken(self, cache, inputs)
        if runs is None or static is None:
            return None
        if request is None:
            return runs.run_turn(self, static, inputs) if attending.previous else None
        if memory is None or request.documents is not None or request.all_scores:
            return None
        asked = Asked(attending.layers, request)
        chosen = runs.run_prompt(self, memory, asked, attending.previous, static, inputs, meanwhile)
        if chosen is None:
            return None
        attending.take(chosen.routing())
        return chosen.output

    @staticmethod
    def _routing_tokens(
        routing_mask: Tensor | None,
        attention_mask: Tensor | None,
        batch: int,
        length: int,
        past: int,
        device: torch.device,
    ) -> Tensor | None:
        """[B, T] bool tokens that route, or None where this turn keeps the contexts of the last."""
        if routing_mask is None and past:
            return None
        real = None if attention_mask is None else attention_mask[:, past:].bool().to(device)
        if routing_mask is None:
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


def look_at_first_position(model: PreTrainedModel, documents: int) -> None:
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


def _do_nothing() -> None:
    pass


def works_beside_the_host(device: torch.device) -> bool:
    """Tell whether the host has time while a device computes."""
    return device.type != "cpu"


def seen_by(cache: Cache | None) -> int:
    """Tokens that a cache holds; one that keeps their number on its device may be waited for."""
    if isinstance(cache, MSAStaticCache):
        return cache.seen()
    return 0 if cache is None else int(cache.get_seq_length())


def refuse_forgetful_cache(cache: Cache | None) -> None:
    """Raise TypeError for a cache that has no place for the documents chosen."""
    if cache is not None and not holds_contexts(cache):
        raise TypeError(
            f"A memory needs an MSACache, which keeps the chosen documents, got {type(cache).__name__}; "
            f"leave `{CACHE}` out or pass MSACache(config=model.config)."
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


def attends(
    memory: Memory | None, routing_mask: Tensor | None, force_documents: Tensor | None, kwargs: Arguments
) -> bool:
    """Tell whether a forward call has a memory, given now or kept in its cache."""
    if memory is not None:
        return True
    contexts = contexts_of(rename_cache(kwargs))
    if not contexts and (routing_mask is not None or force_documents is not None):
        raise ValueError("`routing_mask` and `force_documents` need a `memory`.")
    return bool(contexts)
