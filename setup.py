"""Build entry point: compiles csrc/, the native operations, into the library msa_hf/_C; metadata is in pyproject.toml.

The variable MSA_HF_BUILD says what is built:

    auto   (default) the operations for the CPU, where a compiler and torch are found; and those for CUDA, where nvcc is
           on the PATH and torch was built for CUDA. Nothing fails: one line says what was not built and why, and where
           nothing was, the PyTorch implementation runs
    none   nothing
    cpu    those for the CPU alone; what goes wrong is an error
    cuda   those for the CPU and for CUDA (sm_80, sm_90a, and PTX for others); what goes wrong is an error

Install with `--no-build-isolation`, so that the torch is seen that will load the library. It uses LibTorch's stable ABI
and is tied to no version of torch or Python. In a checkout, `python setup.py build_ext --inplace` builds again what has
changed, where ninja is; else all of it.
"""

import contextlib
import hashlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH = (2, 11)  # the stable ABI that is asked for: this version and newer ones have it
GENCODE = ("arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a")
CHOICES = ("auto", "none", "cpu", "cuda")


class CannotBuild(Exception):
    """What is missing, or what failed, in one line."""


def find_torch() -> tuple[Path, str | None]:
    """Where torch lies and the CUDA version it was built for; without importing it, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild("torch is not installed in this environment (install it, and use --no-build-isolation)")
    directory = Path(spec.origin).parent
    found = runpy.run_path(str(directory / "version.py"))
    if tuple(int(part) for part in found["__version__"].split(".")[:2]) < TORCH:
        raise CannotBuild(f"torch {found['__version__']} is older than {TORCH[0]}.{TORCH[1]}")
    return directory, found["cuda"]


def find_compiler() -> list[str]:
    """The C++ compiler: GCC or Clang."""
    if sys.platform == "win32":
        raise CannotBuild("on Windows there is no build yet")
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CannotBuild(f"there is no C++ compiler {named}" if named else "there is no C++ compiler (c++, g++, clang++)")


@contextlib.contextmanager
def using(compiler: list[str]) -> Iterator[None]:
    """Within, setuptools and torch compile with this one; with the C compiler that Python names where it is there."""
    wanted = {"CXX": shlex.join(compiler)}
    own = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "")
    if not own or shutil.which(own[0]) is None:
        wanted["CC"] = wanted["CXX"]
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def build(library: Path, objects: Path, cuda: bool) -> None:
    """Compile what has changed with torch's BuildExtension, which takes ninja where that is, and link it."""
    _, torch_cuda = find_torch()
    compiler = find_compiler()
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if not sources:
        raise CannotBuild("csrc/ is missing")
    if cuda:
        if torch_cuda is None:
            raise CannotBuild("torch was built without CUDA")
        if shutil.which("nvcc") is None:
            raise CannotBuild("nvcc is not on the PATH")
        found = [*ROOT.glob("csrc/cuda/*/*.cpp"), *ROOT.glob("csrc/cuda/*/*.cu")]
        sources += [path for path in found if path.parent.name != "standalone"]
    objects = objects / ("cuda" if cuda else "cpu")
    objects.mkdir(parents=True, exist_ok=True)
    describe(objects / "msa_hf_build.h", cuda)
    with using(compiler):
        try:
            made = compile_and_link(sorted(sources), objects, compiler, cuda)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CannotBuild(f"the compiler, whose messages stand above, failed: {reason}") from error
    if library.exists() and library.read_bytes() == made.read_bytes():
        return
    check_errors(made, compiler)
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_name(f"{library.name}.{os.getpid()}.tmp")
    shutil.copy2(made, unfinished)
    os.replace(unfinished, library)  # a process that has loaded the one before keeps it


# One call that must fail: it has no offsets.
WRONG_CALL = """
import sys, torch
torch.ops.load_library(sys.argv[1])
one = torch.ones(1, 1, 1)
try:
    torch.ops.msa_hf.route_documents(one, one[0] > 0, one[0], None, torch.ones(0, dtype=torch.int64), None, 1)
except RuntimeError as error:
    sys.exit("must begin with 0" not in str(error))
sys.exit(1)
"""


