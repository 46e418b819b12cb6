"""Empty things in the place of modules that source distributions leave out, or that no test here needs."""

import importlib.util
import sys
from types import ModuleType

# Module -> what the others import from it. A checkout at the release's tag holds them all.
LEFT_OUT: dict[str, dict[str, type]] = {
    "tests.exporters.test_export": {"ExportTesterMixin": type},
    "tests.generation.test_utils": {"GenerationTesterMixin": type},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": dict},
    "diffusers": {"StableDiffusionPipeline": type},
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
        for wanted, kind in LEFT_OUT[name].items():
            setattr(module, wanted, {} if kind is dict else type(wanted, (), {"__module__": name}))
        if package := name.rpartition(".")[0]:
            sys.modules.setdefault(package, ModuleType(package))
        sys.modules[name] = module
    return missing
