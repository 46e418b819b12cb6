"""The fields of the memory that an adapter was trained for, beside what PEFT saves."""

from __future__ import annotations

import json
from pathlib import Path

from ..model.configuration_msa import OWN_FIELDS, MSAConfig

ADAPTER_MEMORY = "memory.json"


def save_adapter_memory(config: MSAConfig, directory: str | Path) -> None:
    """Write what `MSAForCausalLM.from_base` has to be given for the model that an adapter belongs to.

    Args:
        config: of the trained model; its memory layers are written, and every other field that is not the default.
        directory: of the adapter.
    """
    defaults = MSAConfig()
    fields = {
        name: getattr(config, name)
        for name in OWN_FIELDS
        if name == "memory_layers" or getattr(config, name) != getattr(defaults, name)
    }
    fields.pop("base_model_type", None)  # the base says it
    Path(directory, ADAPTER_MEMORY).write_text(json.dumps(fields) + "\n", encoding="utf-8")
