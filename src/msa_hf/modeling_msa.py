"""`MSAForCausalLM` and `MSAModel`: any decoder of transformers with a Memory Sparse Attention memory.

Both are mixins in front of the base's own class: `MSAForCausalLM(config)` makes an instance of a class
`MSA<Base>ForCausalLM(MSAForCausalLM, <Base>ForCausalLM)`, so parameter names are the base's, plus the routers.
"""

from __future__ import annotations

import inspect
import shutil
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging

from .attention_msa import IMPLEMENTATIONS, AttendingPass, EncodingDone, EncodingPass, PrefixPass, chunks_of
from .cache_msa import MSACache
from .configuration_msa import AUTO_MAP, FIELDS, MSAConfig, published_fields
from .encoding_msa import encode_documents
from .memory_msa import BankOrigin, LayerMemory, MemoryBank, model_fingerprint, tokenizer_fingerprint
from .retrofit_msa import (
    ROUTER_MODULES,
    attach_routers,
    attention_layers,
    detach_routers,
    initialize_routers,
    memory_implementation,
    refuse_unsupported,
)
from .routing_msa import LayerRouting
from .training_msa import PackedRows, auxiliary_loss, pooled_documents, positive_mask, unpack_rows

logger = logging.get_logger(__name__)

# What a checkpoint carries so that it loads with trust_remote_code where this package is not installed.
REMOTE_FILES = tuple(
    f"{name}_msa.py"
    for name in (
        "attention",
        "cache",
        "chunks",
        "configuration",
        "encoding",
        "memory",
        "modeling",
        "retrofit",
        "routing",
        "storage",
        "training",
    )
)
# Published checkpoints keep each router projection in a one-element Sequential.
PUBLISHED_NAMES = {r"router_q_proj\.0\.": "router_q_proj.", r"router_k_proj\.0\.": "router_k_proj."}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
MEMORY_ARGUMENTS = ("memory", "routing_mask", "force_documents", "output_document_scores")
TRAINING_ARGUMENTS = ("doc_ids", "documents", "positive_docs", "answer_labels")

