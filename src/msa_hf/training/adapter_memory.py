"""The fields of the memory that an adapter was trained for, beside what PEFT saves."""

from __future__ import annotations

import json
from pathlib import Path

from ..model.adapter_fields_msa import ADAPTER_MEMORY as ADAPTER_MEMORY
from ..model.configuration_msa import OWN_FIELDS, MSAConfig


def save_adapter_memory(config: MSAConfig, directory: str | Path) -> None:
    """Write what a base has to be given, by `from_base` or `from_pretrained`, for the model that an adapter belongs to.

    Fields that are the default are written as well: a base that has a memory may have another value there.

    Args:
        config: of the trained model.
        directory: of the adapter.
    """
    fields = {name: getattr(config, name) for name in OWN_FIELDS if name != "base_model_type"}  # the base says that one
    for name in ("rope_length", "routers_trained"):  # say nothing where they are None
        if fields[name] is None:
            del fields[name]
    Path(directory, ADAPTER_MEMORY).write_text(json.dumps(fields) + "\n", encoding="utf-8")
