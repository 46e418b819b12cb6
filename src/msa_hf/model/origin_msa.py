"""The origin of a bank: everything that its keys, values and routing keys depend on."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from .bank_format_msa import OriginEntries
from .configuration_msa import OWN_FIELDS
from .weights_msa import WeightsRecord, frequencies_were_rounded, frequency_differences, weight_differences

logger = logging.get_logger(__name__)

# Fields of the format since version 1, which every reader knows and compares. Later ones lie beside them in a
# manifest, where an older reader does not look.
FIRST_FIELDS = (
    "model_fingerprint",
    "tokenizer_fingerprint",
    "base_model_type",
    "chunk_size",
    "memory_layers",
    "similarity",
    "shared_router",
    "prefix_token_ids",
)
# Came later, and stands among the first where it is known, so that older readers, which would ask with other positions
# than the documents', refuse the bank.
ROPE_LENGTH = "rope_length"
ROPE_LENGTH_DIFFERS = " (the longest text, in tokens, with the same positions; load the model with that `rope_length`)"

# Fields of a base's configuration on which no state depends that a bank keeps. All others count, those of families
# that are not known today too.
STATELESS_FIELDS = frozenset(
    {
        # names, bookkeeping, and what a forward returns
        *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "_commit_hash"),
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix"),
        *(
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "use_cache",
            "torchscript",
        ),
        # how the same is computed; the weights' own record has their dtype
        *("dtype", "torch_dtype", "_attn_implementation", "_experts_implementation", "attn_implementation"),
        *("chunk_size_feed_forward", "pretraining_tp", "slow_but_exact", "gradient_checkpointing", "use_mamba_kernels"),
        # what only training looks at, and what stands behind the last layer
        *("init_std", "embed_init_std", "router_jitter_noise", "input_jitter_noise", "router_aux_loss_coef"),
        *("aux_loss_coef", "router_z_loss_coef", "z_loss_coefficient", "tie_word_embeddings", "num_logits_to_keep"),
        *("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier", "layerdrop", "dropout_p"),
    }
)
STATELESS_PREFIXES = ("initializer_", "summary_", "classifier_")
STATELESS_ENDINGS = ("_token_id", "_token_index", "dropout", "dropout_prob", "_pdrop", "_layerdrop")
# Schemes of positions that do not look at `max_position_embeddings`.
UNLIMITED_POSITIONS = frozenset({"default", "linear", "llama3"})


@dataclass(frozen=True)
class BankOrigin:
    """The origin of a bank, or the one that a model would give it.

    A new field is one more attribute here with the default None, which stands for "not known" and is not compared.

    Attributes:
        model_fingerprint: `model_fingerprint(model)`.
        tokenizer_fingerprint: `tokenizer_fingerprint(tokenizer)`, None where no tokenizer was at hand.
        base_model_type: `model_type` of the base decoder.
        chunk_size: tokens per chunk.
        memory_layers: ascending.
        similarity: `"cosine"` (routing keys are normalized) or `"dot"`.
        shared_router: routing keys are the pooled attention keys.
        prefix_token_ids: the template prefix.
        configuration: fields of the base's configuration that its states depend on, as JSON values; None in banks of
            earlier versions.
        configuration_defaults: those of its fields that had the default of the transformers at hand, and need not be
            known to another one.
        weights: what `model_fingerprint` stands for, and adapters; None in banks of earlier versions.
        rope_length: the longest text, in tokens, that has the positions of the documents (`equivalent_length`); None
            where positions do not depend on the length of a text, and in banks of earlier versions.

    Raises:
        ValueError: for a field of the wrong type, naming it. Lists become tuples.
    """

    model_fingerprint: str
    tokenizer_fingerprint: str | None
    base_model_type: str
    chunk_size: int
    memory_layers: tuple[int, ...]
    similarity: str
    shared_router: bool
    prefix_token_ids: tuple[int, ...]
    configuration: Mapping[str, object] | None = None
    configuration_defaults: tuple[str, ...] | None = None
    weights: WeightsRecord | None = None
    rope_length: int | None = None

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, what: str) -> None:
            if not valid:
                raise ValueError(f"`{name}` must be {what}, got {vars(self)[name]!r:.80}")

        for name in ("model_fingerprint", "base_model_type", "similarity"):
            require(name, isinstance(vars(self)[name], str), "a string")
        require("tokenizer_fingerprint", isinstance(self.tokenizer_fingerprint, str | None), "a string or null")
        require("chunk_size", type(self.chunk_size) is int and self.chunk_size >= 1, "an integer of at least 1")
        require("shared_router", isinstance(self.shared_router, bool), "true or false")
        for name in ("memory_layers", "prefix_token_ids"):
            value = vars(self)[name]
            natural = isinstance(value, list | tuple) and all(type(item) is int and item >= 0 for item in value)
            require(name, natural, "a list of integers from 0")
            object.__setattr__(self, name, tuple(value))
        ascending = self.memory_layers and self.memory_layers == tuple(sorted(set(self.memory_layers)))
        require("memory_layers", bool(ascending), "a non-empty list of layers, ascending")
        require("configuration", isinstance(self.configuration, Mapping | None), "an object or null")
        if (names := self.configuration_defaults) is not None:
            valid = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
            require("configuration_defaults", valid, "a list of strings or null")
            object.__setattr__(self, "configuration_defaults", tuple(names))
        length = self.rope_length
        require(
            ROPE_LENGTH, length is None or (type(length) is int and length >= 1), "an integer of at least 1 or null"
        )
        require("weights", isinstance(self.weights, WeightsRecord | None), "a record of weights or null")

    def differences(self, other: BankOrigin) -> list[str]:
        """List where the origin of a bank (this) and of a model (`other`) differ: one line each, empty where nowhere.

        What is not known of one of them is not compared.
        """
        lines = self._differences_of_weights(other)
        for field in fields(self):
            ours, theirs = vars(self)[field.name], vars(other)[field.name]
            apart = field.name in ("model_fingerprint", "weights", ROPE_LENGTH)
            apart = apart or field.name.startswith("configuration")
            if not apart and ours is not None and theirs is not None and ours != theirs:
                ours, theirs = (list(value) if isinstance(value, tuple) else value for value in (ours, theirs))
                lines.append(f"{field.name}: the bank has {ours}, the model {theirs}")
        if self.rope_length is None and other.rope_length is not None:
            lines.append(
                f"{ROPE_LENGTH}: the bank does not say for texts of which length its positions are: an earlier version "
                "made it, whose documents depended on what they were encoded beside; encode them again"
            )
        elif self.rope_length != other.rope_length:
            ours, theirs = self.rope_length, other.rope_length
            lines.append(f"{ROPE_LENGTH}: the bank has {ours}, the model {theirs}{ROPE_LENGTH_DIFFERS}")
        if self.configuration is not None and other.configuration is not None:
            ours, theirs = (
                {
                    name: value
                    for name, value in (side.configuration or {}).items()
                    if name in (opposite.configuration or {}) or name not in (side.configuration_defaults or ())
                }
                for side, opposite in ((self, other), (other, self))
            )
            lines += _configuration_differences(self.base_model_type, ours, theirs)
        if self.weights is not None and other.weights is not None and "rope" not in " ".join(lines):
            lines += frequency_differences(self.weights, other.weights)
        return lines

    def _differences_of_weights(self, other: BankOrigin) -> list[str]:
        if self.weights is not None and other.weights is not None:
            return weight_differences(self.weights, other.weights)
        if self.model_fingerprint == other.model_fingerprint or self.matches_only_as_of_old(other):
            return []
        line = f"model_fingerprint: the bank has {self.model_fingerprint}, the model {other.model_fingerprint}"
        if other.weights is not None:
            if "float16" in other.weights.dtypes:
                line += (
                    "; the model is in float16, in which a bank that an earlier version made cannot be recognized: "
                    "load it in float32 or bfloat16"
                )
            if other.weights.adapters:
                names = ", ".join(repr(adapter.name) for adapter in other.weights.adapters)
                line += f"; active in the model: adapter {names}"
        return [line]

    def matches_only_as_of_old(self, model: BankOrigin) -> bool:
        """Tell whether a bank of an earlier version has the fingerprint that this one took of all adapters loaded."""
        if self.weights is not None or model.weights is None or self.model_fingerprint == model.model_fingerprint:
            return False
        return self.model_fingerprint == model.weights.older

    def to_dict(self) -> dict[str, object]:
        """The fields as JSON values; of those that came later, the ones that are known."""
        record: dict[str, object] = {}
        for field in fields(self):
            value = vars(self)[field.name]
            if field.name in FIRST_FIELDS or value is not None:
                value = value.to_dict() if isinstance(value, WeightsRecord) else value
                record[field.name] = list(value) if isinstance(value, tuple) else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BankOrigin:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for an unknown, missing or mistyped field, naming it.
        """
        names = {field.name for field in fields(cls)}
        for problem, wrong in (("unknown", record.keys() - names), ("missing", set(FIRST_FIELDS) - record.keys())):
            if wrong:
                raise ValueError(f"{problem} field of the origin: {', '.join(sorted(wrong))}")
        values = dict(record)
        if values.get("weights") is not None:
            values["weights"] = WeightsRecord.from_dict(values["weights"])
        return cls(**values)

    def to_manifest(self) -> OriginEntries:
        """The entries of a manifest: `origin`, which every reader compares, and `made_with`, which later ones do."""
        record = self.to_dict()
        first = {name: record.pop(name) for name in (*FIRST_FIELDS, ROPE_LENGTH) if name in record}
        return {"origin": first, "made_with": record} if record else {"origin": first}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> BankOrigin:
        """The inverse of `to_manifest`; fields of `made_with` that a later version added are ignored.

        Raises:
            ValueError: for a field that is missing, mistyped or, in `origin`, unknown, naming it.
        """
        first, later = manifest["origin"], manifest.get("made_with", {})
        if not isinstance(later, Mapping):
            raise ValueError("`made_with` must be an object")
        if wrong := first.keys() - {*FIRST_FIELDS, ROPE_LENGTH}:
            raise ValueError(f"unknown field of the origin: {', '.join(sorted(wrong))}")
        known = {field.name for field in fields(cls)} - {*FIRST_FIELDS, ROPE_LENGTH}
        return cls.from_dict({**first, **{name: later[name] for name in known & later.keys()}})


