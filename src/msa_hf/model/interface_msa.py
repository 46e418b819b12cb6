"""The number of the interface between a model and its memory, which a checkpoint's code keeps as it was when saved."""

from __future__ import annotations

# Raised if what models ask of memories changes, or what is asked of models: 1 was msa-hf 0.1.0.
MEMORY_INTERFACE = 2


def check_interface(model: object) -> None:
    """Refuse a model whose code came with its checkpoint from a release with another interface.

    Such a model goes on to work with banks of its own making; only what the package adds around it does not fit.

    Raises:
        ValueError: naming the remedy.
    """
    ours = getattr(getattr(model, "config", None), "model_type", None) == "msa"
    found = getattr(model, "memory_interface", 1)
    if ours and found != MEMORY_INTERFACE:
        raise ValueError(
            "This model's code came with its checkpoint (`trust_remote_code=True`) from another release of msa-hf, "
            "which exchanges documents with a memory in another way. Run `msa-hf refresh` on the checkpoint's "
            "directory, which changes its code alone, or load it without `trust_remote_code`."
        )
