"""How a model with a memory comes to be: from a configuration, a checkpoint, or a plain model; and how it is saved."""

from __future__ import annotations

import inspect
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import ModelOutput, logging

from .adapter_fields_msa import HUB_ARGUMENTS, check_adapter_fields, refuse_adapter
from .adapter_loading_msa import AdapterMixin
from .attention_config_msa import Implementations, check_holds_memory, implementations_in
from .attention_msa import IMPLEMENTATIONS
from .cards_msa import CARD, write_card
from .compat_msa import warn_of_untested_version
from .configuration_msa import AUTO_MAP, OWN_FIELDS, MSAConfig
from .model_card_msa import base_facts, model_card
from .peft_msa import teach_classes
from .publishing_msa import publish
from .quantized_msa import is_quantized_checkpoint, note_plain_routers, refuse_bare_gguf
from .retrofit_msa import (
    ROUTER_MODULES,
    attach_routers,
    attention_layers,
    detach_routers,
    initialize_routers,
    refuse_unsupported,
    renumber_memory_layers,
)
from .trial_msa import refuse_untouchable
from .types_msa import Arguments
from .wrapping_msa import without_outer_hook

logger = logging.get_logger(__name__)

# What a checkpoint carries so that it loads with trust_remote_code where this package is not installed: this folder.
REMOTE_FILES = tuple(sorted(path.name for path in Path(__file__).parent.glob("*_msa.py")))
# Published checkpoints keep each router projection in a one-element Sequential.
PUBLISHED_NAMES = {r"router_q_proj\.0\.": "router_q_proj.", r"router_k_proj\.0\.": "router_k_proj."}
# What continuous batching, which has no memory, puts in the place of the two attention implementations.
PAGED = tuple(f"paged|{name}" for name in IMPLEMENTATIONS)
UNTRAINED = "what they choose is little better than chance until `msa-hf train` has trained them."
# Fields of a configuration that are arguments of `from_pretrained` in their own right.
LOADING_ARGUMENTS = {"dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config"}
PUSH_ARGUMENTS = ("repo_id", "commit_message", "description", "private", "revision", "create_pr", "tags")


def copy_code(directory: Path) -> list[str]:
    """Write the code that a checkpoint carries into its directory; the names of the files that changed."""
    here = Path(__file__).parent
    changed: list[str] = []
    if here.resolve() == directory.resolve():  # a checkpoint's own code saves to where it was loaded from
        return changed
    for name in REMOTE_FILES:
        target = directory / name
        if not target.exists() or target.read_bytes() != (here / name).read_bytes():
            shutil.copyfile(here / name, target)
            changed.append(name)
    return changed


class BaseGenerationConfig(GenerationConfig):
    """Reads generation options from the base's part of a configuration: our `top_k` counts documents, not tokens."""

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig) -> GenerationConfig:
        return GenerationConfig.from_model_config(model_config.base_config())


