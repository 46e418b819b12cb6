"""The arguments that PEFT hands its layers for each sample of a batch, in runs over other sequences than the batch's.

`adapter_names`, aLoRA's `alora_offsets` and Poly's `task_ids` reach the layers by hooks that know nothing of a training
step's documents. As PEFT itself does for encoders, a further hook puts in their place what the sequences of a run need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .adapters_msa import adapter_layers
from .types_msa import Arguments
from .walking_msa import met_in

NAMES = ("adapter_names", "task_ids")
OFFSETS = "alora_offsets"
Offsets = Callable[[Sequence[int | None]], list[int | None]]
Values = Tensor | list[str]  # of each sample: the task's number, or the adapter's name


@contextmanager
def sequences_of(model: nn.Module, count: int, owners: Tensor | None, offsets: Offsets | None = None) -> Iterator[None]:
    """A run over `count` sequences, within it.

    Args:
        owners: [count] int64, the sample of the batch that each sequence belongs to; None where all samples share them.
        offsets: aLoRA's offsets of the samples -> of the sequences; default none, with which the base computes alone.

    Raises:
        ValueError: in the run, where sequences are shared by samples of several adapters or tasks.
    """

    def replace(module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments) -> tuple[tuple[Tensor, ...], Arguments]:
        changed: Arguments = {
            name: _picked(name, kwargs[name], count, owners) for name in NAMES if kwargs.get(name) is not None
        }
        if kwargs.get(OFFSETS) is not None:
            _refuse_checkpointing(model)
            changed[OFFSETS] = [None] * count if offsets is None else offsets(kwargs[OFFSETS])
        return args, {**kwargs, **changed}

    handles = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in _adapted_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def one_adapter(model: nn.Module) -> Iterator[None]:
    """A run that reads a bank, which was compared with the active adapters.

    Raises:
        ValueError: in the run, where `adapter_names` gives a sample another one.
    """

    def compare(module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments) -> None:
        active = module.active_adapters
        if others := sorted(set(kwargs.get("adapter_names") or ()) - set(active)):
            raise ValueError(
                f"`adapter_names` names {others}, but the bank was made with {sorted(active)}, which are active. Ask "
                "the questions of each adapter in a batch of their own, after set_adapter() and with a bank that was "
                "made then."
            )

    handles = [layer.register_forward_pre_hook(compare, with_kwargs=True) for layer in _adapted_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapted_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put in, which take such arguments."""
    return adapter_layers(met_in(model))


def _picked(name: str, values: Values, count: int, owners: Tensor | None) -> Values:
    """The values of the sequences, of those of the samples."""
    if owners is None:
        if len(distinct := set(values.tolist() if isinstance(values, Tensor) else values)) > 1:
            raise ValueError(
                f"`{name}` names {sorted(distinct)} for the samples of this batch, which share their documents; those "
                "are encoded with one. Make a batch for each, or pass packed rows, which have documents of their own."
            )
        owners = torch.zeros(count, dtype=torch.long)
    if isinstance(values, Tensor):
        return values[owners.to(values.device)]
    return [values[owner] for owner in owners.tolist()]


def _refuse_checkpointing(model: nn.Module) -> None:
    if torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) and module.training for module in model.modules()
    ):
        raise ValueError(
            "aLoRA cannot train on documents under gradient checkpointing: PEFT would apply the offsets of the "
            "questions to the documents when a layer runs again. Turn gradient checkpointing off."
        )
