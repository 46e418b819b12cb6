"""tools/check_cuda.py finds kernels that spill, that use too many registers, or whose file has no budget."""

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# What ptxas prints of two kernels, the second of which spills.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4firstPf' for 'sm_80'
ptxas info    : Function properties for _Z4firstPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 380 bytes cmem[0]
ptxas info    : Compile time = 12.000 ms
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_90a'
ptxas info    : Function properties for _Z6secondPf
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
"""


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "tools" / "check_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result_of(script: Any, **changes: Any) -> dict[str, Any]:
    return {"kernels": script.read_report(REPORT), "failed": None, "serialized": []} | changes


def test_reads_registers_and_spills_of_every_kernel(script: Any) -> None:
    first, second = script.read_report(REPORT)
    assert first == {"name": "_Z4firstPf", "architecture": "sm_80", "registers": 40, "spilled": 0}
    assert second == {"name": "_Z6secondPf", "architecture": "sm_90a", "registers": 168, "spilled": 24}


def test_what_is_wrong_with_a_file_is_named(script: Any) -> None:
    """A spill within the budget too, more registers than the budget, no budget, serialized matrix instructions."""
    source, first = Path("some.cu"), script.read_report(REPORT)[:1]
    (spill,) = script.problems(source, result_of(script), 255)
    assert "_Z6secondPf" in spill and "24 bytes" in spill
    (above,) = script.problems(source, result_of(script, kernels=first), 39)
    assert "40 registers" in above and "39" in above
    assert script.problems(source, result_of(script, kernels=first), 40) == []
    assert "no budget" in script.problems(source, result_of(script, kernels=[]), None)[0]
    assert script.problems(Path("bindings.cpp"), result_of(script, kernels=[]), None) == []
    serialized = ["ptxas info : wgmma.mma_async instructions are serialized due to ..."]
    assert len(script.problems(source, result_of(script, kernels=[], serialized=serialized), 64)) == 1


def test_what_was_recorded_is_not_compiled_again(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While sources, flags and compiler are the same; and it is held to the budgets all the same."""
    source, compiled = tmp_path / "some.cu", list[list[str]]()
    source.write_text("first")

    def run(command: list[str], **options: Any) -> Any:
        compiled.append(command)
        return subprocess.CompletedProcess(
            command, 0, REPORT.replace("16 bytes", "0 bytes").replace("8 bytes", "0 bytes"), ""
        )

    monkeypatch.setattr(script.subprocess, "run", run)
    result = script.compile_file(source, ["-O3"], "nvcc 13", tmp_path / "one")
    record = {result["digest"]: script.recorded(source, result)}
    assert len(compiled) == 1 and record[result["digest"]]["registers"] == {"sm_80": [40], "sm_90a": [168]}
    known = script.compile_file(source, ["-O3"], "nvcc 13", tmp_path / "two", record)
    assert len(compiled) == 1 and script.problems(source, known, 168) == []
    assert "168 registers" in script.problems(source, known, 167)[0]
    for change in ("source", "flags", "compiler"):
        source.write_text("second" if change == "source" else "first")
        flags, compiler = ["-O2" if change == "flags" else "-O3"], "nvcc 14" if change == "compiler" else "nvcc 13"
        script.compile_file(source, flags, compiler, tmp_path / change, record)
    assert len(compiled) == 4


def test_every_kernel_file_has_a_budget(script: Any) -> None:
    assert {script.name_of(path) for path in script.kernel_files(".cu")} == set(script.BUDGETS)
