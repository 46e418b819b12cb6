"""Direct calls of the native operations with wrong arguments raise, or return what can be read; no process ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fuzz_ops
import pytest
from extension import why_not_built
from forking import ended, forked


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does")
@pytest.mark.parametrize(("namespace", "count"), [("msa_hf", 300), ("msa_hf_pytorch", 120)])
def test_wrong_arguments_raise(namespace: str, count: int, tmp_path: Path) -> None:
    if namespace == "msa_hf" and (reason := why_not_built()) is not None:
        pytest.skip(reason)

    with open(os.devnull) as none, open(tmp_path / "said", "w") as said, open(tmp_path / "errors", "w") as errors:
        streams = [file.fileno() for file in (none, said, errors)]
        (code,) = ended(forked(lambda: fuzz_ops.main(namespace, 0, count), streams))
    last, *result = (tmp_path / "said").read_text().splitlines()
    assert code == 0, f"call {last.strip()}: {(tmp_path / 'errors').read_text()[-3000:]}"
    returned, raised = (int(word) for word in result[0].split()[1::2])
    assert returned > count // 5 and raised > count // 5 and returned + raised == count
