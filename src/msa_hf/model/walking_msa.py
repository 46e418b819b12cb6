"""The modules and tensors of a model, in a fraction of the time that `nn.Module` takes, whose iterators name them.

A walk is remembered by what it met, and taken again where a module has other children, or another class, than then.
"""

from __future__ import annotations

import operator
import weakref
from itertools import chain

import torch
from torch import Tensor, nn

_children = operator.attrgetter("_modules")
_parameters, _buffers = operator.attrgetter("_parameters"), operator.attrgetter("_buffers")


class Walk:
    """A walk through a model, and what it met; it keeps none of it alive.

    Args:
        model: walked through now.

    Attributes:
        places: classes -> places of the modules of these among all.
    """

    def __init__(self, model: nn.Module) -> None:
        found: dict[nn.Module, None] = {}
        _meet(model, found)
        self.modules = [weakref.ref(module) for module in found]
        self.kinds = list(map(type, found))
        self.children = _identities(list(found))
        self.places: dict[tuple[type, ...], list[int]] = {}

    def again(self) -> Met | None:
        """The modules that this walk meets now, None where they are others."""
        found = [module for reference in self.modules if (module := reference()) is not None]
        # All of them are alive here, so that no other module can have the identity of one.
        same = len(found) == len(self.modules) and list(map(type, found)) == self.kinds
        return Met(found, self.places) if same and _identities(found) == self.children else None


def _meet(module: nn.Module, found: dict[nn.Module, None]) -> None:
    if module not in found:
        found[module] = None
        for child in module._modules.values():
            if child is not None:
                _meet(child, found)


def _identities(modules: list[nn.Module]) -> list[int]:
    """The identities of the children of modules, in order."""
    return list(map(id, chain.from_iterable(map(dict.values, filter(None, map(_children, modules))))))


class Met:
    """The modules of a model, of now.

    Attributes:
        modules: all, each once, in the order of `modules()`.
    """

    def __init__(self, modules: list[nn.Module], places: dict[tuple[type, ...], list[int]]) -> None:
        self.modules, self._places = modules, places

    def of(self, classes: tuple[type, ...]) -> list[nn.Module]:
        """Those of some classes."""
        if classes not in self._places:
            self._places[classes] = [place for place, item in enumerate(self.modules) if isinstance(item, classes)]
        return [self.modules[place] for place in self._places[classes]]

    def tensors(self) -> list[Tensor]:
        """Their parameters and buffers; one that several hold as often as they do."""
        held = filter(None, chain(map(_parameters, self.modules), map(_buffers, self.modules)))
        return [tensor for tensors in held for tensor in tensors.values() if tensor is not None]


_walks: weakref.WeakKeyDictionary[nn.Module, Walk] = weakref.WeakKeyDictionary()


def met_in(model: nn.Module) -> Met:
    """The modules of a model now."""
    if torch.compiler.is_compiling():  # which follows no walk
        return Met(list(model.modules()), {})
    walk = _walks.get(model)
    met = None if walk is None else walk.again()
    if met is None:
        _walks[model] = walk = Walk(model)
        met = walk.again()
        assert met is not None
    return met
