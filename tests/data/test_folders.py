"""Which files of a folder are documents: hidden, linked and doubly reachable ones, patterns, and what is reported."""

import os
from pathlib import Path

import pytest

from msa_hf.data import Corpus, DataError
from msa_hf.data.documents import report_lines
from msa_hf.data.folders import find_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files with their names as texts, and links to some of them."""
    root = tmp_path / "folder"
    for name in ("b.txt", "a/c.md", "a/deep/d.py", ".git/e.txt", ".f.txt", "~$g.md", "h.png", "README"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty.txt").write_text(" \n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "o.txt").write_text("outside")
    return root


def keys(source: Path, **options: object) -> list[str]:
    return [row["key"] for row in Corpus(source, **options)]  # type: ignore[arg-type]


def test_files_come_in_order_and_what_is_left_out_is_reported(folder: Path) -> None:
    corpus = Corpus(folder)
    assert [row["key"] for row in corpus] == ["a/c.md", "a/deep/d.py", "b.txt"]
    assert {(item.place, item.reason.split(",")[0].split(" (")[0]) for item in corpus.skipped} == {
        (".git", "hidden"),
        (".f.txt", "hidden"),
        ("~$g.md", "hidden"),
        ("h.png", "not of a kind that is read"),
        ("README", "not of a kind that is read"),
        ("empty.txt", "empty"),
    }
    said = "\n".join(report_lines(corpus.skipped))
    assert "skipped 3 hidden: .f.txt, .git, ~$g.md" in said and "(.png): h.png" in said
    assert "(no suffix: a text needs one, such as .txt): README" in said


def test_links_are_followed_and_every_file_is_read_once(folder: Path) -> None:
    os.symlink("b.txt", folder / "0.txt")  # sorts before the file itself, whose own name is taken all the same
    os.symlink("../../outside", folder / "a" / "out")
    os.symlink("../outside", folder / "z")
    os.link(folder / "b.txt", folder / "twin.txt")
    os.symlink("..", folder / "a" / "up")  # a circle
    os.symlink("../..", folder / "a" / "above")  # would read what lies around the folder
    os.symlink("nowhere", folder / "broken.txt")
    os.symlink("self.txt", folder / "self.txt")
    os.symlink("b.lnk/x", folder / "b.lnk")
    os.mkfifo(folder / "pipe.txt")  # would wait for ever
    corpus = Corpus(folder)
    assert [row["key"] for row in corpus] == ["a/c.md", "a/deep/d.py", "a/out/o.txt", "b.txt"]
    reasons = {item.place: item.reason for item in corpus.skipped}
    for name in ("0.txt", "twin.txt", "a/up", "a/above", "z"):
        assert reasons[name] == "another name of what is there"
    assert reasons["broken.txt"] == "a link that leads nowhere"
    assert reasons["self.txt"] == reasons["b.lnk"] == "a link that leads nowhere but back"
    assert reasons["pipe.txt"] == "neither a file nor a folder"


def test_a_hidden_folder_or_a_link_is_read_when_it_is_named(folder: Path) -> None:
    assert keys(folder / ".git") == ["e.txt"]
    os.symlink("folder", folder.parent / "link")
    assert keys(folder.parent / "link") == keys(folder)


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ("*.md", ["a/c.md"]),
        ("a/*", ["a/c.md"]),
        ("a/**", ["a/c.md", "a/deep/d.py"]),
        ("**/d.py", ["a/deep/d.py"]),
        ("**/c.md", ["a/c.md"]),
        ("[ab].txt", ["b.txt"]),
        ("[!a].txt", ["b.txt"]),
        ("?.*", ["a/c.md", "a/deep/d.py", "b.txt"]),
        (["b.txt", "*.py"], ["a/deep/d.py", "b.txt"]),
        ("./a/c.md", ["a/c.md"]),
    ],
    ids=str,
)
def test_patterns(folder: Path, patterns: str | list[str], found: list[str]) -> None:
    corpus = Corpus(folder, glob=patterns)
    assert [row["key"] for row in corpus] == found
    assert "--glob" not in " ".join(item.reason for item in corpus.skipped)


def test_a_pattern_that_fits_nothing_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no file that matches --glob \*\.pdf"):
        Corpus(folder, glob="*.pdf")
    with pytest.raises(DataError, match="--glob is of folders"):
        Corpus(folder / "b.txt", glob="*.txt")


def test_names_that_are_no_text_are_bad(folder: Path) -> None:
    try:
        (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match=r"caf\\xe9\.txt': its name is not Unicode.* Rename it"):
        Corpus(folder)
    corpus = Corpus(folder, skip_bad=True)
    assert len(corpus) == 3 and [item.bad for item in corpus.skipped].count(True) == 1


def test_very_deep_folders_are_read(tmp_path: Path) -> None:
    place = tmp_path / "deep"
    place.mkdir()
    for _ in range(700):
        place = place / "d"
    place.mkdir(parents=True)
    (place / "x.txt").write_text("x")
    assert len(find_files(tmp_path / "deep").names) == 1


def test_an_empty_path_is_not_the_folder_that_this_runs_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a variable of the shell that is not set."""
    monkeypatch.chdir(folder)
    for source in ("", [folder / "b.txt", ""]):
        with pytest.raises(DataError, match="path of the documents is empty"):
            Corpus(source)  # type: ignore[arg-type]
    assert len(Corpus(".")) == 3


def test_what_is_no_folder_or_file_is_refused(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, message in ((tmp_path / "pipe.txt", "neither a file nor a folder"), (tmp_path / "none", "no such file")):
        with pytest.raises(DataError, match=message):
            Corpus(path)
    with pytest.raises(DataError, match="not a kind of file that is read"):
        Corpus(folder / "h.png")
    assert keys(folder / "README") == ["README"], "without a suffix, and named by the user"
