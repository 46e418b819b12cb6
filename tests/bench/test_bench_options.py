"""What the options of benchmarks refuse, before any work is done."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench.haystack import Haystack, file_texts
from msa_hf.cli import main
from msa_hf.model.bank_manifest_msa import holds_bank

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


@pytest.mark.parametrize("option", ["--out", "--html"])
@pytest.mark.parametrize("benchmark", ["needles", "chains", "scaling", "conversations", "mine"])
def test_a_result_among_the_texts_that_are_read_is_refused(
    benchmark: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    (docs / "inner").mkdir(parents=True)
    (tmp_path / "into.json").symlink_to(docs / "r.json")
    (docs / "out.json").symlink_to(tmp_path / "r.json")
    source = [str(docs)] if benchmark == "mine" else ["--text", str(docs)]
    for name in ("docs/inner/r.json", "into.json", "docs/out.json"):
        assert main(["bench", benchmark, TINY, *source, option, str(tmp_path / name)]) == 2
        assert f"lies in {docs}, whose files are read; name a file elsewhere" in capsys.readouterr().err


BANK = '{"format": "msa_hf-bank", "format_version": 2}'


@pytest.mark.parametrize("benchmark", ["chains", "scaling", "conversations"])
def test_a_bank_in_the_place_of_texts_is_told_as_one(
    benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(BANK)
    options = ["--text", str(tmp_path), "--sizes", "3K", "--dtype", "float32", "--device", "cpu", "--quiet"]
    assert main(["bench", benchmark, TINY, *options]) == 2
    assert f"{tmp_path}: a bank, where texts are wanted" in capsys.readouterr().err


def test_options_of_reading_documents_are_refused_for_a_bank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text(BANK)
    assert main(["bench", "mine", TINY, str(tmp_path), "--glob", "*.md", "--skip-bad", "--text-column", "a"]) == 2
    assert "a bank, whose documents are not read again; leave out --text-column, --glob, --skip-bad" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("tokens", ["112", "200"])
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "needles --text BANK",
            "--document-tokens {}: BANK is a bank, whose documents are not cut again; leave it out",
        ),
        ("needles --text user/no-such", "--document-tokens {}: user/no-such is a bank, whose documents are not cut"),
        ("mine BANK", "BANK: a bank, whose documents are not read again; leave out --document-tokens"),
        ("mine BANK --skip-bad", "read again; leave out --skip-bad, --document-tokens"),
        ("scaling", "--document-tokens {}: invented texts are not cut; leave it out, or name texts (--text)"),
        ("chains", "--document-tokens {}: no text is read that would be cut; leave it out, or name texts (--text)"),
        (
            "chains --text FILE --text-share 0",
            "--document-tokens {}: with --text-share 0 no text is read that would be cut; leave it out, or",
        ),
    ],
)
def test_a_number_of_tokens_to_cut_at_is_refused_where_nothing_is_cut(
    command: str, said: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever number, and only where it was given: without it the same commands miss nothing but their model."""
    (tmp_path / "manifest.json").write_text(BANK)
    name, *options = command.replace("BANK", str(tmp_path)).replace("FILE", __file__).split()
    assert main(["bench", name, "./none", *options, "--document-tokens", tokens]) == 2
    assert said.format(tokens).replace("BANK", str(tmp_path)) in capsys.readouterr().err
    if "--skip-bad" not in options:
        assert main(["bench", name, "./none", *options, "--device", "cpu"]) == 2
        assert "none: no such directory" in capsys.readouterr().err


def test_documents_are_cut_at_what_a_command_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuts: list[int] = []

    def haystack(texts: object, tokenizer: object, tokens: object, document_tokens: int, **options: object) -> None:
        cuts.append(document_tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr("msa_hf.bench.haystack.Haystack", haystack)
    for module in ("needles", "mine"):
        monkeypatch.setattr(f"msa_hf.bench.{module}.Haystack", haystack)
    for name, *options in (
        ("needles",),
        ("scaling", "--text", __file__),
        ("chains", "--text", __file__),
        ("mine", __file__),
    ):
        for limit in ([], ["--document-tokens", "50"]):
            command = ["bench", name, TINY, *options, *limit, "--sizes", "9K", "--dtype", "float32", "--device", "cpu"]
            assert main([*command, "--quiet"]) == 130
    assert cuts == [112, 50] * 4


@pytest.mark.parametrize(
    ("manifest", "bank"),
    [
        (BANK, True),
        (BANK[:-9], True),  # damaged: to be said, not read as documents
        ("", True),
        ("[]", True),
        ('{"name": "app", "icons": []}', False),
        ('{"format": "zip", "text": "x"}', False),
    ],
)
def test_a_folder_with_a_manifest_of_something_else_is_one_of_documents(
    manifest: str, bank: bool, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "a.txt").write_text("Some words.")
    assert holds_bank(tmp_path) is bank and not holds_bank(tmp_path / "a.txt")
    if not bank:
        assert "Some words." in list(file_texts([tmp_path], glob=["*.txt"]))


def test_reading_many_texts_shows_how_far_it_is(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def texts() -> Iterator[str]:
        for number in range(3):
            time.sleep(0.4)
            yield f"Text number {number} of a few words that count as a document, and of some more. " * 8

    for shown in (False, True):
        Haystack(texts(), tiny[1], None, show_progress=shown)
        assert ("Reading texts" in capsys.readouterr().err) is shown
