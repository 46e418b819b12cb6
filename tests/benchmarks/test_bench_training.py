"""What the benchmark of a training step says of a profile."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_device_idles_where_no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from bench_training import idle_time

    kernels = [(8.0, 9.0), (0.5, 2.0), (1.0, 3.0), (5.0, 6.0), (5.5, 5.7)]  # of two streams, in any order
    assert idle_time(kernels) == pytest.approx(2.0 + 2.0)
    assert idle_time([]) == 0.0
