"""Compile every CUDA kernel with nvcc, and hold each to its budget of registers. Needs no GPU.

    python tools/check_cuda.py [FILE ...]
    python tools/check_cuda.py --record     # after a change of csrc/cuda

Every .cu file of csrc/cuda is compiled for each of `ARCHITECTURES`. A kernel that spills registers, that uses more than
`BUDGETS` allows its file, or whose matrix instructions the compiler had to put one after the other, is an error. The
C++ files beside them are compiled too where torch is installed. What was compiled once is remembered, by the digest of
what goes in, in ~/.cache/msa-hf (or $XDG_CACHE_HOME/msa-hf), so that another run takes a second. `--record` keeps in
checked_cuda.json what was found of the kernels: with the same compiler, flags and sources, a new machine need not find
it again.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DIRECTORY = ROOT / "csrc" / "cuda"
RECORD = ROOT / "tools" / "checked_cuda.json"
ARCHITECTURES = ("80", "90a", "100")
# File in csrc/cuda -> the most registers that a thread of its kernels may use. More than a block's size leaves for each
# thread is a spill already; this is about the blocks that are to fit on a multiprocessor at once: 65536 registers make
# 1024 threads of 64, 512 of 128, or 384 of 168.
BUDGETS = {
    "gather/gather_documents.cu": 64,
    "gather/staging.cu": 64,
    "pool/pool_chunks.cu": 128,
    "route/mma.cu": 255,
    "route/rescore.cu": 128,
    "route/route_documents.cu": 64,
    "route/select.cu": 64,
    "route/wgmma_bf16.cu": 168,
    "route/wgmma_e4m3.cu": 168,
    "route/wgmma_f16.cu": 168,
    "route/wgmma_s8.cu": 168,
}
KERNEL = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>\w+)'")
SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")


def kernel_files(*suffixes: str) -> list[Path]:
    """The sources of the library in csrc/cuda; programs that check them stand apart."""
    paths = sorted(path for path in DIRECTORY.glob("*/*") if path.suffix in suffixes)
    return [path for path in paths if path.parent.name != "standalone"]


def name_of(source: Path) -> str:
    """Its path in csrc/cuda."""
    return source.relative_to(DIRECTORY).as_posix() if DIRECTORY in source.parents else source.name


def torch_flags() -> list[str] | None:
    """The flags that setup.py compiles C++ files with; None if torch is not installed."""
    spec = importlib.util.spec_from_file_location("msa_hf_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        torch, _ = build.find_torch()
    except build.CannotBuild:
        return None
    target = (build.TORCH[0] << 56) | (build.TORCH[1] << 48)
    return [f"-DTORCH_TARGET_VERSION={target:#x}ULL", "-DUSE_CUDA", f"-I{torch / 'include'}"]


def read_report(text: str) -> list[dict[str, Any]]:
    """The kernels that ptxas reports on: name, architecture, registers, bytes spilled."""
    kernels: list[dict[str, Any]] = []
    for line in text.splitlines():
        if found := KERNEL.search(line):
            kernels.append({"name": found["name"], "architecture": found["architecture"], "spilled": 0, "registers": 0})
        elif (found := SPILLS.search(line)) and kernels:  # functions that the kernel calls have lines of their own
            kernels[-1]["spilled"] += int(found["stores"]) + int(found["loads"])
        elif (found := REGISTERS.search(line)) and kernels:
            kernels[-1]["registers"] = int(found["registers"])
    return kernels


def read_record(digest: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """What the record says of a file with this digest; it holds no file with which anything is wrong."""
    if digest not in record:
        return None
    kernels = [
        {"name": "a kernel", "architecture": architecture, "spilled": 0, "registers": registers}
        for architecture, all_registers in record[digest]["registers"].items()
        for registers in all_registers
    ]
    return {"kernels": kernels, "failed": None, "serialized": []}


def recorded(source: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What the record keeps of a file: the registers of its kernels, by architecture."""
    registers: dict[str, list[int]] = {}
    for kernel in result["kernels"]:
        registers.setdefault(kernel["architecture"], []).append(kernel["registers"])
    return {"file": name_of(source), "registers": registers}


