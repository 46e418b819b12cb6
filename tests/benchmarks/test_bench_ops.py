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


def test_nothing_is_measured_if_the_tests_fail(script, monkeypatch, capsys) -> None:
    failed = script.subprocess.CompletedProcess([], 1, stdout="1 failed", stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(script.sys, "argv", ["bench_ops.py", "--cpu", "--commit", "none"])
    with pytest.raises(SystemExit, match=r"1 failed.*nothing is measured"):
        script.main()
    assert capsys.readouterr().out == ""


def test_what_operations_are_compared_with_computes_the_same(script) -> None:
    queries, keys = torch.randn(2, 3, 16), torch.randn(40, 16)
    offsets = offsets_of([1, 4, 3, 2] * 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    wanted, _ = route_documents(queries, mask, keys, offsets, 5, backend="pytorch")
    assert torch.equal(script.plain_route(queries, keys, offsets, 5)[0], wanted)
    content = torch.randn(10, 2, 1, 4)
    found = script.published_gather(torch.tensor([[2, 0]]), offsets_of([3, 3, 4]), content)
    assert torch.equal(found, content[[6, 7, 8, 9, 0, 1, 2]])


@pytest.mark.parametrize(("device_ms", "reached"), [(None, False), (1.0, True)])
def test_a_case_is_measured_against_its_goal(script, monkeypatch, device_ms, reached) -> None:
    """Bytes over time over the ceiling; the graph's time if there is one."""
    bench = script.Bench(script.argparse.Namespace(cpu=True, scale=1.0, repeats=1), ["cpp"])
    bench.ceilings["copy"] = 1e9
    for name, value in (("call_ms", 2.0), ("device_ms", device_ms), ("peak_MB", 0.0)):
        monkeypatch.setattr(bench, name, lambda *_, value=value: value)
    row = script.Row("pool_chunks", "a case", "cpp", 0.0, bytes=1e6, ceiling="copy")
    bench.measure(row, lambda _: None, 1, goal=("copy", 0.8))
    assert row.reached is reached and row.share == pytest.approx(1.0 / (device_ms or 2.0))
