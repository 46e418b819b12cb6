"""The compiled extension, as far as tests ask whether it was built from the sources at hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

from msa_hf.ops import dispatch

ROOT = Path(__file__).parents[2]
KINDS = (".cpp", ".h", ".inc", ".cu", ".cuh")


def why_not_built() -> str | None:
    """Why the operations of `csrc/` cannot be called, None where they can."""
    reason = dispatch.load_extension()
    if reason is not None:
        return reason
    read = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in KINDS)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]  # as setup.py makes it
    if digest not in dispatch.extension_info():
        return "the extension was built from other sources; python setup.py build_ext --inplace builds it"
    return None