def check_errors(made: Path, compiler: list[str]) -> None:
    """Make sure that an error of the library reaches Python: it does not where the compiler links a C++ runtime of its
    own into it, beside the one that torch has; then wrong arguments end the process."""
    call = subprocess.run([sys.executable, "-c", WRONG_CALL, str(made)], capture_output=True, text=True, check=False)
    if call.returncode:
        raise CannotBuild(
            f"errors of what {shlex.join(compiler)} made do not reach Python (status {call.returncode}), as where it "
            "links libstdc++ statically; name another compiler in the variable CXX, such as CXX=/usr/bin/g++"
            + "".join(f"; {line}" for line in call.stderr.splitlines()[-1:])
        )


def describe(header: Path, cuda: bool) -> None:
    """Write what `build_info` says of this build, for csrc/ops.cpp; an unchanged file keeps its date."""
    read = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    architectures = "sm_80, sm_90a" if cuda else "none"
    text = f'#define MSA_HF_SOURCES "{digest}"\n#define MSA_HF_CUDA_ARCHITECTURES "{architectures}"\n'
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def compile_and_link(sources: list[Path], objects: Path, compiler: list[str], cuda: bool) -> Path:
    """Run BuildExtension; where the library lies."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    target = (TORCH[0] << 56) | (TORCH[1] << 48)
    common = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={target:#x}ULL", *(["-DUSE_CUDA"] if cuda else [])]
    plain = ["-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    plain += ["-Wno-maybe-uninitialized"] if "clang" not in compiler[0] else []
    # torch forbids conversions of half precision that these kernels use.
    conversions = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    device = ["-Xcompiler=-fvisibility=hidden", *(f"-U__CUDA_NO_{name}__" for name in conversions)]
    device += [f"-gencode={architecture}" for architecture in GENCODE]
    extension = (CUDAExtension if cuda else CppExtension)(
        "_C",
        [str(path) for path in sources],
        include_dirs=[str(objects)],
        depends=[str(path) for path in ROOT.glob("csrc/**/*.*") if path.suffix in (".h", ".inc", ".cuh")],
        extra_compile_args={"cxx": common + plain, "nvcc": common + device},
        py_limited_api=True,  # it uses nothing of Python
    )
    command = BuildExtension(Distribution({"name": "msa_hf", "ext_modules": [extension]}))
    command.build_temp = str(objects / "objects")
    command.build_lib = str(objects)
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(extension.name))


def build_what_can_be(library: Path, objects: Path) -> None:
    """With the operations for CUDA where what they need is found and they compile; else those for the CPU alone."""
    problem = None
    if find_torch()[1] is not None and shutil.which("nvcc"):
        try:
            return build(library, objects, cuda=True)
        except CannotBuild as error:
            problem = error
    build(library, objects, cuda=False)
    if problem is not None:
        print(f"note: the CUDA operations were not built, only those for the CPU: {problem}", file=sys.stderr)


class BuildNative(build_ext):
    """The library is no Python module: torch loads it, and its operations register themselves."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (".dylib" if sys.platform == "darwin" else ".so")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            if not (Path(self.build_lib) / name).exists():  # one of an earlier build may not fit these sources
                (ROOT / "src" / name).unlink(missing_ok=True)

    def build_extension(self, extension: Extension) -> None:
        choice = os.environ.get("MSA_HF_BUILD", "auto")
        if choice not in CHOICES:
            raise SystemExit(f"error: MSA_HF_BUILD must be one of {', '.join(CHOICES)}, got {choice!r}")
        library = Path(self.get_ext_fullpath(extension.name))
        if choice == "none":
            library.unlink(missing_ok=True)
            return
        objects = ROOT / "build" / "native"
        try:
            if choice == "auto":
                build_what_can_be(library, objects)
            else:
                build(library, objects, cuda=choice == "cuda")
        except CannotBuild as error:
            library.unlink(missing_ok=True)  # one of an earlier build may not fit these sources
            if choice != "auto":
                raise SystemExit(f"error: the native operations were not built: {error}") from None
            print(f"note: the native operations were not built, PyTorch's run instead: {error}", file=sys.stderr)


if __name__ == "__main__":
    # Optional: setuptools then takes a library that was not built for granted.
    setup(
        ext_modules=[Extension("msa_hf._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative},
    )
