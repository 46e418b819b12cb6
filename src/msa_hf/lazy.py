"""Packages whose names are imported when they are first asked for, so that importing a package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence

from .moved import renamed


def exports(
    package: str, homes: Mapping[str, Sequence[str]], old_names: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """A `__getattr__` for a package that imports its names from where they are.

    For type checkers the package imports the same names under `TYPE_CHECKING`.

    Args:
        package: its `__name__`.
        homes: module, relative to the package as in `from .store.lock import ...` -> names that the package exports.
        old_names: old name -> new one, which still works and warns.
    """
    home = {name: module for module, names in homes.items() for name in names}
    submodules = {module.split(".")[1] for module in homes} - {""}
    find_renamed = renamed(package, dict(old_names or {}))

    def find(name: str) -> object:
        if name in home:
            value = getattr(importlib.import_module(home[name], package), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        return find_renamed(name)

    return find