# Banks whose origin was compared with a model's; comparing reads a sample of every weight, so it is done once.
_accepted_banks: weakref.WeakKeyDictionary[MemoryBank, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


@dataclass
class MSACausalLMOutput(CausalLMOutputWithPast):
    """Output of a causal LM that attended to a memory.

    Attributes:
        loss: weighted sum of the losses below, where labels or positive documents were given.
        lm_loss: language-model loss.
        aux_loss: auxiliary loss of the routers.
        answer_loss: language-model loss over `answer_labels`.
        routing: memory layer -> `LayerRouting`; empty in a turn that does not route.
    """

    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    answer_loss: Tensor | None = None
    routing: dict[int, LayerRouting] | None = None


@dataclass
class MSAModelOutput(BaseModelOutputWithPast):
    """Output of a headless model that attended to a memory; `routing` as in `MSACausalLMOutput`."""

    routing: dict[int, LayerRouting] | None = None


class BaseGenerationConfig(GenerationConfig):
    """Reads generation options from the base's part of a configuration: our `top_k` counts documents, not tokens."""

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        return GenerationConfig.from_model_config(model_config.base_config())


class MemoryMixin:
    """What the headless model and the causal LM share."""

    base_class: ClassVar[type[PreTrainedModel]]
    base_mapping: ClassVar[Any]
    output_class: ClassVar[type]
    generation_config_class = BaseGenerationConfig
    config: Any

    # Construction -----------------------------------------------------------------------------------------------------

    def __new__(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        if "base_class" not in cls.__dict__ and config is not None:
            cls = cls.class_for(config.base_model_type)
        return super().__new__(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach_routers(cast(nn.Module, self), config)
        if not next(cast(nn.Module, self).parameters()).is_meta:
            initialize_routers(self, "random")
        self.set_attn_implementation(config._attn_implementation)

    @classmethod
    def class_for(cls, base_model_type: str) -> type:
        """The class that puts a memory on models of `base_model_type`; made once, then looked up.

        Raises:
            ValueError: for a kind of model that cannot hold a memory, naming what is missing.
        """
        config_class = type(AutoConfig.for_model(base_model_type))
        base_class = cls.base_mapping.get(config_class, None)
        return cls._class_on(base_class if not isinstance(base_class, tuple) else base_class[0], base_model_type)

    @classmethod
    def _class_on(cls, base_class: type | None, base_model_type: str) -> type:
        if base_class is None:
            refuse_unsupported(AutoConfig.for_model(base_model_type), base_class)
        assert base_class is not None
        name = f"MSA{base_class.__name__}"
        if name in globals():
            return globals()[name]
        namespace = {
            "__module__": __name__,
            "__doc__": f"`{base_class.__name__}` with a Memory Sparse Attention memory.",
            "base_class": base_class,
            "config_class": MSAConfig,
            "forward": _named_forward(cls, base_class),
            "_keys_to_ignore_on_load_unexpected": [
                *(getattr(base_class, "_keys_to_ignore_on_load_unexpected", None) or []),
                r"^temperature$",  # frozen scalar of published checkpoints; it is `aux_temperature`
            ],
        }
        made = type(name, (cls, base_class), namespace)
        # Without the base's conversions, checkpoints whose tensors are renamed or merged on loading would be read wrongly.
        conversions = get_checkpoint_conversion_mapping(base_class.__name__)
        if conversions is None:
            conversions = get_checkpoint_conversion_mapping(base_model_type)
        if conversions is not None:
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
        globals()[name] = made  # so that instances can be pickled
        return made

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers reads the source of the file that defines the class; the experts are in the base's.
        return cls.base_class._can_set_experts_implementation()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: checkpoints always carry their code (see `save_pretrained`)."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a checkpoint of this library, or one in the layout of the published MSA models.

        Takes what `PreTrainedModel.from_pretrained` takes, and the memory's fields of `MSAConfig` as overrides.
        """
        if "base_class" not in cls.__dict__:
            if config is None:
                hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
                own = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
                config = MSAConfig.from_pretrained(pretrained_model_name_or_path, **hub, **own)
            made = cls.class_for(config.base_model_type)
            return made.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[attr-defined]
        kwargs.pop("trust_remote_code", None)
        kwargs["key_mapping"] = {**PUBLISHED_NAMES, **(kwargs.get("key_mapping") or {})}
        wants_info = kwargs.pop("output_loading_info", False)
        router_init = kwargs.pop("router_init", "copy")
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        if getattr(getattr(model, "generation_config", None), "_from_model_config", False):
            # Transformers read the options from config.json, for want of a generation_config.json.
            model.generation_config = BaseGenerationConfig.from_model_config(model.config)
        missing = [name for name in info["missing_keys"] if any(f".{router}." in name for router in ROUTER_MODULES)]
        if missing:
            layers = [
                layer
                for layer, module in attention_layers(model).items()
                if any(name.startswith(f"{_name_of(model, module)}.router_") for name in missing)
            ]
            initialize_routers(model, router_init, sorted(layers))
            logger.warning(
                f"The routers of layers {sorted(layers)} are untrained ({router_init} of the base's weights)."
            )
        return (model, info) if wants_info else model

    @classmethod
    def from_base(
        cls,
        name_or_path_or_model: Any,
        memory_layers: list[int] | None = None,
        chunk_size: int = 64,
        top_k: int = 16,
        router_init: str = "copy",
        similarity: str = "cosine",
        **kwargs: Any,
    ) -> Any:
        """Give a plain model a memory.

        Args:
            name_or_path_or_model: a checkpoint, loaded with a memory from the start; or a live model, which is changed
                in place (`to_base()` undoes it) and returned.
            memory_layers: default the full-attention layers of the upper half.
            chunk_size: tokens per chunk.
            top_k: documents per memory layer.
            router_init: `"copy"` starts the routers from each layer's own query and key projections, `"random"` from
                the model's initialiser.
            similarity: `"cosine"` or `"dot"`.
            kwargs: other memory fields of `MSAConfig`; for a checkpoint also arguments of `from_pretrained`.

        Raises:
            ValueError: for a model that cannot hold a memory, naming what is missing.
        """
        own = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        own.update(memory_layers=memory_layers, chunk_size=chunk_size, top_k=top_k, similarity=similarity)
        if router_init not in ("copy", "random"):
            raise ValueError(f"`router_init` must be 'copy' or 'random', got {router_init!r}.")
        if isinstance(name_or_path_or_model, nn.Module):
            if kwargs:
                raise TypeError(f"from_base() of a live model got unexpected arguments {sorted(kwargs)}.")
            return cls._retrofit(name_or_path_or_model, own, router_init)
        hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
        base_config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name_or_path_or_model, **hub)
        config = cls._config_on(base_config, own)
        made = cls.class_for(config.base_model_type)
        return made.from_pretrained(name_or_path_or_model, config=config, router_init=router_init, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _config_on(cls, base_config: PreTrainedConfig, own: dict[str, Any]) -> MSAConfig:
        if base_config.model_type == MSAConfig.model_type:
            raise ValueError("The model has a memory already; load it with from_pretrained().")
        base_class = cls.base_mapping.get(type(base_config), None)
        refuse_unsupported(base_config, base_class)
        fields = base_config.to_dict()
        fields.pop("model_type")
        return MSAConfig(base_model_type=base_config.model_type, **fields, **own)

    @classmethod
    def _retrofit(cls, model: Any, own: dict[str, Any], router_init: str) -> Any:
        if hasattr(model, "_hf_hook"):
            raise ValueError(
                "The model was dispatched over devices by accelerate, which wraps its forward; "
                "pass its name or path to from_base() together with `device_map` instead."
            )
        config = cls._config_on(model.config, own)
        attention_layers(model)
        implementation = memory_implementation(model.config._attn_implementation)
        made = cls._class_on(type(model), config.base_model_type)
        old = model.config
        _replace_config(model, old, config)
        config._attn_implementation = old._attn_implementation
        config._experts_implementation = old._experts_implementation
        attach_routers(model, config)
        model.__class__ = made
        try:
            initialize_routers(model, router_init)
            model.set_attn_implementation(implementation)
        except Exception:
            model.to_base()
            raise
        logger.warning_once("The routers are untrained: what they choose means little until they have been trained.")
        return model

    def to_base(self) -> PreTrainedModel:
        """Take the memory off again: the same object, of the base's class, without routers. Undoes `from_base`."""
        model = cast(Any, self)
        names = {ours: theirs for theirs, ours in IMPLEMENTATIONS.items()}
        base = model.config.base_config()
        base._attn_implementation = names.get(model.config._attn_implementation, model.config._attn_implementation)
        base._experts_implementation = model.config._experts_implementation
        base.name_or_path = model.config.name_or_path
        detach_routers(model)
        _replace_config(model, model.config, base)
        model.__class__ = type(self).base_class
        return model

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose the attention implementation: `"eager"` or `"sdpa"`.

        Raises:
            ValueError: for one that cannot hold a memory or that the base does not support.
        """
        name = memory_implementation(attn_implementation)
        if attn_implementation in IMPLEMENTATIONS:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        super().set_attn_implementation(name)  # type: ignore[misc]
        if self.config._attn_implementation != name:
            raise ValueError(
                f"{type(self).base_class.__name__} ignores its attention implementation, so it cannot hold a memory."
            )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save weights and configuration, and the code that `trust_remote_code=True` needs to load them."""
        # The base class finds its parameters by their own names only, as it cannot know this configuration's model type.
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            for name in REMOTE_FILES:
                target = Path(save_directory) / name
                if not target.exists() or not target.samefile(Path(__file__).with_name(name)):
                    shutil.copyfile(Path(__file__).with_name(name), target)
        return result

    # Encoding ---------------------------------------------------------------------------------------------------------

    def _run_base(self, backbone_only: bool = False, **kwargs: Any) -> Any:
        """One run of the base: its own forward, or only its backbone where logits are not needed."""
        backbone = cast(Any, self).base_model
        if backbone_only and backbone is not self:
            kwargs.pop("logits_to_keep", None)
            return backbone(**kwargs)
        return super().forward(**kwargs)  # type: ignore[misc]

    def encode_prefix(self, ids: Tensor | None = None) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the prefix in every layer.

        Args:
            ids: [B, p]; default the configuration's, and then the batch dimension is dropped.

        Returns:
            Layer -> two tensors [G, p, D] (or [B, G, p, D]); empty where there is no prefix.
        """
        device = cast(Any, self).device
        default = ids is None
        ids = torch.tensor([self.config.prefix_token_ids], device=device, dtype=torch.long) if ids is None else ids
        if ids.shape[1] == 0:
            return {}
        prefix_pass = PrefixPass()
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        self._run_base(
            backbone_only=True,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=positions,
            use_cache=False,
            memory_pass=prefix_pass,
        )
        if default:
            return {layer: (key[0], value[0]) for layer, (key, value) in prefix_pass.states.items()}
        return prefix_pass.states

    def encode_batch(self, ids: Tensor, lengths: Tensor) -> dict[int, LayerMemory]:
        """Encode right-padded documents; nothing behind the last memory layer's keys and values is computed.

        Args:
            ids: [N, L] int64.
            lengths: [N] int64, tokens of each document.

        Returns:
            Layer -> `LayerMemory` of their chunks, documents in order.
        """
        encoding = EncodingPass(self.config, lengths, self.config.similarity, stop=True)
        try:
            # Padding stands behind the documents, where causal attention does not look.
            self._run_base(
                backbone_only=True,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape),
                use_cache=False,
                memory_pass=encoding,
            )
        except EncodingDone:
            pass
        return encoding.layers

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
            ValueError: for no documents, an empty or too long one, a key used twice, or states that are not finite.
        """
        return encode_documents(self, documents, tokenizer, **kwargs)

    def memory_origin(self, tokenizer: Any = None) -> BankOrigin:
        """What a bank made by this model is marked with."""
        return BankOrigin(
            model_fingerprint=model_fingerprint(cast(Any, self)),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            base_model_type=self.config.base_model_type,
            chunk_size=self.config.chunk_size,
            memory_layers=tuple(self.config.memory_layers),
            similarity=self.config.similarity,
            shared_router=self.config.shared_router,
            prefix_token_ids=tuple(self.config.prefix_token_ids),
        )

    def load_memory(self, directory: Any, tokenizer: Any = None, **kwargs: Any) -> MemoryBank:
        """Load a bank that this model made; `MemoryBank.from_pretrained` with the model filled in."""
        bank = MemoryBank.from_pretrained(directory, model=self, tokenizer=tokenizer, **kwargs)
        self.accept_bank(bank)
        return bank

    def accept_bank(self, bank: MemoryBank) -> None:
        """Note that `bank` was made by this model."""
        _accepted_banks.setdefault(bank, weakref.WeakSet()).add(cast(nn.Module, self))

    def _check_bank(self, bank: Any) -> None:
        if not hasattr(bank, "origin") or not hasattr(bank, "offsets"):
            raise TypeError(f"`memory` must be a MemoryBank, as encode_documents() returns, got {type(bank).__name__}.")
        if self not in _accepted_banks.get(bank, ()):
            bank.check(self.memory_origin())
            self.accept_bank(bank)

    # Attending --------------------------------------------------------------------------------------------------------

    def _memory_forward(
        self,
        memory: MemoryBank | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        output_document_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Forward with a memory, or with the contexts that a cache kept from one."""
        inputs = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        batch, length = inputs.shape[:2]
        attention_mask = kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("With a memory, `attention_mask` must be [batch, tokens].")
        if attention_mask is not None and not bool(attention_mask.bool().any(1).all()):
            raise ValueError(
                f"Question {int((~attention_mask.bool().any(1)).nonzero()[0])} of the batch is only padding; leave it out."
            )
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = kwargs.get("past_key_values")
        if cache is None and use_cache:
            kwargs["past_key_values"] = cache = MSACache(config=self.config)
        if cache is not None and not hasattr(cache, "contexts"):
            raise TypeError(
                f"A memory needs an MSACache, which keeps the chosen documents, got {type(cache).__name__}; "
                "leave `past_key_values` out or pass MSACache(config=model.config)."
            )
        past = 0 if cache is None else cache.get_seq_length()
        seen = past + length
        if attention_mask is not None and attention_mask.shape[1] != seen:
            raise ValueError(f"`attention_mask` covers {attention_mask.shape[1]} tokens, but {seen} have been seen.")

        routing_mask = self._routing_tokens(routing_mask, attention_mask, batch, length, past, inputs.device)
        if routing_mask is not None and memory is None:
            raise ValueError(
                "This turn has routing tokens but no `memory`; pass the bank, or an all-false routing_mask."
            )
        if memory is not None:
            self._check_bank(memory)
        if force_documents is not None and memory is not None:
            force_documents = self._checked_documents(force_documents, batch, len(memory))
        if kwargs.get("position_ids") is None:
            positions = torch.arange(past, seen, device=inputs.device).expand(batch, length)
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:].to(inputs.device)
            kwargs["position_ids"] = positions + self.config.first_position

        attending = AttendingPass(
            config=self.config,
            similarity=self.config.similarity,
            layers={} if memory is None else memory.layers,
            offsets=None if memory is None else memory.offsets,
            prefix={} if memory is None else memory.prefix,
            routing_mask=routing_mask,
            force_documents=force_documents,
            keep_document_scores=output_document_scores,
            contexts={} if cache is None else cache.contexts,
            keep_contexts=cache is not None,
        )
        return_dict = kwargs.pop("return_dict", None)
        output = self._run_base(**kwargs, memory_pass=attending, return_dict=True)
        result = type(self).output_class(**output, routing=attending.routing)
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
    def _checked_documents(documents: Tensor, batch: int, count: int) -> Tensor:
        documents = torch.as_tensor(documents)
        if documents.dim() != 2 or documents.shape[0] != batch or documents.is_floating_point():
            raise ValueError(
                f"`force_documents` must be [{batch}, n] positions in the bank, got {tuple(documents.shape)}."
            )
        if documents.numel() and (int(documents.max()) >= count or int(documents.min()) < -1):
            raise ValueError(
                f"`force_documents` names document {int(documents.max())}, but the bank holds {count}; -1 stands for none."
            )
        ordered = documents.sort(1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("`force_documents` names a document twice for one sample.")
        return documents.long()

    # Generation -------------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, memory: MemoryBank | None = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate` with a memory.

        Args:
            inputs: [B, T] prompt without the prefix; also as `input_ids`.
            memory: the bank to draw on.
            routing_mask: [B, T] bool, the tokens of the prompt that route (default: all but padding; in a later turn
                all new ones). Cover the whole `input_ids`, or the attention mask where that is longer.
            force_documents: [B, n] documents to attend to instead of the routed ones.
            kwargs: what `generate` takes. Positions and prefix are handled inside.

        Raises:
            ValueError: also where `prefill_chunk_size` would cut the prompt before its last routing token.
        """
        if memory is None:
            return super().generate(inputs, **kwargs)  # type: ignore[misc]
        self._check_bank(memory)
        prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if prompt is None:
            raise ValueError("generate() with a memory needs a prompt.")
        generation_config = kwargs.get("generation_config") or cast(Any, self).generation_config

        def option(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(generation_config, name, None)

        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
            pad, eos = option("pad_token_id"), option("eos_token_id")
            stops = eos if isinstance(eos, list | tuple) else [eos]
            if prompt.dim() == 2 and pad is not None and pad not in stops:
                mask = (prompt != pad).long()
            kwargs["attention_mask"] = mask
        if kwargs.get("past_key_values") is None and option("use_cache") is not False:
            kwargs["past_key_values"] = MSACache(config=self.config)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()

        routing_mask = kwargs.get("routing_mask")
        if routing_mask is None:
            routing_mask = torch.ones_like(mask, dtype=torch.bool)
        if routing_mask.shape[1] < mask.shape[1]:
            routing_mask = torch.nn.functional.pad(routing_mask.bool(), (mask.shape[1] - routing_mask.shape[1], 0))
        if routing_mask.shape != mask.shape:
            raise ValueError(f"`routing_mask` must be [batch, {mask.shape[1]}], got {tuple(routing_mask.shape)}.")
        routing_mask = routing_mask.bool() & mask.bool()
        routing_mask[:, :past] = False
        piece = option("prefill_chunk_size")
        if piece is not None and bool(routing_mask[:, past + piece :].any()):
            raise ValueError(
                f"`prefill_chunk_size={piece}` cuts the prompt before its last routing token, but documents must be chosen "
                "before the first token that attends to them. Put the routing tokens into the first piece with "
                "`routing_mask`, or make the pieces longer."
            )
        kwargs["routing_mask"] = routing_mask
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0) + self.config.first_position
        return super().generate(inputs, memory=memory, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        routing_mask = kwargs.pop("routing_mask", None)
        model_inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if routing_mask is not None:
            ids = model_inputs.get("input_ids")
            length = (ids if ids is not None else model_inputs["inputs_embeds"]).shape[1]
            cache = model_inputs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            # Generated tokens do not route.
            if past < routing_mask.shape[1]:
                part = routing_mask[:, past : past + length]
                model_inputs["routing_mask"] = torch.nn.functional.pad(part, (0, length - part.shape[1]))
        return model_inputs


class MSAModel(MemoryMixin):
    """A decoder without head, with a memory. `AutoModel` loads it; see `MSAForCausalLM`."""

    base_mapping = MODEL_MAPPING
    output_class = MSAModelOutput

    def forward(self, **kwargs: Any) -> Any:
        """The base's forward; with `memory`, `routing_mask`, `force_documents`, `output_document_scores` it attends."""
        return self._memory_forward(**kwargs) if _attends(kwargs) else super().forward(**_without_memory(kwargs))  # type: ignore[misc]


class MSAForCausalLM(MemoryMixin):
    """A causal LM with a Memory Sparse Attention memory (arXiv 2603.23516).

    `from_base` retrofits a plain model, `from_pretrained` loads a checkpoint. Without a memory it computes what the
    base computes, to the bit.
    """

    base_mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    output_class = MSACausalLMOutput

    def forward(self, **kwargs: Any) -> Any:
        """The base's forward, and with a memory or documents the following.

        Inference:
            memory: `MemoryBank` to draw on. `input_ids` then hold the active tokens, without the prefix.
            routing_mask: [B, T] bool, the tokens that route. Default: all non-padding tokens where nothing is cached;
                with a cache a turn routes anew where it has routing tokens, else it keeps its documents.
            force_documents: [B, n] int64 positions in the bank to attend to instead, -1 for none.
            output_document_scores: also report the scores of all documents, [B, N] per layer.

        Training (paper, 3.4), on either form:
            doc_ids: [B, T] int64 for packed rows: 1, 2, ... documents; 0 routing tokens; -1 other active tokens; -2
                template tokens, those that open the row being the prefix. `position_ids` default to their rule.
            documents: a pool shared by all questions: token id lists, or a mapping with padded `input_ids` and
                `attention_mask`. `input_ids` then hold question, tail and answer; tokens before the first label route
                unless `routing_mask` says which.
            positive_docs: [B, P] int64 document numbers (of the row or the pool, from 0), -1 for none.
            labels: [B, T]; answer_labels: [B, T] labels counted a second time with `answer_loss_weight`.
            num_items_in_batch: labelled tokens of all micro-batches together.

        Returns:
            The base's output without a memory, else `MSACausalLMOutput`.
        """
        if kwargs.get("doc_ids") is not None or kwargs.get("documents") is not None:
            return self._training_forward(**kwargs)
        if _attends(kwargs):
            if kwargs.pop("positive_docs", None) is not None or kwargs.pop("answer_labels", None) is not None:
                raise ValueError(
                    "`positive_docs` and `answer_labels` belong to training: pass `documents` or `doc_ids`."
                )
            output = self._memory_forward(**{k: v for k, v in kwargs.items() if k not in TRAINING_ARGUMENTS})
            if isinstance(output, MSACausalLMOutput):
                output.lm_loss = output.loss
            return output
        return super().forward(**_without_memory(kwargs))  # type: ignore[misc]

    # Training ---------------------------------------------------------------------------------------------------------

    def _training_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        doc_ids: Tensor | None = None,
        documents: Any = None,
        positive_docs: Tensor | None = None,
        answer_labels: Tensor | None = None,
        routing_mask: Tensor | None = None,
        force_documents: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if doc_ids is not None and documents is not None:
            raise ValueError("Pass packed rows (`doc_ids`) or a pool (`documents`), not both.")
        if kwargs.pop("memory", None) is not None:
            raise ValueError("A training step brings its own documents; leave `memory` out.")
        if kwargs.pop("past_key_values", None) is not None or kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("A training step takes `input_ids` and no cache.")
        kwargs.pop("use_cache", None)
        kwargs.pop("output_document_scores", None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        if doc_ids is not None:
            rows = unpack_rows(doc_ids, mask)
            output, scores = self._packed_forward(rows, input_ids, doc_ids, position_ids, force_documents, kwargs)
        else:
            output, scores = self._pool_forward(
                input_ids, mask, position_ids, labels, documents, routing_mask, force_documents, kwargs
            )
        if torch.is_grad_enabled() and not self.config.shared_router and self._router_gradient_lost(scores):
            raise RuntimeError(
                "The routers' scores carry no gradient: gradient checkpointing runs with use_reentrant=True. "
                "Enable it with use_reentrant=False (the default of transformers)."
            )
        loss_kwargs = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        vocabulary = {"vocab_size": self.config.vocab_size, **loss_kwargs}
        terms: list[Tensor] = []
        if labels is not None:
            output.lm_loss = cast(Any, self).loss_function(output.logits, labels, **vocabulary)
            terms.append(self.config.lm_loss_weight * output.lm_loss)
        if answer_labels is not None:
            output.answer_loss = cast(Any, self).loss_function(output.logits, answer_labels, **vocabulary)
            terms.append(self.config.answer_loss_weight * output.answer_loss)
        if positive_docs is not None:
            some = next(iter(scores.values()))
            positives = positive_mask(positive_docs.to(some.device), some.shape[1])
            output.aux_loss = auxiliary_loss(scores, positives, self.config, labels, num_items_in_batch)
            terms.append(self.config.aux_loss_weight * output.aux_loss)
        if terms:
            output.loss = torch.stack([term.to(output.logits.device) for term in terms]).sum()
        return output if return_dict is not False else output.to_tuple()

    def _router_gradient_lost(self, scores: dict[int, Tensor]) -> bool:
        routers = [
            parameter.requires_grad
            for module in attention_layers(cast(nn.Module, self)).values()
            if hasattr(module, "router_q_proj")
            for parameter in module.router_q_proj.parameters()
        ]
        return any(routers) and not any(item.requires_grad for item in scores.values())

    def _encode_for_training(self, ids: Tensor, lengths: Tensor, **kwargs: Any) -> tuple[EncodingPass, Any]:
        """Encode right-padded documents [N, L], with gradients and through all layers."""
        similarity = self.config.training_similarity or self.config.similarity
        encoding = EncodingPass(self.config, lengths, similarity, stop=False)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        kwargs.setdefault("position_ids", positions)
        output = self._run_base(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, memory_pass=encoding, **kwargs
        )
        return encoding, output

    def _attend_in_training(
        self, encoding: EncodingPass, lengths: Tensor, prefix: dict[int, tuple[Tensor, Tensor]], **fields: Any
    ) -> AttendingPass:
        return AttendingPass(
            config=self.config,
            similarity=encoding.similarity,
            layers=dict(encoding.layers),
            offsets=chunks_of(lengths, self.config.chunk_size),
            prefix=prefix,
            keep_document_scores=True,
            **fields,
        )

    def _pool_forward(
        self,
        input_ids: Tensor,
        mask: Tensor,
        position_ids: Tensor | None,
        labels: Tensor | None,
        documents: Any,
        routing_mask: Tensor | None,
        force_documents: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[MSACausalLMOutput, dict[int, Tensor]]:
        if not bool(mask.any(1).all()):
            raise ValueError(f"Question {int((~mask.any(1)).nonzero()[0])} of the batch is only padding; leave it out.")
        ids, lengths = pooled_documents(documents, input_ids.device)
        if force_documents is not None:
            force_documents = self._checked_documents(force_documents, input_ids.shape[0], len(lengths))
        if routing_mask is None:
            routing_mask = mask if labels is None else mask & ((labels != -100).long().cumsum(1) == 0)
        encoding, _ = self._encode_for_training(ids, lengths, backbone_only=True)
        attending = self._attend_in_training(
            encoding,
            lengths,
            self.encode_prefix(),
            routing_mask=routing_mask.bool() & mask,
            force_documents=force_documents,
        )
        if position_ids is None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0) + self.config.first_position
        output = self._run_base(
            input_ids=input_ids,
            attention_mask=mask.long(),
            position_ids=position_ids,
            use_cache=False,
            memory_pass=attending,
            return_dict=True,
            **kwargs,
        )
        result = MSACausalLMOutput(
            logits=output.logits,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
            routing=attending.routing,
        )
        return result, _scores_of(attending.routing)

    def _packed_forward(
        self,
        rows: PackedRows,
        input_ids: Tensor,
        doc_ids: Tensor,
        position_ids: Tensor | None,
        force_documents: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[MSACausalLMOutput, dict[int, Tensor]]:
        """The pool's computation on sequences cut out of rows, put together again."""
        batch, width = input_ids.shape
        first = rows.prefix.mask.shape[1] + self.config.top_k
        pieces: list[tuple[Any, Any]] = []

        def run(blocks: Any, start: int, memory_pass: Any) -> None:
            length = blocks.mask.shape[1]
            positions = torch.arange(start, start + length, device=input_ids.device).expand(blocks.mask.shape)
            if position_ids is not None:
                positions = torch.where(blocks.mask, blocks.take(position_ids), positions)
            output = self._run_base(
                input_ids=blocks.take(input_ids),
                attention_mask=torch.ones_like(positions),
                position_ids=positions,
                use_cache=False,
                memory_pass=memory_pass,
                return_dict=True,
                **kwargs,
            )
            pieces.append((blocks, output))

        prefix_pass = PrefixPass()
        if rows.prefix.mask.shape[1]:
            run(rows.prefix, 0, prefix_pass)
        if not len(rows.document_row):
            raise ValueError("A packed batch needs at least one document (`doc_ids` of 1 and more).")
        lengths = rows.documents.mask.sum(1)
        similarity = self.config.training_similarity or self.config.similarity
        encoding = EncodingPass(self.config, lengths, similarity, stop=False)
        run(rows.documents, 0, encoding)

        # Where row b's document i lies among the documents of all rows: [B, n], -1 for none.
        count = int(rows.document_number.max()) + 1
        place = torch.full((batch, count), -1, device=input_ids.device)
        place[rows.document_row, rows.document_number] = torch.arange(len(lengths), device=input_ids.device)
        visible = rows.document_row == torch.arange(batch, device=input_ids.device)[:, None]
        routing: dict[int, LayerRouting] = {}
        if rows.active.mask.any():
            if force_documents is not None:
                force_documents = self._checked_documents(force_documents, batch, count)
                forced = place.gather(1, force_documents.clamp(min=0))
                force_documents = forced.masked_fill(force_documents < 0, -1)
            attending = self._attend_in_training(
                encoding,
                lengths,
                prefix_pass.states,
                routing_mask=rows.active.take(doc_ids, fill=-1) == 0,
                visible=visible,
                force_documents=force_documents,
            )
            run(rows.active, first, attending)
            number = torch.cat([rows.document_number, rows.document_number.new_full((1,), -1)])
            for layer, found in attending.routing.items():
                assert found.document_scores is not None
                scores = found.document_scores.gather(1, place.clamp(min=0)).masked_fill(place < 0, float("-inf"))
                routing[layer] = LayerRouting(number[found.documents], found.scores, scores)

        def assemble(part_of: Any) -> Tensor:
            states = part_of(pieces[0][1])
            whole = states.new_zeros(batch * width, states.shape[-1])
            for blocks, output in pieces:
                whole = blocks.put(whole, part_of(output))
            return whole.view(batch, width, -1)

        hidden_states = None
        if pieces[0][1].get("hidden_states") is not None:
            layers = range(len(pieces[0][1].hidden_states))
            hidden_states = tuple(assemble(lambda output, layer=layer: output.hidden_states[layer]) for layer in layers)
        result = MSACausalLMOutput(
            logits=assemble(lambda output: output.logits), hidden_states=hidden_states, routing=routing
        )
        return result, _scores_of(routing)


def _scores_of(routing: dict[int, LayerRouting]) -> dict[int, Tensor]:
    return {layer: found.document_scores for layer, found in routing.items() if found.document_scores is not None}


def _attends(kwargs: dict[str, Any]) -> bool:
    """Whether a forward call has a memory, given now or kept in its cache."""
    if kwargs.get("memory") is not None:
        return True
    if any(kwargs.get(name) is not None for name in ("routing_mask", "force_documents")) and not getattr(
        kwargs.get("past_key_values"), "contexts", None
    ):
        raise ValueError("`routing_mask` and `force_documents` need a `memory`.")
    return bool(getattr(kwargs.get("past_key_values"), "contexts", None))


def _without_memory(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in (*MEMORY_ARGUMENTS, *TRAINING_ARGUMENTS)}


def _named_forward(mixin: type, base_class: type) -> Any:
    """A forward whose signature is the base's with our arguments added: generate() and Trainer pass on only those."""
    base = inspect.signature(base_class.forward)
    names = [name for name, item in base.parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD][1:]
    ours = (*MEMORY_ARGUMENTS, *(TRAINING_ARGUMENTS if mixin is MSAForCausalLM else ()))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"forward() takes at most {len(names)} positional arguments, got {len(args)}.")
        if kwargs.keys() & set(names[: len(args)]):
            raise TypeError(f"forward() got {sorted(kwargs.keys() & set(names[: len(args)]))} twice.")
        return mixin.forward(self, **dict(zip(names, args, strict=False)), **kwargs)  # type: ignore[attr-defined]

    parameters = list(base.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ours
        if name not in base.parameters
    ]
    split = next((i for i, item in enumerate(parameters) if item.kind is item.VAR_KEYWORD), len(parameters))
    forward.__signature__ = base.replace(parameters=[*parameters[:split], *added, *parameters[split:]])  # type: ignore[attr-defined]
    forward.__doc__ = mixin.forward.__doc__  # type: ignore[attr-defined]
    return forward


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, item in model.named_modules() if item is module)


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


__all__ = ["MSACausalLMOutput", "MSAForCausalLM", "MSAModel", "MSAModelOutput", "published_fields"]
