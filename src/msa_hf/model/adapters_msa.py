"""Adapters that PEFT put into a model: which are active, what they add, and what the model is without them.

PEFT is asked only where it has been imported, because no model has such layers before.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .walking_msa import Met

# The module that a layer of PEFT stands in front of. An adapter's own parameters lie beside it.
WRAPPED = ("base_layer", "original_module")
# Attributes of a LoRA layer that change what an adapter adds, besides its parameters.
LORA_SETTINGS = ("scaling",)


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter under the name that it has in the model without adapters.

    Attributes:
        name: dotted.
        owner: the module that holds it.
        local: its name there.
        tensor: the parameter, or the buffer.
    """

    name: str
    owner: nn.Module
    local: str
    tensor: Tensor

    def current(self) -> Tensor:
        """The tensor that the owner holds under that name now."""
        return dict((*self.owner.named_parameters(recurse=False), *self.owner.named_buffers(recurse=False)))[self.local]


@dataclass(frozen=True)
class ActiveAdapter:
    """An adapter at work in one layer.

    Attributes:
        name: as the user named it.
        path: of the layer, in the model without adapters.
        layer: of PEFT.
        sign: 1, or -1 for one that is merged into the weights although adapters are disabled: the next forward takes
            it out again.
    """

    name: str
    path: str
    layer: nn.Module
    sign: int

    @property
    def is_plain_lora(self) -> bool:
        """Tell whether all that it does is to add `scaling * B @ A` to the weight of a linear layer."""
        layer = self.layer
        if type(layer) is not _peft("tuners.lora").Linear or self.name in layer.lora_variant:
            return False
        factors = layer.lora_A[self.name], layer.lora_B[self.name]
        return all(type(item) is nn.Linear and item.bias is None and not item.weight.is_meta for item in factors)

    def replaced(self) -> dict[str, Tensor]:
        """The parameters that it puts in the place of the model's, by their names there; empty where there are none."""
        layer = self.layer
        if not isinstance(layer, _peft("utils.other").ModulesToSaveWrapper):
            return {}
        whole = layer.get_submodule(f"modules_to_save.{self.name}")
        return {f"{self.path}.{name}": tensor for name, tensor in whole.named_parameters()}

    @property
    def scaling(self) -> float | None:
        """The factor of what it adds, None for a method that has none."""
        scaling = vars(self.layer).get("scaling")
        return float(scaling[self.name]) if isinstance(scaling, dict) and self.name in scaling else None

    def settings(self) -> list[str]:
        """The settings that change its effect besides its parameters, as text."""
        layer = self.layer
        lora = isinstance(layer, _peft("tuners.lora").LoraLayer)
        found = []
        for name in LORA_SETTINGS if lora else layer.other_param_names:
            values = vars(layer).get(name)
            if isinstance(values, dict) and isinstance(
                value := values.get(self.name), bool | int | float | str | tuple
            ):
                found.append(f"{name}={value}")
        variant = layer.lora_variant.get(self.name) if lora else None
        return [type(layer).__name__, *([type(variant).__name__] if variant is not None else []), *found]

    def tensors(self) -> list[PlacedParameter]:
        """Its parameters and buffers, by names within the layer without the adapter's, in order."""
        found = []
        for name, tensor in (*self.layer.named_parameters(), *self.layer.named_buffers()):
            parts = name.split(".")
            if self.name in parts and not set(WRAPPED) & set(parts[:2]):
                owner, _, local = name.rpartition(".")
                short = ".".join(part for part in parts if part != self.name)
                found.append(PlacedParameter(short, self.layer.get_submodule(owner), local, tensor))
        return sorted(found, key=lambda item: item.name)

    def changes_nothing(self) -> bool:
        """Tell whether it adds exactly zero, as an untrained LoRA does, or replaces a module by an equal one."""
        if replaced := self.replaced():
            before = {f"{self.path}.{name}": weight for name, weight in _wrapped(self.layer).named_parameters()}
            return replaced.keys() == before.keys() and all(_same(before[name], replaced[name]) for name in before)
        if not self.is_plain_lora:
            return False
        factor = self.layer.get_parameter(f"lora_B.{self.name}.weight").detach()
        return self.scaling == 0 or not bool(factor.any())

    def added(self, places: Tensor) -> tuple[Tensor, torch.dtype]:
        """The values that a plain LoRA adds to its layer's weight, and the dtype of its factors.

        Args:
            places: [n] int64 indices into the flattened weight.

        Returns:
            [n] float64 on the CPU, and the dtype.
        """
        layer = self.layer
        first, second = (item[self.name].weight.detach() for item in (layer.lora_A, layer.lora_B))
        if layer.fan_in_fan_out:
            columns, rows = places // second.shape[0], places % second.shape[0]
        else:
            rows, columns = places // first.shape[1], places % first.shape[1]
        left = second[rows.to(second.device)].cpu().double()
        right = first[:, columns.to(first.device)].cpu().double()
        return self.sign * layer.scaling[self.name] * (left * right.T).sum(1), second.dtype


