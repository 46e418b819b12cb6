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
changed.
"""

import hashlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
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


def run(command: list[str]) -> None:
    """Run a compiler; its first error is the reason where it fails, all it said goes to the output."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        print(said, file=sys.stderr)
        lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or ["no message"]
        raise CannotBuild(f"{Path(command[0]).name} failed: {lines[0].strip()}")


def build(library: Path, objects: Path, cuda: bool) -> None:
    """Compile what has changed, two files or more at a time, and link it into `library`."""
    torch, torch_cuda = find_torch()
    compiler = find_compiler()
    sources = sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    if not sources:
        raise CannotBuild("csrc/ is missing")
    nvcc = shutil.which("nvcc")
    if cuda:
        if torch_cuda is None:
            raise CannotBuild("torch was built without CUDA")
        if nvcc is None:
            raise CannotBuild("nvcc is not on the PATH")
        found = [*ROOT.glob("csrc/cuda/*/*.cpp"), *ROOT.glob("csrc/cuda/*/*.cu")]
        sources += sorted(path for path in found if path.parent.name != "standalone")

    read = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    headers = b"".join(path.read_bytes() for path in read if path.suffix in (".h", ".inc", ".cuh"))
    target = (TORCH[0] << 56) | (TORCH[1] << 48)
    common = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={target:#x}ULL", f"-I{torch / 'include'}"]
    plain = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    plain += ["-Wno-maybe-uninitialized"] if "clang" not in compiler[0] else []
    architectures = "sm_80, sm_90a" if cuda else "none"
    named = [f'-DMSA_HF_SOURCES="{digest}"', f'-DMSA_HF_CUDA_ARCHITECTURES="{architectures}"']

    def compile_one(source: Path) -> Path:
        if source.parent.parent.name == "cuda":  # nvcc finds CUDA's headers, for C++ too
            command = [str(nvcc), *common, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            command += [f"-gencode={architecture}" for architecture in GENCODE]
        else:
            command = [*compiler, *common, *plain, *(named if source.name == "ops.cpp" else ())]
        key = hashlib.sha256(repr(command).encode() + headers + source.read_bytes()).hexdigest()[:16]
        result = objects / f"{source.stem}-{key}.o"
        if not result.exists():
            unfinished = result.with_suffix(f".{os.getpid()}.o")
            run([*command, "-c", str(source), "-o", str(unfinished)])
            os.replace(unfinished, result)
        return result

    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [str(path) for path in pool.map(compile_one, sources)]
    library.parent.mkdir(parents=True, exist_ok=True)
    libraries = ["-ltorch_cpu", "-lc10", *(("-ltorch_cuda", "-lc10_cuda") if cuda else ())]
    unfinished = library.with_name(f"{library.name}.{os.getpid()}.tmp")
    linker = [str(nvcc)] if cuda else compiler  # nvcc adds the CUDA runtime
    run([*linker, "-shared", *compiled, f"-L{torch / 'lib'}", *libraries, "-o", str(unfinished)])
    os.replace(unfinished, library)


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
