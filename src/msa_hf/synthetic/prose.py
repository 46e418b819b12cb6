"""Real prose without a download: the documentation of installed packages and of the standard library.

Docstrings are read from source files (nothing is imported), together with the descriptions of installed
distributions. Only plain sentences are kept, each of them once.
"""

import ast
import importlib.metadata
import inspect
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

_LONGEST_FILE = 200_000  # bytes; longer sources are mostly tables
_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}

# Markup gives way to its text.
_MARKUP = [
    (re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)"), r"\1"),  # [text](target)
    (re.compile(r":[\w:+-]+:`~[\w.]*?(\w+)`"), r"\1"),  # :role:`~package.name`
    (re.compile(r":[\w:+-]+:`([^`]*)`"), r"\1"),  # :role:`text`
    (re.compile(r" ?<[^<>]*>"), ""),  # tags, `text <target>`
    (re.compile(r"`+([^`]*)`+_*"), r"\1"),
    (re.compile(r"(\*+)([^*\s][^*]*)\1"), r"\2"),
    (re.compile(r"\s+"), " "),
]
_NOT_TEXT = re.compile(
    r"^(?:\s|>>>|\.\.|[-*#|=+~:@$%{}\[\]\\]|\d+[.)])", re.MULTILINE
)  # how lines of other things start
_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?]) (?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\"-]*[a-z)][.!?]")
_CODE = re.compile(r"\w\(|\(\)|[a-z][A-Z]|[A-Z]{6}|^\w+:|\b(?:e\.g|i\.e)\b")
_SENTENCE_WORDS = range(5, 41)

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def prose_documents(count: int, seed: int = 0, words: int = 80, packages: bool = True) -> list[str]:
    """Texts of real prose; no sentence occurs twice in them.

    They come from what is installed, so that another environment gives other texts; in the same one they depend on the
    arguments alone. The standard library, torch and transformers together hold several thousands.

    Args:
        count: how many texts.
        seed: another seed reads the sources in another order.
        words: about how long each is; texts end where a sentence ends.
        packages: also from installed packages. Without, the texts depend on the version of Python and nothing else that
            is installed.
    """
    sources: list[Path | str] = [*_descriptions(), *_source_files()] if packages else [*_source_files(("stdlib",))]
    random.Random(seed).shuffle(sources)
    documents: list[str] = []
    seen: set[str] = set()
    for source in sources:
        if len(documents) >= count:
            return documents[:count]
        texts = [source] if isinstance(source, str) else _docstrings(source)
        documents += _compose((sentence for text in texts for sentence in plain_sentences(text)), words, seen)
    if len(documents) < count:
        raise ValueError(f"the documentation installed here makes {len(documents)} texts, not {count}")
    return documents[:count]


def plain_sentences(text: str) -> list[str]:
    """The sentences of a docstring, or of a description in Markdown or reStructuredText, that read as prose: without
    headings, lists, tables, code and descriptions of arguments, and with markup taken away."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if _NOT_TEXT.search(paragraph):
            continue
        for pattern, replacement in _MARKUP:
            paragraph = pattern.sub(replacement, paragraph)
        for sentence in _SENTENCE_END.split(paragraph.strip()):
            length = len(sentence.split())
            if length in _SENTENCE_WORDS and _PLAIN.fullmatch(sentence) and not _CODE.search(sentence):
                sentences.append(sentence)
    return sentences


def _compose(sentences: Iterator[str], words: int, seen: set[str]) -> Iterator[str]:
    """Texts of new sentences in their order. A rest of less than three quarters of the length is left out."""
    text: list[str] = []
    length = 0
    for sentence in sentences:
        if sentence in seen:
            continue
        seen.add(sentence)
        text.append(sentence)
        length += len(sentence.split())
        if length >= 0.9 * words:
            yield " ".join(text)
            text, length = [], 0
    if length >= 0.75 * words:
        yield " ".join(text)


def _descriptions() -> list[str]:
    """Of the installed distributions, in the order of their names."""
    named = {(found.name or "").lower(): found for found in importlib.metadata.distributions()}
    return [str(named[name].metadata.json.get("description", "")) for name in sorted(named)]


def _source_files(places: Sequence[str] = ("stdlib", "purelib", "platlib")) -> Iterator[Path]:
    """Of the standard library and of the installed packages, in the order of their paths; tests are left out."""
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(paths[place] for place in places):
        for directory, inner, files in os.walk(root):
            inner[:] = sorted(name for name in inner if name not in _EXCLUDED)
            yield from (Path(directory, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    """Of a module and all its classes and functions. A file that cannot be read or parsed has none."""
    try:
        source = path.read_bytes() if path.stat().st_size <= _LONGEST_FILE else b""
        if b'"""' not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    # Definitions in their order, without those inside functions; most of a tree is expressions, which are not walked.
    rest: list[ast.AST] = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, _Documented):
            yield ast.get_docstring(node, clean=False) or ""
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            rest += reversed([inner for name in ("body", "orelse") for inner in getattr(node, name, ())])
