"""bm25s is imported without JAX."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from msa_hf.bm25 import SELECTION, import_bm25s


@pytest.fixture
def without_bm25s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "bm25s":
            monkeypatch.delitem(sys.modules, name)


def test_jax_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_bm25s: None) -> None:
    """A JAX that is installed is not imported, and can be afterwards."""
    package = tmp_path / "jax"
    package.mkdir()
    (package / "__init__.py").write_text("started = True\n")
    (package / "lax.py").write_text("def top_k(scores, k):\n    raise AssertionError('JAX selected')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    bm25s = import_bm25s("A test", "eval")
    assert "jax" not in sys.modules
    index = bm25s.BM25()
    index.index([["a", "b"], ["c"], ["a"]], show_progress=False)
    found, _ = index.retrieve([["c"]], k=2, show_progress=False, backend_selection=SELECTION)
    assert found[0, 0] == 1
    import jax

    assert jax.started
    monkeypatch.delitem(sys.modules, "jax")


def test_jax_of_others_stays(monkeypatch: pytest.MonkeyPatch, without_bm25s: None) -> None:
    theirs = object()
    monkeypatch.setitem(sys.modules, "jax", theirs)
    import_bm25s("A test", "eval")
    assert sys.modules["jax"] is theirs


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"A test needs bm25s: pip install msa-hf\[eval\]"):
        import_bm25s("A test", "eval")
    assert sys.modules.get("jax", ...) is not None
