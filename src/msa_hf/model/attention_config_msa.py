"""The configuration as attention layers read it, which sends them to the attention functions that know a memory.

The model's own configuration names the attention that the user chose, so that transformers treats it as the base:
masks, checks, generation and continuous batching ask for that name. Only the layers' look-up of their function differs.
"""

from typing import Any

from transformers import PreTrainedConfig

from .attention_msa import IMPLEMENTATIONS

# What `set_attn_implementation` takes: a name, or a mapping from parts of a model (`""`: all of it).
Implementations = str | None | dict[str, "Implementations"]


class AttentionConfig:
    """A live view of a model's configuration in which the attention implementation is ours, where ours stands on it.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str | None:
        name = self.config._attn_implementation
        return IMPLEMENTATIONS.get(name, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "config" not in self.__dict__:  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.config, name)


def check_holds_memory(name: str | None) -> None:
    """Check that a memory can be attended to with the attention implementation `name`.

    Raises:
        ValueError: naming those with which it can.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported: it cannot hold a memory; use one of '
            f"{sorted(IMPLEMENTATIONS)}."
        )


def implementations_in(requested: Implementations) -> list[str | None]:
    """The names in what `set_attn_implementation` takes: one, or a mapping from parts of a model (`""`: all of it)."""
    if not isinstance(requested, dict):
        return [requested]
    return [name for part in requested.values() for name in implementations_in(part)]
