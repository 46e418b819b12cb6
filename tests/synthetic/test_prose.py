"""Real prose from installed documentation: plain, of the length asked for, never the same sentence twice."""

import re
import sysconfig

import pytest

from msa_hf.evaluation import prose_documents
from msa_hf.synthetic import prose

DOCSTRING = """Reads the ``table`` of a :class:`~pkg.Reader` from disk. It returns *nothing* at all when there is no
    file.

    See [the manual](https://example.com/x) for a longer account of it. Call foo.bar() to begin with this one.

    Args:
        path: Where the table lies on the disk of the user.

    * Lists are not prose, whatever their items say. The second sentence of an item is none either.

    >>> Reader().read()

    === ===
    a   b
    === ===

    Too short.
    lower case starts no sentence of ours.
    """


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return prose_documents(60, seed=1)


def test_sentences_are_kept_and_markup_code_and_lists_are_not():
    assert prose.plain_sentences(DOCSTRING) == [
        "Reads the table of a Reader from disk.",
        "It returns nothing at all when there is no file.",
        "See the manual for a longer account of it.",
    ]


def test_texts_are_plain_sentences_of_about_the_length_asked_for(texts: list[str]):
    assert len(texts) == 60
    for text in texts:
        assert 60 <= len(text.split()) <= 72 + 40
        assert re.fullmatch(r"[A-Z][A-Za-z0-9 ,;:'()\"!?.-]*[.!?]", text), text


def test_shorter_texts_can_be_had():
    assert all(22 <= len(text.split()) <= 27 + 40 for text in prose_documents(30, words=30))


def test_no_sentence_occurs_twice(texts: list[str]):
    every = [sentence for text in texts for sentence in sentences(text)]
    assert len(set(every)) == len(every)


def test_the_seed_decides(texts: list[str]):
    assert prose_documents(20, seed=1) == texts[:20]
    # One source gives up to all twenty texts, so that two seeds that begin with the same long one share those.
    assert len({prose_documents(1, seed=seed)[0] for seed in range(2, 6)} - {texts[0]}) >= 2


def test_the_standard_library_alone_can_be_had(monkeypatch: pytest.MonkeyPatch):
    """What is installed besides makes no difference."""
    texts, place = prose_documents(20, seed=1, packages=False), sysconfig.get_path("stdlib")
    monkeypatch.setattr(prose, "_descriptions", lambda: ["A sentence of six words here. " * 3])
    monkeypatch.setattr(
        prose.sysconfig, "get_paths", lambda: {"stdlib": place, "purelib": "/nowhere", "platlib": "/nowhere"}
    )
    assert prose_documents(20, seed=1, packages=False) == texts


def test_wanting_more_than_there_is_says_how_much_there_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prose, "_source_files", lambda: iter(()))
    monkeypatch.setattr(prose, "_descriptions", lambda: ["A sentence of six words here. " * 3])
    with pytest.raises(ValueError, match="makes 0 texts, not 5"):
        prose_documents(5)


def test_sources_that_are_no_python_are_passed_over(tmp_path, monkeypatch: pytest.MonkeyPatch):
    body = " ".join(f"This is plain sentence number {number} of the {number} that were written." for number in range(6))
    (tmp_path / "good.py").write_text(f'class A:\n    def b(self):\n        """{body}"""\n', encoding="utf-8")
    (tmp_path / "bad.py").write_text('"""' + body, encoding="utf-8")
    (tmp_path / "null.py").write_bytes(b'"""\0"""')
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    files = [*sorted(tmp_path.iterdir()), tmp_path / "missing.py"]
    monkeypatch.setattr(prose, "_source_files", lambda: iter(files))
    monkeypatch.setattr(prose, "_descriptions", lambda: [])
    assert prose_documents(1) == [body]
