"""Empty classes in the place of modules that transformers leaves out of its source distribution."""

import importlib.util
import sys
from types import ModuleType

# Module -> the classes that the others import from it. A checkout at the release's tag holds them all.
LEFT_OUT = {
    "tests.exporters.test_export": ("ExportTesterMixin",),
    "tests.generation.test_utils": ("GenerationTesterMixin",),
}


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def fill_in() -> list[str]:
    """Make the modules that are not there, and name them."""
    missing = [name for name in LEFT_OUT if not _is_there(name)]
    for name in missing:
        module = ModuleType(name)
        for class_name in LEFT_OUT[name]:
            setattr(module, class_name, type(class_name, (), {"__module__": name}))
        sys.modules.setdefault(name.rpartition(".")[0], ModuleType(name.rpartition(".")[0]))
        sys.modules[name] = module
    return missing
