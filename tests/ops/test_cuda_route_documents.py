"""The CUDA kernels of route_documents, run on emulated threads: what can be known of them without a GPU.

csrc/cuda/standalone/route_documents.cu draws sizes around every tile's edge, runs every kernel and every shape that
takes them, and compares with plain loops: scores, ranks, order of ties, tombstones, NaN where nothing may be read,
guards behind every result, rescored candidates. On a GPU the same program runs the compiled kernels.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "standalone" / "route_documents.cu"


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [*homes, Path("/usr/local/cuda")]:
        for place in ("include", "targets/x86_64-linux/include"):
            if (home / place / "cuda_fp8.h").exists():
                return home / place
    return None


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checks, compiled for the host."""
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("needs g++ and CUDA's headers")
    result = tmp_path_factory.mktemp("cuda") / "route_documents"
    # Threads are fibers with stacks of their own, which a C library with all its checks must not take for an error.
    # Those need -O1; with -O2 the compiler takes longer than it saves.
    checked = ["-O1", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=3"]
    command = [compiler, "-x", "c++", "-std=c++17", *checked, "-DMSA_HF_EMULATE", "-w", "-isystem", str(headers)]
    done = subprocess.run([*command, "-o", str(result), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return result


def test_every_kernel_agrees_with_plain_loops(program: Path) -> None:
    """Sizes at random; a missing barrier, a wrong phase or a stage filled too early ends it or changes scores."""
    done = subprocess.run([str(program), "--cases", "5", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert ", 0 wrong;" in done.stdout
