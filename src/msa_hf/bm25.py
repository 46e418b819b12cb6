"""BM25 over texts that lie in memory: bm25s, imported so that it leaves accelerators alone."""

from __future__ import annotations

import sys
from types import ModuleType

# Where JAX is installed, bm25s starts it when it is imported, and JAX takes three quarters of a GPU's memory at once,
# from the model beside it. Its only use there is a selection, which NumPy does as well.
SELECTION = "numpy"


def import_bm25s(purpose: str, extra: str) -> ModuleType:
    """The module bm25s; JAX is not imported for it.

    Args:
        purpose: what needs it, the beginning of a sentence.
        extra: of this package, which installs it.

    Raises:
        ImportError: where it is missing.
    """
    absent = object()
    before = sys.modules.get("jax", absent)
    sys.modules["jax"] = None  # type: ignore[assignment]  # an import of it fails, as where it is not installed
    try:
        import bm25s
    except ImportError as error:
        raise ImportError(f"{purpose} needs bm25s: pip install msa-hf[{extra}]") from error
    finally:
        if before is absent:
            del sys.modules["jax"]
        else:
            sys.modules["jax"] = before  # type: ignore[assignment]
    return bm25s
