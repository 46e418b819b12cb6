"""Modules and names that changed since 0.1: the old ones work for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "chosen_msa": "model.document_rows_msa",
    "model.chosen_msa": "model.document_rows_msa",
    "bank.buffers": "bank.store.buffers",
    "bank.changes": "bank.store.changes",
    "bank.compaction": "bank.store.compact",
    "bank.encoding": "bank.encode_corpus",
    "bank.free_memory": "bank.tiered.hardware",
    "bank.growing": "bank.store.buffers",
    "bank.hot_documents": "bank.tiered.lru_cache",
    "bank.lock": "bank.store.lock",
    "bank.open_bank": "bank.store.store",
    "bank.opening": "bank.store.open",
    "bank.parallel": "bank.sharded.bank",
    "bank.plan": "bank.tiered.plan",
    "bank.ranks": "bank.sharded.collectives",
    "bank.rows": "bank.tiered.rows",
    "bank.segments": "bank.store.segments",
    "bank.shapes": "bank.tiered.shapes",
    "bank.sources": "bank.tiered.sources",
    "bank.state": "bank.store.state",
    "bank.tiers": "bank.tiered.bank",
    "bank.turn": "bank.sharded.session",
    "bank.verification": "bank.store.verify",
    "bank.version_1": "bank.store.format_v1",
    "bank.writing": "bank.store.commit",
    "bank.store.bank_store": "bank.store.store",
    "bank.store.compaction": "bank.store.compact",
    "bank.store.growable_array": "bank.store.buffers",
    "bank.store.growing": "bank.store.buffers",
    "bank.store.open_bank": "bank.store.store",
    "bank.store.opening": "bank.store.open",
    "bank.store.verification": "bank.store.verify",
    "bank.store.version_1": "bank.store.format_v1",
    "bank.store.writing": "bank.store.commit",
    "commands": "cli",
    "commands.ask": "cli.ask",
    "commands.bank": "cli.bank",
    "commands.doctor": "cli.doctor",
    "commands.encode": "cli.encode",
    "commands.evaluate": "cli.evaluate",
    "commands.inspect": "cli.inspect",
    "commands.loading": "cli.loading",
    "commands.options": "cli.options",
    "commands.plan": "cli.plan",
    "commands.refresh": "cli.refresh",
    "commands.retrofit": "cli.retrofit",
    "commands.train": "cli.train",
    "corpus_files": "data.documents",
    "evaluation.quantised": "evaluation.quantized",
    "generation.custom_generate": "generation.generate_hook",
    "generation.feed": "generation.transcript_feeder",
    "ops.limits": "ops.dispatch",
    "ops.quantise": "ops.quantize",
    "ops.triton_gather_documents": "ops.gather_documents.triton",
    "ops.triton_pool_chunks": "ops.pool_chunks.triton",
    "ops.triton_pool_chunks_backward": "ops.pool_chunks.triton",
    "ops.triton_route_documents": "ops.route_documents.triton",
    "evaluation.corpora": "synthetic.corpora",
    "evaluation.hashing": "synthetic.hashing",
    "evaluation.names": "synthetic.names",
    "evaluation.prose": "synthetic.prose",
    "evaluation.templates": "synthetic.templates",
    "evaluation.values": "synthetic.values",
    "evaluation.words": "synthetic.words",
    "evaluation.world": "synthetic.world",
    "training.asking": "evaluation.prompting",
    "training.schedule": "training.trainer",
    "training.transcripts": "training.collators",
    "training.data": "data.questions",
    "training.diagnosis": "evaluation.diagnosis",
    "training.sharpen": "evaluation.sharpen",
}
# Modules whose content lies in several now: the old name is a module in which the names of all of them are found.
SPLIT = {
    "model.storage_msa": (
        "model.bank_format_msa",
        "model.bank_files_msa",
        "model.bank_manifest_msa",
        "model.bank_reader_msa",
        "model.bank_writer_msa",
        "model.arrow_msa",
    ),
}
SPLIT["storage_msa"] = SPLIT["model.storage_msa"]


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for a module that finds its old names.

    Args:
        module: its `__name__`.
        names: old name -> new one, of this module or, with dots, of the package: `training.collators.QuestionCollator`.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"`{module}.{name}` is `{names[name]}` now; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        home, _, new = names[name].rpartition(".")
        return getattr(importlib.import_module(f"{PACKAGE}.{home}") if home else sys.modules[module], new)

    return find


def _joined(name: str, parts: Sequence[str]) -> ModuleType:
    """A module `name` in which what the modules `parts` define is found."""
    warnings.warn(
        f"`{name}` is {', '.join(f'`{part}`' for part in parts)} now; the old name goes with the next release.",
        DeprecationWarning,
        stacklevel=3,
    )
    module = ModuleType(name)
    for part in reversed(parts):
        module.__dict__.update(
            {key: value for key, value in vars(importlib.import_module(part)).items() if not key.startswith("__")}
        )
    return module


def _travels(name: str) -> bool:
    """Tell whether a module of the model lay in the package itself before."""
    return "." not in name and importlib.util.find_spec(f"{PACKAGE}.model.{name}") is not None


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of this package by their old names; what is imported is the module in its new place."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or not (old in {*MOVED, *SPLIT} or (old.endswith("_msa") and _travels(old))):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        old = spec.name.partition(".")[2]
        if old in SPLIT:
            return _joined(spec.name, [f"{PACKAGE}.{new}" for new in SPLIT[old]])
        new = f"{PACKAGE}.{MOVED.get(old, f'model.{old}')}"
        warnings.warn(
            f"`{spec.name}` is `{new}` now; the old name goes with the next release.", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__.partition(".")[2] in SPLIT:
            return
        # The import system has put the old name's spec into the module, which was complete before.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


# Before the others, which would find a module of a package that moved as a whole a second time.
sys.meta_path.insert(0, MovedModules())
