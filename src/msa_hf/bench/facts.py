"""Facts that a result states about itself: the model, the machine, versions and the command."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..generation import PromptProtocol
from ..model.modeling_msa import MSAForCausalLM
from ..retrieval import FusionWeights


def model_facts(
    model: MSAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PromptProtocol | None,
    name: str = "",
    fusion: FusionWeights | None = None,
) -> dict[str, Any]:
    """Facts that tell a model, with the way it is asked, from others.

    Args:
        name: by which the caller knows it.
        fusion: weights that come with it, where questions are asked by them.
    """
    origin, config = model.memory_origin(tokenizer), model.config
    return {
        "name": _short_name(name or config.name_or_path),
        "fingerprint": origin.model_fingerprint,
        "tokenizer": origin.tokenizer_fingerprint,
        "type": config.base_model_type,
        "parameters": sum(item.numel() for item in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory_layers": list(config.memory_layers),
        "top_k": config.top_k,
        "protocol": None if protocol is None else protocol.to_dict(),
        "fusion": None if fusion is None else _fusion_name(fusion),
    }


def _fusion_name(fusion: FusionWeights) -> str:
    digest = hashlib.sha256(json.dumps(asdict(fusion), sort_keys=True).encode()).hexdigest()
    return f"{fusion.method}, {digest[:16]}"


def _short_name(name: str) -> str:
    """A name on the Hub as it is, a directory's own name."""
    return name if name.count("/") == 1 and not Path(name).is_dir() else Path(name).name


def run_facts(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """Hardware, versions, the time and the command (default: that of this process)."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([program(), *sys.argv[1:]]) if command is None else command,
        "hardware": hardware(device),
        "versions": {
            "msa_hf": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def digest_of(texts: Iterable[str]) -> str:
    """A name that tells these texts, in their order, from others."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()[:16]


def program() -> str:
    """The name of what runs, as a user types it."""
    name = Path(sys.argv[0]).name
    return "msa-hf" if name in ("__main__.py", "command_line.py") else name


def hardware(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return (
        f"{threads} CPU thread{'s' * (threads > 1)} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    )
