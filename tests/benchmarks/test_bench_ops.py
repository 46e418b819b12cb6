"""benchmarks/bench_ops.py: what it prints must rest on green tests and on right answers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from battery import offsets_of

from msa_hf.ops import route_documents

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_ops.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_ops", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ops"] = module
    spec.loader.exec_module(module)
    return module


def test_nothing_is_measured_where_the_tests_fail(script, monkeypatch, capsys) -> None:
    """A status other than 0 from pytest ends the program before it prints a figure."""
    failed = script.subprocess.CompletedProcess([], 1, stdout="1 failed", stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(script.sys, "argv", ["bench_ops.py", "--cpu", "--commit", "none"])
    with pytest.raises(SystemExit, match=r"1 failed.*nothing is measured"):
        script.main()
    assert capsys.readouterr().out == ""


def test_the_tests_are_those_of_the_backends_that_are_measured(script, monkeypatch) -> None:
    """And of the device."""
    commands = []
    passed = script.subprocess.CompletedProcess([], 0, stdout="3 passed", stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda command, **_: commands.append(command) or passed)
    assert script.run_tests(["cuda", "pytorch"], "cuda", None) == "3 passed"
    assert commands[0][-1] == "cuda-cuda or pytorch-cuda" and "tests/ops" in commands[0][-3]


def test_plain_products_find_the_same_documents(script) -> None:
    """What the operations are compared with computes the same."""
    queries, keys = torch.randn(2, 3, 16), torch.randn(40, 16)
    offsets = offsets_of([1, 4, 3, 2] * 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    wanted, _ = route_documents(queries, mask, keys, offsets, 5, backend="pytorch")
    found, _ = script.plain_route(queries, keys, offsets, 5)
    assert torch.equal(found, wanted)


def test_the_published_way_finds_the_same_rows(script) -> None:
    """Rows of all documents asked for, in the order asked for."""
    content = torch.randn(10, 2, 1, 4)
    found = script.published_gather(torch.tensor([[2, 0]]), offsets_of([3, 3, 4]), content)
    assert torch.equal(found, content[[6, 7, 8, 9, 0, 1, 2]])


@pytest.mark.parametrize(("ours", "share"), [([[3, 1], [-1, -1]], 1.0), ([[3, 2], [-1, -1]], 0.5), ([[-1, -1]] * 2, 0)])
def test_share_of_documents_found(script, ours, share) -> None:
    """Order does not matter, and -1 is no document."""
    assert script.same_documents(torch.tensor(ours), torch.tensor([[1, 3], [-1, -1]])) == share


@pytest.mark.parametrize(("call_ms", "device_ms", "reached"), [(2.0, None, False), (2.0, 1.0, True), (0.9, None, True)])
def test_goals_are_held_against_the_time_on_the_device(
    script, monkeypatch, capsys, call_ms, device_ms, reached
) -> None:
    """Bytes over time over the ceiling; the graph's time where there is one."""
    bench = script.Bench(script.argparse.Namespace(cpu=True, scale=1.0, repeats=1), ["cpp"])
    bench.ceilings["copy"] = 1e9
    monkeypatch.setattr(bench, "call_ms", lambda *_: call_ms)
    monkeypatch.setattr(bench, "device_ms", lambda *_: device_ms)
    monkeypatch.setattr(bench, "peak_MB", lambda *_: 0.0)
    row = script.Row("pool_chunks", "a case", "cpp", 0.0, bytes=1e6, ceiling="copy")
    bench.measure(row, lambda _: None, 1, goal=("copy", 0.8))
    assert row.reached is reached and row.share == pytest.approx(1.0 / (device_ms or call_ms))
    assert ("reached: 0.8" in capsys.readouterr().out) is reached


def test_what_is_behind_the_reference_is_said(script) -> None:
    """In time and in memory, each beside the reference's row of the same case."""
    rows = [
        script.Row("route_documents", case, backend, ms, peak_MB=peak)
        for case, backend, ms, peak in [
            ("small", "cpp", 2.0, 0.0),
            ("small", "pytorch", 1.0, 50.0),
            ("large", "pytorch", 9.0, 50.0),
            ("large", "cpp", 8.0, 60.0),
            ("large", "plain matmul", 99.0, 99.0),
        ]
    ]
    slower, larger = script.behind_pytorch(rows)
    assert "SLOWER" in slower and "small" in slower
    assert "MORE MEMORY" in larger and "large" in larger