@functools.cache
def _peft(module: str) -> ModuleType:
    return importlib.import_module(f"peft.{module}")


def _layer_classes() -> tuple[type, ...]:
    """Classes of the layers that PEFT puts in front of others; empty where it was not imported."""
    if "peft" not in sys.modules:
        return ()
    return _peft("tuners.tuners_utils").BaseTunerLayer, _peft("utils.other").AuxiliaryTrainingWrapper


def adapter_layers(met: Met) -> list[nn.Module]:
    """The layers of PEFT in what was met, active or not."""
    classes = _layer_classes()
    return met.of(classes) if classes else []


def adapter_state(met: Met) -> tuple[object, ...]:
    """All that PEFT can switch without touching a parameter, to be compared with what it was."""
    return tuple(
        (
            tuple(layer.active_adapters),
            tuple(layer.merged_adapters),
            bool(layer.disable_adapters),
            tuple(vars(layer)["scaling"].items()) if isinstance(vars(layer).get("scaling"), dict) else (),
        )
        for layer in adapter_layers(met)
    )


def place_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model, each after the path (with a dot at its end) that it has where there are no adapters."""
    if isinstance(module, _layer_classes()):
        yield from place_modules(_wrapped(module), path)
        return
    yield path, module
    for name, child in module.named_children():
        yield from place_modules(child, f"{path}{name}.")


def place_parameters(model: nn.Module) -> Iterator[PlacedParameter]:
    """The parameters of a model as `named_parameters()` gives them where there are no adapters."""
    seen: set[int] = set()
    for path, module in place_modules(model):
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield PlacedParameter(f"{path}{name}", module, name, tensor)


def active_adapters(module: nn.Module, path: str = "", skip: nn.Module | None = None) -> Iterator[ActiveAdapter]:
    """The adapters at work in a model, layer by layer.

    Args:
        module: the model.
        path: of the module, with a dot at its end.
        skip: a module whose adapters do not count.
    """
    if module is skip:
        return
    if isinstance(module, _layer_classes()):
        layer: Any = module
        # Adapters that are merged are part of the weights; PEFT then computes with these alone.
        names, sign = (layer.merged_adapters, -1) if layer.disable_adapters else (layer.active_adapters, 1)
        for name in names if layer.disable_adapters or not layer.merged_adapters else ():
            adapter = ActiveAdapter(name, path.removesuffix("."), layer, sign)
            if adapter.tensors() and not adapter.changes_nothing():
                yield adapter
        yield from active_adapters(_wrapped(module), path, skip)
        return
    for name, child in module.named_children():
        yield from active_adapters(child, f"{path}{name}.", skip)


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two parameters hold the same numbers; where these are not at hand, they do not."""
    if first.is_meta or second.is_meta or first.shape != second.shape or first.device != second.device:
        return False
    start = slice(64)  # tells most apart without reading all
    first, second = first.detach(), second.detach()
    return torch.equal(first.flatten()[start], second.flatten()[start]) and torch.equal(first, second)


def _wrapped(layer: nn.Module) -> nn.Module:
    """The module that a layer of PEFT stands in front of."""
    return layer.base_layer if isinstance(layer, _peft("tuners.tuners_utils").BaseTunerLayer) else layer.original_module