def check_origin(bank: BankOrigin, model: BankOrigin) -> None:
    """Make sure that a model can read a bank.

    Raises:
        ValueError: listing every difference, and the remedy.
    """
    if differences := bank.differences(model):
        lines = "".join(f"\n  - {line}" for line in differences)
        raise ValueError(
            f"This bank was not made with this model:{lines}\nLoad the model and tokenizer that made the bank, or "
            "encode the documents again with this model."
        )
    if bank.weights is not None and model.weights is not None and frequencies_were_rounded(bank.weights, model.weights):
        logger.warning_once(
            "A cast of the model (`half()`, `to(dtype)`) has rounded the frequencies of its positions, here or when "
            "the bank was made, which shows the more the longer a text is; loading with `dtype=` leaves them exact."
        )
    if bank.matches_only_as_of_old(model):
        logger.warning_once(
            "An earlier version made this bank, which did not note which of the loaded adapters were active; make sure "
            "that those are active that were then, or encode the documents again."
        )


# The configuration ----------------------------------------------------------------------------------------------------


def state_configuration(config: PreTrainedConfig, quantized: bool = False) -> dict[str, object]:
    """The fields of a configuration that the states of its model depend on, as JSON values.

    Args:
        config: of a base model, or an `MSAConfig`, whose own fields are left out.
        quantized: whether the weights are; where they are plain numbers, how they were stored does not matter.
    """
    ignored = {*STATELESS_FIELDS, *OWN_FIELDS, *(() if quantized else ("quantization_config",))}
    if _position_schemes(config) <= UNLIMITED_POSITIONS:
        ignored.add("max_position_embeddings")
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ignored
        and not name.startswith(STATELESS_PREFIXES)
        and not name.endswith(STATELESS_ENDINGS)
        and value is not None
    }
    return _json_values(fields)


