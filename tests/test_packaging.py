"""Wheels, source distributions and editable installs, with and without what the native operations are compiled with."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
NOT_BUILT = "note: the native operations were not built, PyTorch's run instead: "


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is made of, in which things were built before."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs a checkout")
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("src", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".toml", ".in", ".md") or path.name == "LICENSE":
            shutil.copy2(path, copy)
    for left in ("src/msa_hf/_C.so", "csrc/cpu/route.o", "build/native/cpu/_C.so"):
        (copy / left).parent.mkdir(parents=True, exist_ok=True)
        (copy / left).write_bytes(b"of an earlier build")
    return copy


def run(checkout: Path, *command: str, choice: str = "none", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}
    environment |= {"MSA_HF_BUILD": choice, **variables}
    done = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def hook(checkout: Path, name: str, out: Path) -> Path:
    """The file that a hook of the build backend makes."""
    out.mkdir()
    run(checkout, "-c", f"from setuptools import build_meta; build_meta.{name}({str(out)!r})")
    (made,) = out.iterdir()
    return made


def test_a_wheel_without_native_operations(checkout: Path, tmp_path: Path) -> None:
    """By pip: every module, the files of the server's page, nothing compiled, and the command."""
    pytest.importorskip("pip")
    run(checkout, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-q", "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(checkout / "src").as_posix() for path in (checkout / "src" / "msa_hf").rglob("*.py")}
    page = {path.relative_to(checkout / "src").as_posix() for path in checkout.glob("src/msa_hf/serving/page/*")}
    assert "msa_hf/serving/page/index.html" in page
    assert modules | page | {"msa_hf/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".o", ".dylib"))]
    assert any(name.endswith("entry_points.txt") for name in names)


def test_a_source_distribution(checkout: Path, tmp_path: Path) -> None:
    """All of csrc, to be compiled where it is installed, and nothing that was built."""
    with tarfile.open(hook(checkout, "build_sdist", tmp_path / "out")) as archive:
        names = archive.getnames()
    inside = {name.partition("/")[2] for name in names}
    sources = {path.relative_to(checkout).as_posix() for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert sources - {"csrc/cpu/route.o"} | {"setup.py", "pyproject.toml", "src/msa_hf/ops/formats.py"} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o")) or name.startswith("build/")]


def test_an_editable_install_runs_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """What it installs leads to the sources that were given."""
    site = tmp_path / "site"
    zipfile.ZipFile(hook(checkout, "build_editable", tmp_path / "out")).extractall(site)
    find = f"import importlib.util, site; site.addsitedir({str(site)!r}); "
    find += "import sys; sys.path.insert(0, sys.path.pop()); print(importlib.util.find_spec('msa_hf').origin)"
    found = run(tmp_path, "-S", "-c", find).stdout.strip()
    assert Path(found).resolve() == (checkout / "src" / "msa_hf" / "__init__.py").resolve()


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        ("sys.modules['torch'] = None", "torch is not installed in this environment"),
        ("os.environ['PATH'] = ''", "there is no C++ compiler (c++, g++, clang++)"),
    ],
    ids=["without torch", "without a compiler"],
)
def test_what_cannot_be_built_is_said_in_a_line_and_left_out(checkout: Path, prepare: str, reason: str) -> None:
    """An installation goes on; a library of an earlier build goes, which may not fit."""
    library = checkout / "src" / "msa_hf" / "_C.so"
    library.write_bytes(b"of an earlier build")
    program = f"import os, runpy, sys; {prepare}; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; "
    done = run(checkout, "-c", program + "runpy.run_path('setup.py', run_name='__main__')", choice="auto")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert line.startswith(NOT_BUILT + reason)
    assert not library.exists()
