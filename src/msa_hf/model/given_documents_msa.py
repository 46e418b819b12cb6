"""Documents as users hold them in Python: texts, token ids, rows, tables, and objects of other libraries.

Other libraries are known by what their objects have, and are not imported.
"""

import importlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from .metadata_msa import is_missing
from .unicode_msa import check_unicode


@runtime_checkable
class LangChainDocument(Protocol):
    """A document of LangChain; its `id`, None where it has none, becomes the key."""

    page_content: str
    metadata: Mapping[str, object]


@runtime_checkable
class LlamaIndexDocument(Protocol):
    """A document or text node of LlamaIndex; its `id_` becomes the key."""

    text: str
    metadata: Mapping[str, object]
    id_: str


class FrameIndex(Protocol):
    names: Sequence[object]


@runtime_checkable
class PandasFrame(Protocol):
    """A table of pandas."""

    columns: Iterable[object]
    index: FrameIndex

    def itertuples(self, index: bool = True, name: str | None = None) -> Iterable[tuple[object, ...]]: ...
    def reset_index(self) -> "PandasFrame": ...


@runtime_checkable
class PolarsFrame(Protocol):
    """A table of polars."""

    columns: list[str]

    def iter_rows(self, *, named: bool = False) -> Iterable[Mapping[str, object]]: ...


class RowBatch(Protocol):
    def to_pylist(self) -> list[Mapping[str, object]]: ...


@runtime_checkable
class ArrowRows(Protocol):
    """A table of pyarrow."""

    column_names: list[str]

    def to_batches(self, max_chunksize: int | None = None) -> Iterable[RowBatch]: ...


@runtime_checkable
class HasColumns(Protocol):
    """One split of a dataset."""

    column_names: Sequence[str] | None


def each_document(documents: object) -> Iterator[object]:
    """The documents of whatever a user holds: an iterable of documents, a table, a dataset.

    Raises:
        TypeError: for one document, several splits, an open file or what has no order, naming the remedy. Nothing has
            been read then.
    """
    _refuse_what_holds_no_documents(documents)
    if isinstance(documents, PandasFrame):
        return _pandas_rows(documents)
    if isinstance(documents, PolarsFrame):
        return iter(documents.iter_rows(named=True))
    if isinstance(documents, ArrowRows):
        return (row for batch in documents.to_batches(max_chunksize=256) for row in batch.to_pylist())
    return map(_as_row, iter(documents))  # type: ignore[call-overload]


def are_paths(documents: object) -> bool:
    """Tell whether a user names files by their paths: one, or several in a list."""
    several = documents if isinstance(documents, list | tuple) else [documents]
    return bool(several) and all(isinstance(item, os.PathLike) for item in several)


def read_paths(paths: object, **options: object) -> Iterable[object]:
    """The documents of files, of which the first look is over; see `msa_hf.data.read_documents`.

    Raises:
        ImportError: where the package is not installed.
        ValueError: for what cannot be read.
    """
    try:
        module = importlib.import_module("msa_hf.data.documents")
    except ImportError as error:
        raise ImportError("Reading documents from files needs the package: `pip install msa-hf`.") from error
    corpus: Iterable[object] = module.Corpus(paths, **options)
    return corpus


def _refuse_what_holds_no_documents(documents: object) -> None:
    kind = type(documents).__name__
    remedy = None
    if isinstance(documents, str | bytes):
        remedy = "put it in a list"
        if isinstance(documents, str) and len(documents) < 4096 and "\n" not in documents and _exists(documents):
            remedy = f"pass pathlib.Path({documents!r}) for the documents in that place, a list for a text"
    elif isinstance(documents, Mapping):
        splits = [name for name, value in documents.items() if isinstance(value, HasColumns)]
        if splits and len(splits) == len(documents):
            names = ", ".join(map(str, splits))
            raise TypeError(f"`documents` has the splits {names}; give one of them, as documents[{splits[0]!r}].")
        remedy = "put it in a list, or a mapping {'key': ..., 'text': ...} for each of its items"
    elif isinstance(documents, LangChainDocument | LlamaIndexDocument) and not isinstance(documents, PandasFrame):
        remedy = "put it in a list"
    if remedy is not None:
        raise TypeError(f"`documents` must be an iterable of documents, got one {kind}; {remedy}.")
    if isinstance(documents, set | frozenset):
        raise TypeError(f"`documents` is a {kind}, which has no order; pass a list.")
    if isinstance(documents, io.IOBase):
        raise TypeError("`documents` is an open file; pass the pathlib.Path of the file, or a list of its lines.")
    if kind == "LazyFrame":
        raise TypeError("`documents` is a LazyFrame; pass what its collect() returns.")
    if isinstance(documents, np.ndarray) and not (
        documents.ndim == 1 or (documents.ndim and documents.dtype.kind in "iu")
    ):
        raise TypeError(f"`documents` is an array of shape {documents.shape}; pass one of texts, [N], or their list.")
    if not isinstance(documents, Iterable | PandasFrame | PolarsFrame | ArrowRows):
        try:
            iter(documents)  # type: ignore[call-overload]  # what has items by number alone is iterable too
        except TypeError:
            raise TypeError(f"`documents` must be an iterable of documents, got {kind}.") from None


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _pandas_rows(frame: PandasFrame) -> Iterator[Mapping[object, object]]:
    """Rows by column; named levels of the index are columns, and missing values None."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = list(frame.columns)
    if len(set(names)) < len(names):
        raise ValueError(f"The table has two columns of the same name: {', '.join(map(str, names))}.")
    for values in frame.itertuples(index=False, name=None):
        yield {name: None if is_missing(value) else value for name, value in zip(names, values, strict=True)}


def _as_row(document: object) -> object:
    """Documents of other libraries as mappings; others as they are."""
    if isinstance(document, str | Mapping | Sequence | np.ndarray):
        return document
    if isinstance(document, LangChainDocument):
        key = getattr(document, "id", None)
        return {"key": key, "text": document.page_content, "metadata": dict(document.metadata or {})}
    if isinstance(document, LlamaIndexDocument):
        return {"key": document.id_, "text": document.text, "metadata": dict(document.metadata or {})}
    return document


def key_of(key: object, what: str = "A key") -> str:
    """A key as a user gave it: a text, or an integer by its digits.

    Raises:
        TypeError: for anything else, such as None, 1.0, True or a list of keys.
        ValueError: for an empty one, and what is not Unicode.
    """
    if isinstance(key, str):
        if not key:
            raise ValueError(f"{what} is empty; leave it out or name the document.")
        check_unicode(key, f"{what} {key!r:.80}")
        return str(key)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return str(int(key))
    raise TypeError(f"{what} is a string, or an integer by its digits, got {type(key).__name__}: {key!r:.80}.")
