"""Things that commands are given by name: checkpoints, protocols, and directories to save to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_errors import UserError, reported

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..generation import PromptProtocol
    from ..model.modeling_msa import MSAForCausalLM

PROTOCOLS = ("compact", "published", "none")


def checkpoint(name: str) -> str:
    """A directory or a Hub id; a path that does not exist is neither."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"{name}: not a directory")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise UserError(f"{name}: no such directory")
    return name


def load(name: str, device: torch.device, dtype: str) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase]:
    """A model with a memory, and its tokenizer."""
    checkpoint(name)
    from transformers import AutoTokenizer

    from ..model.modeling_msa import MSAForCausalLM

    with reported(foreign=True, subject=name):
        model = MSAForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        return model, AutoTokenizer.from_pretrained(name)


def protocol_of(choice: str, name: str) -> PromptProtocol | None:
    """The protocol that was asked for, or the checkpoint's own; None for plain text."""
    from ..generation import COMPACT, PUBLISHED, PromptProtocol

    if choice != "auto":
        return {"compact": COMPACT, "published": PUBLISHED, "none": None}[choice]
    try:
        with reported():
            return PromptProtocol.from_pretrained(name)
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return None


def new_directory(name: str) -> Path:
    """A directory to save to."""
    path = Path(name)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{name}: not a directory")
    return path
