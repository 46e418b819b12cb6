"""Bars of the phases of a run: on a terminal from the first moment, elsewhere none."""

import io

import pytest
from small_corpus import notes, tokenizer_of_notes

from msa_hf.training.pairs import cut_passages
from msa_hf.training.progress import phase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_phase_is_shown_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with phase("encoding passages", 40, "passages") as done:
        assert "encoding passages" in terminal.getvalue() and "/40" in terminal.getvalue()
        done(40)


def test_elsewhere_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with phase("encoding passages", 40, "passages") as done:
        done(40)
    assert file.getvalue() == ""


def test_cutting_counts_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Told:
        def __init__(self, what: str, total: int, unit: str) -> None:
            assert what == "cutting documents" and total == sum(map(len, notes().values()))

        def __enter__(self):
            return told.append

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("msa_hf.training.pairs.phase", Told)
    cut_passages(notes(), tokenizer_of_notes(), 9)
    assert sum(told) == sum(map(len, notes().values())) and len(told) > len(notes())
