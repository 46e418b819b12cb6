"""What an installation builds, and what it says of what it does not."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from extension import why_not_built

from msa_hf.ops import dispatch

SETUP = Path(__file__).parents[1] / "setup.py"


class Build:
    """setup.py with a pretended machine: what was asked to be built is noted, what is in `failing` fails."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
        self.module, self.monkeypatch, self.library = module, monkeypatch, library
        self.asked: list[bool] = []

    def run(self, choice: str, *, nvcc: bool, torch_cuda: str | None, failing: tuple[bool, ...] = ()) -> list[bool]:
        def build(library: Path, objects: Path, cuda: bool) -> None:
            self.asked.append(cuda)
            if cuda in failing:
                raise self.module.CannotBuild(f"{'nvcc' if cuda else 'c++'} failed: expected ';'")
            library.write_text("cuda" if cuda else "cpu")

        self.monkeypatch.setenv("MSA_HF_BUILD", choice)
        self.monkeypatch.setattr(self.module, "build", build)
        self.monkeypatch.setattr(self.module, "find_torch", lambda: (Path("torch"), torch_cuda))
        self.monkeypatch.setattr(self.module.shutil, "which", lambda name: "/usr/bin/nvcc" if nvcc else None)
        self.module.BuildNative.build_extension(self, self.module.Extension("msa_hf._C", sources=[]))
        return self.asked

    def get_ext_fullpath(self, name: str) -> str:
        return str(self.library)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    pytest.importorskip("setuptools")
    if not SETUP.exists():
        pytest.skip("needs a checkout")
    spec = importlib.util.spec_from_file_location("msa_hf_setup", SETUP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = tmp_path / "_C.so"
    library.write_text("of an earlier build")
    return Build(module, monkeypatch, library)


@pytest.mark.parametrize(("nvcc", "torch_cuda"), [(True, "13.0"), (True, None), (False, "13.0"), (False, None)])
def test_cuda_is_built_where_nvcc_and_torch_for_cuda_are_found(machine, nvcc, torch_cuda, capsys) -> None:
    assert machine.run("auto", nvcc=nvcc, torch_cuda=torch_cuda) == [nvcc and torch_cuda is not None]
    assert capsys.readouterr().err == ""


def test_the_cpu_operations_are_built_where_those_for_cuda_fail(machine, capsys) -> None:
    assert machine.run("auto", nvcc=True, torch_cuda="13.0", failing=(True,)) == [True, False]
    assert machine.library.read_text() == "cpu"
    note = "note: the CUDA operations were not built, only those for the CPU: nvcc failed: expected ';'\n"
    assert capsys.readouterr().err == note


def test_an_installation_goes_on_where_nothing_can_be_built(machine, capsys) -> None:
    assert machine.run("auto", nvcc=True, torch_cuda="13.0", failing=(True, False)) == [True, False]
    assert not machine.library.exists()
    note = "note: the native operations were not built, PyTorch's run instead: c++ failed: expected ';'\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(("choice", "cuda"), [("cpu", False), ("cuda", True)])
def test_what_is_asked_for_by_name_is_built_or_fails(machine, choice, cuda) -> None:
    assert machine.run(choice, nvcc=True, torch_cuda="13.0") == [cuda]
    with pytest.raises(SystemExit, match="the native operations were not built"):
        machine.run(choice, nvcc=True, torch_cuda="13.0", failing=(cuda,))
    assert not machine.library.exists()


def test_nothing_is_built_where_nothing_is_wanted(machine) -> None:
    assert machine.run("none", nvcc=True, torch_cuda="13.0") == []
    assert not machine.library.exists()


def test_a_library_whose_errors_do_not_reach_python_is_refused(machine, tmp_path: Path) -> None:
    """What a compiler makes that links a C++ runtime of its own; here, what torch cannot even load."""
    made = tmp_path / "made.so"
    made.write_text("no library")
    with pytest.raises(machine.module.CannotBuild, match=r"errors of what /opt/x/g\+\+ made .*CXX=/usr/bin/g\+\+"):
        machine.module.check_errors(made, ["/opt/x/g++"])
    if why_not_built() is None:
        (library,) = Path(dispatch.__file__).parents[1].glob("_C.*")
        machine.module.check_errors(library, ["g++"])