@dataclass(frozen=True)
class StateFields:
    """The part of a model's configuration that its states depend on.

    Attributes:
        configuration: see `state_configuration`.
        defaults: see `default_fields`.
    """

    configuration: Mapping[str, object]
    defaults: tuple[str, ...]


# Model -> what its configuration was, copied, and what was found in it.
_fields: weakref.WeakKeyDictionary[nn.Module, tuple[object, StateFields]] = weakref.WeakKeyDictionary()


def state_fields(model: PreTrainedModel, kind: str, quantized: bool) -> StateFields:
    """The fields of a model's configuration, looked for again only where it is not what it was.

    Args:
        model: with an `MSAConfig`.
        kind: `base_model_type`.
        quantized: see `state_configuration`.
    """
    config = model.config
    now = type(config), kind, quantized, vars(config)
    known = _fields.get(model)
    if known is not None and known[0] == now:
        return known[1]
    configuration = state_configuration(config, quantized)
    found = StateFields(configuration, default_fields(kind, configuration))
    if _tells_changes(vars(config)):
        _fields[model] = (*now[:-1], copy.deepcopy(vars(config))), found
    return found


def _tells_changes(value: object) -> bool:
    """Tell whether a copy differs as soon as anything in the value changes: not so where a class decides what is equal,
    as those of ways to quantize do."""
    if type(value) is dict:
        return all(_tells_changes(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_tells_changes(item) for item in value)
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def default_fields(kind: str, configuration: Mapping[str, object]) -> tuple[str, ...]:
    """The fields of `state_configuration` that have the default of this transformers, ascending."""
    defaults = _class_defaults(kind)
    return tuple(sorted(name for name, value in configuration.items() if name in defaults and defaults[name] == value))


@functools.cache
def _class_defaults(kind: str) -> dict[str, object]:
    known = kind in CONFIG_MAPPING and not getattr(CONFIG_MAPPING[kind], "has_no_defaults_at_init", False)
    return state_configuration(CONFIG_MAPPING[kind](), quantized=True) if known else {}


def _position_schemes(config: PreTrainedConfig) -> set[str]:
    """RoPE types of all kinds of layers; `"unknown"` where the configuration does not name them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [value for value in parameters.values() if isinstance(value, Mapping)] or [parameters]
    return {str(item.get("rope_type", "unknown")) for item in sets}


def _json_values(value: object) -> Any:
    """JSON values that are equal for equal settings."""
    value = value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_values(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def _flat(record: Mapping[str, Any], path: str = "") -> dict[str, object]:
    """Nested fields by their dotted names."""
    flat: dict[str, object] = {}
    for name, value in record.items():
        nested = isinstance(value, Mapping) and value
        flat.update(_flat(value, f"{path}{name}.") if nested else {f"{path}{name}": value})
    return flat


def _configuration_differences(kind: str, bank: Mapping[str, object], model: Mapping[str, object]) -> list[str]:
    if "quantization_config" not in bank or "quantization_config" not in model:
        # Whether weights are quantized is said of them.
        bank, model = (
            {name: value for name, value in record.items() if name != "quantization_config"} for record in (bank, model)
        )
    ours, theirs = _flat(bank), _flat(model)
    if ours.keys() != theirs.keys():
        # Another transformers has other fields: what one of them leaves out has the default of the one at hand.
        ours, theirs = ({**_defaults_of(kind, record), **_flat(record)} for record in (bank, model))
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        was, now = ours.get(name), theirs.get(name)
        absent = all(value is None or value is False for value in (was, now))
        if was != now and not absent:
            lines.append(
                f"configuration: {name} was {_brief(was)} when the bank was made, the model's is {_brief(now)}"
            )
    return lines


def _defaults_of(kind: str, record: Mapping[str, object]) -> dict[str, object]:
    """The defaults to which this transformers completes a configuration; empty where it does not take them."""
    if kind not in CONFIG_MAPPING:
        return {}
    try:
        return _flat(state_configuration(CONFIG_MAPPING[kind](**record), quantized=True))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError):
        return {}


def _brief(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
