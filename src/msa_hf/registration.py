"""Registration with transformers' Auto classes, once transformers or the model of this package is imported.

`import msa_hf` alone loads neither, so that the command line answers at once. Whoever uses an Auto class has imported
transformers, and whoever uses a class of the model has imported `msa_hf.model`: by then everything is registered, and
the model uses the package's operations.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
TRIGGERS = ("transformers", f"{PACKAGE}.model")


def register_when_needed() -> None:
    """Register behind the import of the first of `TRIGGERS`; now where transformers is there already."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from . import ops as ops  # the model uses them from here on
    from .model.configuration_msa import MSAConfig
    from .model.modeling_msa import MSAForCausalLM, MSAModel

    AutoConfig.register(MSAConfig.model_type, MSAConfig)
    AutoModel.register(MSAConfig, MSAModel)
    AutoModelForCausalLM.register(MSAConfig, MSAForCausalLM)
    # A tokenizer keeps its own class in tokenizer_config.json; this one reads those that name none.
    AutoTokenizer.register(MSAConfig, PreTrainedTokenizerFast)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds what the other finders find; registers behind the first of `TRIGGERS` and is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TRIGGERS:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader, self)
                return spec
        return None


class _ThenRegister(importlib.abc.Loader):
    """A module's own loader, and registration behind it."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watch in sys.meta_path:  # else another of them was first, and registers
            sys.meta_path.remove(self.watch)
            try:
                _register()
            except BaseException:
                sys.meta_path.insert(0, self.watch)  # this import fails; the next one tries again
                raise
