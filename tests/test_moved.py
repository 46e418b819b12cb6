"""Modules that moved can be imported by their old names for one release: the same modules, with a warning."""

import importlib
import sys
from pathlib import Path

import pytest

import msa_hf
from msa_hf.moved import MOVED, SPLIT

PACKAGE = Path(msa_hf.__file__).parent
TRAVELING = {path.stem: f"model.{path.stem}" for path in (PACKAGE / "model").glob("*_msa.py")}


@pytest.mark.parametrize("old", [*MOVED, *TRAVELING])
def test_the_old_name_is_the_new_module(old: str) -> None:
    new = f"msa_hf.{({**MOVED, **TRAVELING})[old]}"
    if new.endswith(".triton"):
        pytest.importorskip("triton")
    expected = importlib.import_module(new)
    sys.modules.pop(f"msa_hf.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"`msa_hf.{old}` is `{new}` now"):
        found = importlib.import_module(f"msa_hf.{old}")
    assert found is expected
    assert found.__name__ == found.__spec__.name == new


@pytest.mark.parametrize("old", SPLIT)
def test_the_old_name_of_what_was_split_has_all_of_it(old: str) -> None:
    sys.modules.pop(f"msa_hf.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"`msa_hf.{old}` is `msa_hf.{SPLIT[old][0]}`, "):
        found = importlib.import_module(f"msa_hf.{old}")
    assert found.__name__ == f"msa_hf.{old}"
    for part in SPLIT[old]:
        module = importlib.import_module(f"msa_hf.{part}")
        assert all(getattr(found, name) is value for name, value in vars(module).items() if name[:1].isalpha())


def test_what_never_was_is_not_found() -> None:
    for name in ("msa_hf.nothing_msa", "msa_hf.bank.nothing", "msa_hf.commands.nothing"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_model_imports_only_itself() -> None:
    """The folder that travels with checkpoints reaches nothing of the package outside itself."""
    for path in (PACKAGE / "model").glob("*.py"):
        lines = [line.strip() for line in path.read_text().splitlines()]
        imports = [line for line in lines if line.startswith(("from .", "import .", "from msa_hf", "import msa_hf"))]
        assert all(line.startswith("from .") and line.split()[1].removeprefix(".") in TRAVELING for line in imports), (
            path
        )
        assert path.stem in TRAVELING or not imports
