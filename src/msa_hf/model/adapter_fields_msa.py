"""The fields of the memory that an adapter was trained for, in a file beside it, compared with those of the model.

PEFT saves weights and the name of the base: whoever loads both gets a base without a memory, or with another.
"""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

from transformers.utils import logging

from .bounds_msa import read_json
from .configuration_msa import MSAConfig
from .hub_files_msa import file_beside
from .hub_msa import BankUnavailable
from .types_msa import Arguments

logger = logging.get_logger(__name__)

ADAPTER, ADAPTER_MEMORY = "adapter_config.json", "memory.json"
# What a model chooses and reads depends on these; other fields are about training.
COMPARED = (
    "memory_layers",
    "chunk_size",
    "similarity",
    "head_reduction",
    "query_reduction",
    "chunk_reduction",
    "shared_router",
    "score_bias",
    "prefix_token_ids",
    "rope_length",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def check_adapter_fields(config: MSAConfig, name: str | PathLike[str], kwargs: Arguments) -> None:
    """Compare the fields that an adapter was trained for with those of the model that it is loaded onto.

    Another `top_k` is a warning, since that may be chosen at any time. An adapter without such a file is not compared.

    Args:
        config: of the model.
        name: of the adapter: a directory, or a name on the Hub.
        kwargs: of loading it, those for the Hub among them.

    Raises:
        ValueError: where a field differs on which depends what is chosen and read, with the remedy; for a file that is
            damaged.
    """
    fields = _adapter_fields(name, kwargs)
    others = [field for field in COMPARED if field in fields and fields[field] != getattr(config, field)]
    if others:
        theirs, ours = _stated(fields, others), _stated({field: getattr(config, field) for field in others}, others)
        raise ValueError(
            f"The adapter {fspath(name)!r} was trained with {theirs} ({ADAPTER_MEMORY} beside it), but the model has "
            f"{ours}: it would choose and read otherwise than it was trained to. Make the model with the fields in "
            "that file, MSAForCausalLM.from_base(BASE, **fields), or from_pretrained where the base has a memory, and "
            "load the adapter onto it."
        )
    if fields.get("top_k", config.top_k) != config.top_k:
        logger.warning(
            f"The adapter {fspath(name)!r} was trained with top_k={fields['top_k']!r}, but the model has "
            f"top_k={config.top_k}: set `model.config.top_k`, unless that is meant."
        )


def refuse_adapter(name: str | PathLike[str], kwargs: Arguments) -> None:
    """Refuse what is to be loaded as a checkpoint and is an adapter.

    Raises:
        ValueError: naming how to load it.
    """
    try:
        found = file_beside(fspath(name), ADAPTER, **_of_hub(kwargs))
    except BankUnavailable:  # whoever asks has an error to raise already
        return
    if found is None:
        return
    base = _read(found).get("base_model_name_or_path") or "BASE"
    given = _adapter_fields(name, kwargs)
    fields = _stated(given, [field for field in (*COMPARED, "top_k", "routers_trained") if field in given]) or "..."
    raise ValueError(
        f"{fspath(name)!r} is an adapter of PEFT and no checkpoint: load it onto its base, with the fields of the "
        f"memory that it was trained for: PeftModel.from_pretrained(MSAForCausalLM.from_base({base!r}, {fields}), "
        f"{fspath(name)!r}); from_pretrained where the base has a memory."
    )


def _adapter_fields(name: str | PathLike[str], kwargs: Arguments) -> Arguments:
    """The fields beside an adapter; none where there is no such file, or, said aloud, nobody could find out."""
    try:
        found = file_beside(fspath(name), ADAPTER_MEMORY, **_of_hub(kwargs))
    except BankUnavailable as error:
        logger.warning(f"{error} The adapter was not compared with the model that it is loaded onto.")
        return {}
    return {} if found is None else _read(found)


def _of_hub(kwargs: Arguments) -> Arguments:
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def _read(path: Path) -> Arguments:
    try:
        fields: object = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; save the adapter again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: not an object of fields; save the adapter again.")
    return fields


def _stated(fields: Arguments, names: list[str]) -> str:
    return ", ".join(f"{name}={fields[name]!r}" for name in names)