class CheckpointMixin(AdapterMixin):
    """Construction, loading, retrofitting and saving.

    A mixin in front of the base's own class: `MSAForCausalLM(config)` makes an instance of a class
    `MSA<Base>ForCausalLM(MSAForCausalLM, <Base>ForCausalLM)`, so that parameter names are the base's, plus the routers.

    Attributes:
        base_class: the base's class; on the classes made by `class_for`.
        base_mapping: configuration class -> base class.
        class_names: the classes of that kind that transformers' pipelines, servers and Trainer know, by model type.
        forward_arguments: what our forward takes besides the base's arguments.
    """

    base_class: ClassVar[type[PreTrainedModel]]
    base_mapping: ClassVar[Mapping[type[PreTrainedConfig], type[PreTrainedModel]]]
    class_names: ClassVar[dict[str, str]]
    forward_arguments: ClassVar[tuple[str, ...]]
    generation_config_class = BaseGenerationConfig
    config: MSAConfig

    def __new__(cls, config: MSAConfig | None = None, *args: object, **kwargs: object) -> PreTrainedModel:
        if "base_class" not in cls.__dict__ and config is not None:
            cls = cls.class_for(config.base_model_type)
        return super().__new__(cls)

    def __init__(self, config: MSAConfig, *args: object, **kwargs: object) -> None:
        warn_of_untested_version()
        if config._attn_implementation is not None:
            check_holds_memory(config._attn_implementation)
        super().__init__(config, *args, **kwargs)
        attach_routers(self, config)
        if not next(self.parameters()).is_meta:
            initialize_routers(self, "random")
        self._check_attention()

    @classmethod
    def class_for(cls, base_model_type: str | None) -> type[PreTrainedModel]:
        """The class that puts a memory on models of `base_model_type`; made once, then looked up.

        Raises:
            ValueError: for a kind of model that cannot hold a memory, naming what is missing.
        """
        if base_model_type is None:
            raise ValueError("The configuration names no `base_model_type`; `from_base` makes one of a plain model.")
        config_class = type(AutoConfig.for_model(base_model_type))
        base_class = cls.base_mapping.get(config_class, None)
        return cls._class_on(base_class if not isinstance(base_class, tuple) else base_class[0], base_model_type)

    @classmethod
    def _class_on(cls, base_class: type[PreTrainedModel] | None, base_model_type: str) -> type[PreTrainedModel]:
        if base_class is None:
            refuse_unsupported(AutoConfig.for_model(base_model_type), base_class)
        assert base_class is not None
        name = f"MSA{base_class.__name__}"
        home = vars(sys.modules[cls.__module__])
        if name in home and home[name].base_class is base_class:
            return home[name]
        namespace = {
            "__module__": cls.__module__,
            "__doc__": f"`{base_class.__name__}` with a Memory Sparse Attention memory.",
            "base_class": base_class,
            "config_class": MSAConfig,
            "forward": _named_forward(cls, base_class),
            "_keys_to_ignore_on_load_unexpected": [
                *(getattr(base_class, "_keys_to_ignore_on_load_unexpected", None) or []),
                r"^temperature$",  # frozen scalar of published checkpoints; it is `aux_temperature`
                *(rf"\.{name}\.(0\.)?weight$" for name in ROUTER_MODULES),  # of layers that have no memory any more
            ],
        }
        made = type(name, (cls, base_class), namespace)
        # Without the base's conversions, checkpoints whose tensors are renamed or merged would be read wrongly.
        conversions = get_checkpoint_conversion_mapping(base_class.__name__)
        if conversions is None:
            conversions = get_checkpoint_conversion_mapping(base_model_type)
        if conversions is not None:
            register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
        teach_classes()
        home.setdefault(name, made)  # so that instances can be pickled
        cls.class_names[f"{MSAConfig.model_type}-{base_class.__name__}"] = name
        return made

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers reads the source of the file that defines the class; the experts are in the base's.
        return "base_class" in cls.__dict__ and cls.base_class._can_set_experts_implementation()

    def check_adapter(self, name: str | PathLike[str], kwargs: Arguments) -> None:
        """Compare the fields that an adapter was trained for with the model's; see `check_adapter_fields`."""
        check_adapter_fields(self.config, name, kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to do: checkpoints always carry their code (see `save_pretrained`)."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *args: object,
        config: MSAConfig | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a checkpoint of this library, or one in the layout of the published MSA models.

        Takes what `PreTrainedModel.from_pretrained` takes, and fields of `MSAConfig`, the memory's and the base's, as
        overrides.

        Raises:
            ValueError: for a plain checkpoint, and for an adapter, naming how to load it.
        """
        if "base_class" not in cls.__dict__:
            if config is None:
                hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
                if kwargs.get("gguf_file") is not None:
                    raise ValueError("A GGUF file holds a plain model; load it with from_base(..., gguf_file=...).")
                refuse_bare_gguf(pretrained_model_name_or_path)
                own = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
                kind = MSAConfig.get_config_dict(pretrained_model_name_or_path, **hub)[0].get("model_type")
                if kind is None:
                    refuse_adapter(pretrained_model_name_or_path, hub)
                if kind != MSAConfig.model_type:
                    raise ValueError(
                        f"{str(pretrained_model_name_or_path)!r} is a plain {kind!r} checkpoint; "
                        "load it with from_base()."
                    )
                config = MSAConfig.from_pretrained(pretrained_model_name_or_path, **hub, **own)
                if changed := _taken_by_config(config, kwargs):
                    config = MSAConfig.from_pretrained(pretrained_model_name_or_path, **hub, **own, **changed)
            elif given := [name for name in OWN_FIELDS if name in kwargs]:
                raise TypeError(
                    f"from_pretrained() got both a `config` and its fields {given}; set them in the config."
                )
            made = cls.class_for(config.base_model_type)
            return made.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        kwargs.pop("trust_remote_code", None)
        kwargs["key_mapping"] = {**PUBLISHED_NAMES, **(kwargs.get("key_mapping") or {})}
        wants_info = kwargs.pop("output_loading_info", False)
        router_init = kwargs.pop("router_init", "copy")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        options = getattr(model, "generation_config", None)  # a headless model has none
        if options is not None and options._from_model_config:
            # Transformers read the options from config.json, for want of a generation_config.json.
            model.generation_config = BaseGenerationConfig.from_model_config(model.config)
        refuse_untouchable(model)
        missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
        new = {item for name, item in model.named_modules() if name in missing and name.endswith(ROUTER_MODULES)}
        if new:
            layers = [layer for layer, module in attention_layers(model).items() if new & set(module.children())]
            if any(weight.is_meta for router in new for weight in router.parameters()):
                raise ValueError(
                    f"Routers of layers {sorted(layers)} are new, but these layers are offloaded, so nothing can be "
                    "written there. Give the whole model its memory first (from_base, then save_pretrained), and load "
                    "what is saved with `device_map`."
                )
            initialize_routers(model, router_init, new)
            # All new though said to be trained: an adapter is to bring them.
            if not (model.config.routers_trained and sorted(layers) == model.config.memory_layers):
                if any(name.endswith("router_k_proj") for name in missing):
                    model.config.routers_trained = False
                logger.warning(
                    f"Routers of layers {sorted(layers)} are untrained (`router_init={router_init!r}`): {UNTRAINED}"
                )
        return (model, info) if wants_info else model

    @classmethod
    def from_base(
        cls,
        name_or_path_or_model: str | PathLike[str] | PreTrainedModel,
        memory_layers: list[int] | None = None,
        chunk_size: int = 64,
        top_k: int = 16,
        router_init: str = "copy",
        similarity: str = "cosine",
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Give a plain model a memory.

        Args:
            name_or_path_or_model: a checkpoint, loaded with a memory from the start; or a live model, which is changed
                in place (`to_base()` undoes it) and returned.
            memory_layers: default the full-attention layers of the upper half.
            chunk_size: tokens per chunk.
            top_k: documents per memory layer.
            router_init: `"copy"` starts the routers from each layer's own query and key projections, `"random"` from
                the model's initializer.
            similarity: `"cosine"` or `"dot"`.
            kwargs: other memory fields of `MSAConfig`; for a checkpoint also arguments of `from_pretrained`.

        Raises:
            ValueError: for a model that cannot hold a memory, naming what is missing.
        """
        own = {name: kwargs.pop(name) for name in OWN_FIELDS if name in kwargs}
        own.update(memory_layers=memory_layers, chunk_size=chunk_size, top_k=top_k, similarity=similarity)
        if router_init not in ("copy", "random"):
            raise ValueError(f"`router_init` must be 'copy' or 'random', got {router_init!r}.")
        if isinstance(name_or_path_or_model, nn.Module):
            if kwargs:
                raise TypeError(f"from_base() of a live model got unexpected arguments {sorted(kwargs)}.")
            return cls._retrofit(name_or_path_or_model, own, router_init)
        refuse_bare_gguf(name_or_path_or_model)
        hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code", "gguf_file") if name in kwargs}
        base_config = kwargs.pop("config", None)
        if base_config is None:
            try:
                base_config = AutoConfig.from_pretrained(name_or_path_or_model, **hub)
            except (OSError, ValueError):
                refuse_adapter(name_or_path_or_model, hub)
                raise
            if changed := _taken_by_config(base_config, kwargs):
                base_config = AutoConfig.from_pretrained(name_or_path_or_model, **hub, **changed)
        config = cls._config_on(base_config, own)
        if is_quantized_checkpoint(base_config, kwargs):
            # What loads such weights knows the base's modules, and would look for quantized routers too.
            for name in implementations_in(kwargs.get("attn_implementation", "sdpa")):
                check_holds_memory(name)
            base = cls.base_mapping[type(base_config)]
            loaded = base.from_pretrained(name_or_path_or_model, config=base_config, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            with without_outer_hook(model):
                cls._retrofit(model, own, router_init)
            return loaded
        made = cls.class_for(config.base_model_type)
        return made.from_pretrained(name_or_path_or_model, config=config, router_init=router_init, **kwargs)

    @classmethod
    def _config_on(cls, base_config: PreTrainedConfig, own: Arguments) -> MSAConfig:
        if base_config.model_type == MSAConfig.model_type:
            raise ValueError("The model has a memory already; load it with from_pretrained().")
        base_class = cls.base_mapping.get(type(base_config), None)
        refuse_unsupported(base_config, base_class)
        if not own.get("shared_router") and own.get("routers_trained") is None:
            own["routers_trained"] = False
        fields = base_config.to_dict()
        fields.pop("model_type")
        if clash := sorted(fields.keys() & own.keys()):
            raise ValueError(
                f"{base_config.model_type!r} has fields of its own called {clash}, which would mean two things in a "
                "configuration with a memory."
            )
        return MSAConfig(base_model_type=base_config.model_type, **fields, **own)

    @classmethod
    def _retrofit(cls, model: PreTrainedModel, own: Arguments, router_init: str) -> PreTrainedModel:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{type(model).__name__} is not a model of transformers; pass a decoder-only causal LM.")
        if hasattr(model, "_hf_hook"):
            raise ValueError(
                "The model was dispatched over devices by accelerate, which wraps its forward; "
                "pass its name or path to from_base() together with `device_map` instead."
            )
        config = cls._config_on(model.config, own)
        if not isinstance(model, expected := cls.base_mapping[type(model.config)]):
            wanted = getattr(expected, "__name__", expected)
            raise ValueError(f"{cls.__name__} cannot stand on {type(model).__name__}; it needs {wanted}.")
        attention_layers(model)
        check_holds_memory(model.config._attn_implementation)
        warn_of_untested_version()
        old, base_class = model.config, type(model)
        config._attn_implementation = old._attn_implementation
        config._experts_implementation = old._experts_implementation
        made = cls._class_on(base_class, old.model_type)
        try:
            attach_routers(model, config)
            _replace_config(model, old, config)
            model.__class__ = made
            model._check_attention()
            refuse_untouchable(model)
            initialize_routers(model, router_init)
            note_plain_routers(model)
        except Exception:
            detach_routers(model)
            _replace_config(model, config, old)
            model.__class__ = base_class
            raise
        if config.routers_trained is False:
            logger.warning_once(f"The routers are untrained: {UNTRAINED}")
        return model

    def to_base(self) -> PreTrainedModel:
        """Take the memory off again: the same object, of the base's class, without routers. Undoes `from_base`."""
        model = self
        base = model.config.base_config()
        base._attn_implementation = model.config._attn_implementation
        base._experts_implementation = model.config._experts_implementation
        base.name_or_path = model.config.name_or_path
        detach_routers(model)
        _replace_config(model, model.config, base)
        model.__class__ = type(self).base_class
        return model

    def set_attn_implementation(self, attn_implementation: Implementations, *args: object, **kwargs: object) -> None:
        """Choose the attention implementation: `"eager"` or `"sdpa"`, also in a dict under `""`.

        `"paged|eager"` and `"paged|sdpa"`, which continuous batching sets, are taken too; on them there is no memory.

        Raises:
            ValueError: for one that cannot hold a memory or that the base does not support.
        """
        for name in implementations_in(attn_implementation):
            if name not in PAGED:
                check_holds_memory(name)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _check_attention(self) -> None:
        """Check that the model's attention can hold a memory, and that it heeds `set_attn_implementation`."""
        name = self.config._attn_implementation
        check_holds_memory(name)
        setter = super().set_attn_implementation
        setter(IMPLEMENTATIONS[name])
        if self.config._attn_implementation == name:
            raise ValueError(
                f"{type(self).base_class.__name__} ignores its attention implementation, so it cannot hold a memory."
            )
        setter(name)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: object, **kwargs: Any) -> object:
        """Save weights and configuration, the code that `trust_remote_code=True` needs to load them, and a card.

        The card is the README.md of the directory; one that a person wrote or changed stays. Adapters that were put
        into the model itself are saved without one, as transformers does.

        Args:
            kwargs: as of `PreTrainedModel.save_pretrained`; with `push_to_hub=True` those of `push_to_hub`, and
                `repo_id`, by default the name of the directory.
        """
        directory, pushed = Path(save_directory), bool(kwargs.pop("push_to_hub", False))
        hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs and pushed}
        before = _written(directory) if pushed else {}
        renumber_memory_layers(self)
        # Under the parameters' own names the base class finds them too; it converts none for this model type.
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return result
        copy_code(directory)
        repo_id = str(hub.pop("repo_id", None) or directory.resolve().name) if pushed else None
        tags = [*(getattr(self, "model_tags", None) or []), *(hub.pop("tags", None) or [])]
        if not getattr(self, "_hf_peft_config_loaded", False):
            base = base_facts(self.config, ask_hub=pushed)
            write_card(directory, model_card(self.config, base, repo_id, tags, headless=not self.can_generate()))
        if repo_id is None:
            return result
        changed = [name for name, time in _written(directory).items() if before.get(name) != time]
        names = {*changed, *(name for name in (*REMOTE_FILES, CARD) if (directory / name).is_file())}
        message = hub.pop("commit_message", None) or "Upload model"
        options = {"repo_type": "model", "message": message, "token": kwargs.get("token"), **hub}
        return publish(directory, sorted(names), repo_id, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> object:
        """Put the model on the Hub, with its code and a card; a card that a person wrote there stays.

        Args:
            repo_id: `"user/model"`; made where missing.
            commit_message: default "Upload model".
            commit_description: of the commit.
            private: of a repository that is made; None: the Hub's default.
            token: default that of `hf auth login`, or of the variable HF_TOKEN.
            revision: a branch, made where missing. Default: main.
            create_pr: open a pull request instead.
            max_shard_size: most bytes of a file of weights.
            tags: further ones of the card.

        Returns:
            the commit.

        Raises:
            BankUnavailable: where the Hub refuses or cannot be reached, with the remedy.
        """
        with tempfile.TemporaryDirectory(prefix="msa-hf-push-") as folder:
            return self.save_pretrained(
                folder,
                max_shard_size=max_shard_size,
                push_to_hub=True,
                repo_id=repo_id,
                commit_message=commit_message,
                description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            )


def _written(directory: Path) -> dict[str, int]:
    """The files of a directory, with the times when they were written."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in files}


def _taken_by_config(config: PreTrainedConfig, arguments: Arguments) -> Arguments:
    """Take those arguments of `from_pretrained` out that are fields of the configuration, which they change."""
    fields = config.to_dict().keys() - LOADING_ARGUMENTS
    return {name: arguments.pop(name) for name in list(arguments) if name in fields}


def _named_forward(mixin: type[CheckpointMixin], base_class: type[PreTrainedModel]) -> Callable[..., ModelOutput]:
    """A forward whose signature is the base's with our arguments added: generate() and Trainer pass on only those."""
    base = inspect.signature(base_class.forward)
    names = [name for name, item in base.parameters.items() if item.kind is item.POSITIONAL_OR_KEYWORD][1:]
    ours = mixin.forward_arguments

    def forward(self: PreTrainedModel, *args: object, **kwargs: object) -> ModelOutput:
        if len(args) > len(names):
            raise TypeError(f"forward() takes at most {len(names)} positional arguments, got {len(args)}.")
        if kwargs.keys() & set(names[: len(args)]):
            raise TypeError(f"forward() got {sorted(kwargs.keys() & set(names[: len(args)]))} twice.")
        return mixin.forward(self, **dict(zip(names, args, strict=False)), **kwargs)

    parameters = list(base.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ours
        if name not in base.parameters
    ]
    split = next((i for i, item in enumerate(parameters) if item.kind is item.VAR_KEYWORD), len(parameters))
    signature = base.replace(parameters=[*parameters[:split], *added, *parameters[split:]])
    vars(forward)["__signature__"] = signature
    forward.__doc__ = mixin.forward.__doc__
    return forward


def _replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = new
