"""What the options of benchmarks refuse, before any work is done."""

from pathlib import Path

import pytest

from msa_hf.cli import main

TINY = str(Path(__file__).parents[2] / "model_cards" / "msa-hf-tiny")


@pytest.mark.parametrize("benchmark", ["chains", "scaling", "conversations", "mine"])
@pytest.mark.parametrize("refusal", ["", " ", "."])
def test_a_refusal_without_words_is_refused(benchmark: str, refusal: str, capsys: pytest.CaptureFixture[str]) -> None:
    documents = ["docs"] * (benchmark == "mine")
    assert main(["bench", benchmark, TINY, *documents, "--refusal", refusal]) == 2
    assert "must say in words that there is no answer" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", ["needles", "chains", "scaling"])
def test_documents_too_short_to_count_are_refused(benchmark: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", benchmark, TINY, "--document-tokens", "15"]) == 2
    assert "at least 16" in capsys.readouterr().err