def compile_file(
    source: Path, flags: list[str], key: str, cache: Path, record: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compile one file, or take what is known of it: its kernels, and what is wrong with it."""
    digest = hashlib.sha256(key.encode() + source.read_bytes() + repr((source.name, flags)).encode()).hexdigest()
    if (known := read_record(digest, record or {})) is not None:
        return known | {"seconds": None, "digest": digest}
    remembered = cache / f"{source.stem}-{digest[:32]}.json"
    if remembered.is_file():
        return json.loads(remembered.read_text()) | {"seconds": None, "digest": digest}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        command = ["nvcc", *flags, "-c", str(source), "-o", f"{directory}/{source.stem}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    result: dict[str, Any] = {
        "kernels": read_report(said),
        "failed": said.strip() or f"nvcc ended with status {done.returncode}" if done.returncode else None,
        "serialized": [line.strip() for line in said.splitlines() if "serialized" in line],
    }
    if done.returncode == 0:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = remembered.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(result))
        os.replace(unfinished, remembered)
    return result | {"seconds": time.monotonic() - start, "digest": digest}


def problems(source: Path, result: dict[str, Any], budget: int | None) -> list[str]:
    """Faults of a file, in lines."""
    if result["failed"] is not None:
        return [f"{name_of(source)} does not compile:\n{result['failed']}"]
    lines = [f"{name_of(source)}: {line}" for line in result["serialized"]]
    if source.suffix == ".cu" and budget is None:
        lines.append(f"{name_of(source)} has no budget in {Path(__file__).name}")
    for kernel in result["kernels"]:
        where = f"{name_of(source)}, {kernel['architecture']}: {kernel['name']}"
        if kernel["spilled"]:
            lines.append(f"{where} spills {kernel['spilled']} bytes")
        if budget is not None and kernel["registers"] > budget:
            lines.append(f"{where} uses {kernel['registers']} registers, its budget is {budget}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of csrc/cuda")
    parser.add_argument("--record", action="store_true", help="keep what is found of all kernels")
    arguments = parser.parse_args()
    if arguments.record and arguments.files:
        parser.error("--record is of all files")
    if shutil.which("nvcc") is None:
        print("error: nvcc is not on the PATH", file=sys.stderr)
        return 2
    sources = [path.resolve() for path in arguments.files] or kernel_files(".cu", ".cpp")
    host = torch_flags()
    if host is None:
        print("torch is not installed: the C++ files are left out")
        sources = [source for source in sources if source.suffix == ".cu"]

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msa-hf"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    headers = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh"))
    common = ["-std=c++17", "-O3"]
    device = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES] + ["-Xptxas=-v"]

    def check(source: Path) -> dict[str, Any]:
        # C++ files include torch's headers, kernels only those beside them.
        mine = [path for path in headers if source.suffix == ".cpp" or DIRECTORY in path.parents]
        key = version + "".join(path.name + path.read_text() for path in mine)
        flags = common + (device if source.suffix == ".cu" else host or [])
        return compile_file(source, flags, key, cache, record)

    record = {} if arguments.record or not RECORD.exists() else json.loads(RECORD.read_text())
    found: dict[str, Any] = {}
    wrong: list[str] = []
    # The largest files first: they take longest.
    order = sorted(sources, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, result in zip(order, pool.map(check, order), strict=True):
            wrong += problems(source, result, BUDGETS.get(name_of(source)))
            if source.suffix == ".cu":
                found[result["digest"]] = recorded(source, result)
            most = max((kernel["registers"] for kernel in result["kernels"]), default=0)
            took = "known" if result["seconds"] is None else f"{result['seconds']:.0f} s"
            counted = f"{len(result['kernels']):4} kernels, at most {most:3} registers" if most else "compiles"
            print(f"{name_of(source):34} {counted}, {took}", flush=True)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if arguments.record and not wrong:
        RECORD.write_text(json.dumps(dict(sorted(found.items(), key=lambda item: item[1]["file"])), indent=1) + "\n")
        print("wrote", RECORD.relative_to(ROOT))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
