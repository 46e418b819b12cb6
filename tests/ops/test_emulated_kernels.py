"""The CUDA kernels of pool_chunks and gather_documents, run thread by thread on the CPU: no GPU is needed."""

import shutil
import subprocess
from pathlib import Path

import pytest

STANDALONE = Path(__file__).parents[2] / "csrc" / "cuda" / "standalone"
COMPILER = shutil.which("g++") or shutil.which("clang++")


def cuda_headers() -> Path | None:
    """Where CUDA's headers lie: beside nvcc, or where it is commonly installed."""
    nvcc = shutil.which("nvcc")
    homes = [Path(nvcc).resolve().parents[1]] if nvcc else []
    places = [
        home / place
        for home in (*homes, Path("/usr/local/cuda"))
        for place in ("include", "targets/x86_64-linux/include")
    ]
    return next((place for place in places if (place / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    headers = cuda_headers()
    if COMPILER is None or headers is None or not STANDALONE.exists():
        pytest.skip("needs the sources, a C++ compiler and CUDA's headers")
    result = tmp_path_factory.mktemp("emulated") / "pool_gather"
    # With -O1 the compiler takes longer than it saves.
    flags = ["-x", "c++", "-std=c++17", "-O0", "-DMSA_HF_EMULATE", "-w", "-pthread", "-fsanitize=address"]
    flags += ["-isystem", str(headers), "-o", str(result)]
    subprocess.run([COMPILER, *flags, str(STANDALONE / "pool_gather.cu")], check=True)
    return result


def test_kernels_agree_with_plain_loops(program) -> None:
    """At random sizes around every edge, in any order of threads between barriers; what lies beside is not touched."""
    done = subprocess.run([program, "--cases", "4", "--seed", "0"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "4 cases of pool_chunks and 4 of gather_documents agree" in done.stdout
