"""Direct calls of the native operations with wrong arguments raise, or return what can be read; no process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from extension import why_not_built

from msa_hf.ops import dispatch

HELPER = Path(__file__).parent.parent / "helpers" / "fuzz_ops.py"


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does")
@pytest.mark.parametrize(("namespace", "count"), [("msa_hf", 300), ("msa_hf_pytorch", 120)])
def test_wrong_arguments_raise(namespace: str, count: int, tmp_path: Path) -> None:
    if namespace == "msa_hf" and (reason := why_not_built()) is not None:
        pytest.skip(reason)
    source = str(Path(dispatch.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    with open(tmp_path / "said", "w") as said, open(tmp_path / "errors", "w") as errors:
        command = [sys.executable, str(HELPER), namespace, "0", str(count)]
        ended = subprocess.run(command, stdout=said, stderr=errors, env=environment, timeout=300)
    last, *result = (tmp_path / "said").read_text().splitlines()
    assert ended.returncode == 0, f"call {last.strip()}: {(tmp_path / 'errors').read_text()[-3000:]}"
    returned, raised = (int(word) for word in result[0].split()[1::2])
    assert returned > count // 5 and raised > count // 5 and returned + raised == count
