"""Documents as users keep them: one reader for files, folders and saved datasets, whatever they are wanted for."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from tqdm.auto import tqdm

from ..json_object import JsonObject
from ..model.given_documents_msa import are_paths, each_document, key_of
from ..model.metadata_msa import checked_metadata
from ..model.unicode_msa import check_unicode
from .errors import DataError
from .files import KINDS, NAMED, TEXT, Found, Rows, Whole, kind_of
from .folders import Skipped, find_files
from .lines import check_encoding
from .saved_datasets import is_saved_dataset, saved_dataset

DIGEST_BYTES = 16
NO_SUFFIX = "no suffix: a text needs one, such as .txt"
Source = str | os.PathLike[str]


class DocumentRow(TypedDict):
    """A document that was looked at: what `model.encode_documents` takes.

    Attributes:
        key: its own, else its path in a folder, else its number.
        metadata: JSON values.
        input_ids: tokens, where a dataset has them beside its text.
    """

    key: str
    text: str
    metadata: dict[str, object]
    input_ids: NotRequired[list[int]]


@dataclass(frozen=True)
class SourceFile:
    """A file of documents.

    Attributes:
        name: its path in the folder; None where it was given by itself.
        first: the number of its first document.
    """

    path: Path
    name: str | None
    kind: Rows | Whole
    first: int


def read_documents(source: object, **options: object) -> Iterable[DocumentRow]:
    """Read documents from wherever a user keeps them.

    Args:
        source: a file or folder, or several in a list; or what `model.encode_documents` takes: texts, mappings, a
            `datasets.Dataset`, a table of pandas, polars or pyarrow, documents of LangChain and LlamaIndex.
        options: of `Corpus`; `text_column` and `key_column` for all.

    Returns:
        Documents with `key`, `text` and `metadata`. Those of files are a `Corpus`, which was looked through, can be
        read again and says what was skipped. Others are read one at a time as they are asked for.

    Raises:
        DataError: for files that cannot be taken, naming place, cause and remedy.
        TypeError, ValueError: for other documents that cannot.
    """
    if isinstance(source, str) or are_paths(source):
        return Corpus(source, **options)  # type: ignore[arg-type]
    text_column, key_column = options.pop("text_column", None), options.pop("key_column", None)
    if options:
        raise TypeError(f"{', '.join(options)}: only for files; `source` is a {type(source).__name__}.")
    return _rows_of_objects(source, str(text_column or "text"), str(key_column or "key"))


def _rows_of_objects(source: object, text_column: str, key_column: str) -> Iterator[DocumentRow]:
    keys = set[str]()
    for number, document in enumerate(each_document(source)):
        row = {text_column: document} if isinstance(document, str) else document
        if not isinstance(row, Mapping):
            raise TypeError(f"Document {number} is a {type(document).__name__}; a document is a text or a mapping.")
        if text_column not in row:
            names = ", ".join(map(str, row)) or "none"
            raise DataError(f"Document {number} has no field {text_column!r} (`text_column`); there are: {names}")
        made = document_row(row, f"Document {number}", str(number), text_column, key_column)
        if made["key"] in keys:
            raise DataError(f"Document {number} has the key {made['key']!r}, which an earlier document has")
        keys.add(made["key"])
        yield made


class Corpus:
    """Documents of files: every one looked at before anything is encoded, and read again by every iteration.

    Nothing is held in memory but keys, sizes and digests, whatever the size of the files.

    Args:
        source: a file, a folder (`folders.py` says which of its files), a directory that `datasets.save_to_disk` saved;
            or several of them.
        text_column, key_column: names of the fields of rows; None for `"text"` and `"key"`. A key that was asked for
            must be there.
        glob: patterns of the files of folders to read (default: all of a known kind).
        encoding: of text files and tables; None for UTF-8, and for what a page of the web says of itself.
        skip_bad: leave out what cannot be taken, and count it among `skipped`, instead of raising.
        split: of a saved dataset that has several.
        show_progress: a progress bar for what takes longer than two seconds.

    Attributes:
        keys: key -> number of its document.
        sizes: of the texts, in bytes of UTF-8.
        skipped: files and rows that were left out, and why.
        fields: names of metadata.
        nameless: the first document without a key of its own, as a place for messages; None where all have one.

    Raises:
        DataError: for what cannot be taken, naming file and line, cause and remedy.
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        text_column: str | None = None,
        key_column: str | None = None,
        *,
        glob: str | Sequence[str] = (),
        encoding: str | None = None,
        skip_bad: bool = False,
        split: str | None = None,
        show_progress: bool = False,
    ) -> None:
        check_encoding(encoding)
        self.text_column, self.key_column = text_column or "text", key_column or "key"
        self._key_required = key_column is not None
        self._encoding, self._skip_bad = encoding, skip_bad
        self.skipped: list[Skipped] = []
        self.keys: dict[str, int] = {}
        self.sizes = array("q")
        self.fields: set[str] = set()
        self.nameless: str | None = None
        self._numbers = array("q")  # of rows in their files; where converted texts begin
        self._digests = bytearray()
        self._files: list[SourceFile] = []
        self._converted = tempfile.TemporaryFile()  # noqa: SIM115  # texts whose reading takes long, a line for each
        self._lines: mmap.mmap | None = None  # the same, once all are there
        self._cursor: tuple[SourceFile, int, Iterator[Found]] | None = None
        sources = [source] if isinstance(source, str | os.PathLike) else list(source)
        glob = [glob] if isinstance(glob, str) else list(glob)
        files = [item for place in sources for item in self._files_of(place, glob, split)]
        with tqdm(desc="Reading documents", unit="doc", delay=2, disable=None if show_progress else True) as progress:
            for path, name, kind in files:
                self._look_at(SourceFile(path, name, kind, len(self)), progress)
        if not len(self):
            names = ", ".join(str(place) for place in sources)
            raise DataError(f"{names}: no documents{self._why_none()}")

    def _why_none(self) -> str:
        said = "; ".join(report_lines(self.skipped))
        return f", {said}" if said else "; docs/documents.md names the kinds of files that are read"

    # Looking --------------------------------------------------------------------------------------------------------

    def _files_of(
        self, source: Source, glob: Sequence[str], split: str | None
    ) -> Iterator[tuple[Path, str | None, Rows | Whole]]:
        """The files of a source, with their names in a folder and their kinds."""
        if source == "":
            raise DataError("the path of the documents is empty; the folder that this is run in is named `.`")
        path = Path(source)
        if not path.exists():
            raise DataError(f"{path}: no such file or directory")
        if path.is_dir() and is_saved_dataset(path):
            yield path, None, saved_dataset(path, split)
            return
        if split is not None:
            raise DataError(f"{path}: --split is of saved datasets, which this is none")
        if not path.is_dir():
            kind = TEXT if not path.suffix else kind_of(path.name)
            if not path.is_file():
                raise DataError(f"{path}: neither a file nor a folder")
            if kind is None:
                raise DataError(f"{path}: not a kind of file that is read ({NAMED}, compressed or not, or a folder)")
            if glob:
                raise DataError(f"{path}: --glob is of folders; leave it out for a file")
            yield path, path.name if isinstance(kind, Whole) else None, kind
            return
        found = find_files(path, glob)
        for item in found.skipped:
            if item.bad:
                self._refuse(f"{path}/{item.place}", DataError(f"{path}/{item.place}: {item.reason}"))
            else:
                self.skipped.append(item)
        if glob and not found.names:
            raise DataError(f"{path}: holds no file that matches --glob {' or '.join(glob)}")
        for name in found.names:
            kind = kind_of(name)
            if kind is None:
                suffix = Path(name).suffix
                self.skipped.append(Skipped(name, f"not of a kind that is read ({suffix or NO_SUFFIX})"))
            else:
                yield path / name, name, kind

    def _refuse(self, place: str, error: ValueError) -> None:
        """Raise for something bad, or take note of it."""
        if not self._skip_bad:
            if isinstance(error, DataError):
                raise error
            raise DataError(str(error)) from error
        self.skipped.append(Skipped(place, str(error), bad=True))

    def _look_at(self, file: SourceFile, progress: tqdm[object]) -> None:
        self._files.append(file)
        try:
            if file.name is not None:
                try:
                    check_unicode(file.name, f"{os.fsencode(file.path)!r}: its name")
                except ValueError as error:
                    raise DataError(f"{error} Rename it, or leave it out with --glob or --skip-bad.") from error
            if file.path.is_file() and not file.path.stat().st_size:
                self.skipped.append(Skipped(file.name or str(file.path), "empty, nothing in it"))
                return
            if isinstance(file.kind, Whole):
                self._look_at_text(file, file.kind)
                progress.update()
                return
            number = -1
            for number, row in file.kind.read(file.path, self._encoding):
                try:
                    if isinstance(row, DataError):
                        raise row
                    self._take(self._normalized(file, number, len(self), row), number, self._place(file, number))
                    if row.get(self.key_column) is None and self.nameless is None:
                        self.nameless = self._place(file, number)
                except ValueError as error:
                    self._refuse(self._place(file, number), error)
                progress.update()
            if number < 0 and file.name is not None:
                self.skipped.append(Skipped(file.name, "empty, no rows in it"))
        except ValueError as error:
            self._refuse(str(file.path), error)

    def _look_at_text(self, file: SourceFile, kind: Whole) -> None:
        row = kind.read(file.path, self._encoding)
        if not row["text"].strip():
            hint = "; pages that are images have none" if kind is KINDS[".pdf"] else ""
            assert file.name is not None
            self.skipped.append(Skipped(file.name, f"empty, no text in it{hint}"))
            return
        made = self._normalized(file, 0, len(self), row)
        if kind.converted:
            self._take(made, self._converted.seek(0, os.SEEK_END), str(file.path))
            self._converted.write(json.dumps(made).encode() + b"\n")
        else:
            self._take(made, 0, str(file.path))

    def _take(self, row: DocumentRow, number: int, place: str) -> None:
        key = row["key"]
        if key in self.keys:
            raise DataError(f"{place}: the key {key!r} is that of {self.place(self.keys[key])} already")
        self.keys[key] = len(self)
        self.fields.update(row["metadata"])
        self.sizes.append(len(row["text"].encode()))
        self._digests += _digest(row)
        self._numbers.append(number)

    def _normalized(self, file: SourceFile, number: int, document: int, row: JsonObject) -> DocumentRow:
        """A row of a file as a document."""
        place = self._place(file, number)
        if isinstance(file.kind, Whole):
            assert file.name is not None
            return document_row({**row, "key": file.name}, place, file.name)
        if self.text_column not in row:
            names = ", ".join(map(str, row)) or "none"
            raise DataError(f"{place}: no field {self.text_column!r} (--text-column); there are: {names}")
        if self._key_required and self.key_column not in row:
            raise DataError(f"{place}: no field {self.key_column!r} (--key-column); there are: {', '.join(row)}")
        default = str(document) if file.name is None else f"{file.name}:{number}"
        return document_row(row, place, default, self.text_column, self.key_column)

    # Reading --------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[DocumentRow]:
        return self._documents(0, len(self), keep_place=False)

    def read(self, first: int, end: int) -> Iterator[DocumentRow]:
        """Documents `first` up to `end` (excluded); of runs that ascend, nothing is read twice.

        Raises:
            DataError: where they are not what they were when they were looked at.
        """
        return self._documents(first, end, keep_place=True)

    def digest(self, first: int, end: int) -> bytes:
        """A digest that tells documents `first` up to `end` (excluded) from others."""
        return bytes(self._digests[DIGEST_BYTES * first : DIGEST_BYTES * end])

    def place(self, number: int) -> str:
        """The place of a document, for messages: the file, and line or row in it."""
        file = self._file(number)
        return self._place(file, self._numbers[number])

    def _place(self, file: SourceFile, number: int) -> str:
        return f"{file.path}, {file.kind.unit} {number}" if isinstance(file.kind, Rows) else str(file.path)

    def _file(self, number: int) -> SourceFile:
        return self._files[bisect_right(self._files, number, key=lambda file: file.first) - 1]

    def _documents(self, first: int, end: int, keep_place: bool) -> Iterator[DocumentRow]:
        cursor = self._cursor if keep_place else None
        for number in range(first, end):
            file = self._file(number)
            if isinstance(file.kind, Whole):
                row = self._whole(file, file.kind, number)
            else:
                if cursor is None or cursor[0] is not file or cursor[1] > number:
                    cursor = file, number, iter(file.kind.read(file.path, self._encoding, self._numbers[number]))
                wanted = self._numbers[number]
                found = next((item for item in cursor[2] if item.number >= wanted), None)
                cursor = file, number + 1, cursor[2]
                if keep_place:
                    self._cursor = cursor
                row = None
                if found is not None and found.number == wanted and not isinstance(found.row, DataError):
                    try:
                        row = self._normalized(file, wanted, number, found.row)
                    except ValueError:
                        row = None
            if row is None or _digest(row) != self.digest(number, number + 1):
                raise DataError(f"{self.place(number)}: changed while it was encoded; run the command again")
            yield row

    def reopen(self) -> None:
        """Open files anew from here on: what a forked process does first, whose open files are read by others too."""
        self._cursor = None

    def _whole(self, file: SourceFile, kind: Whole, number: int) -> DocumentRow | None:
        if kind.converted:
            if self._lines is None:
                self._converted.flush()
                self._lines = mmap.mmap(self._converted.fileno(), 0, access=mmap.ACCESS_READ)  # has no place of its own
            start = self._numbers[number]
            row: DocumentRow = json.loads(self._lines[start : self._lines.find(b"\n", start)])
            return row
        try:
            return self._normalized(file, 0, number, kind.read(file.path, self._encoding))
        except ValueError:
            return None


def document_row(
    row: Mapping[str, object], place: str, default_key: str, text_column: str = "text", key_column: str = "key"
) -> DocumentRow:
    """A row as a document.

    Args:
        place: what messages begin with.
        default_key: for a row that has none.

    Raises:
        ValueError, TypeError: for a text, key or metadata that cannot be kept.
    """
    fields = dict(row)
    text, key = fields.pop(text_column, None), fields.pop(key_column, None)
    ids = fields.pop("input_ids", None)
    fields.pop("attention_mask", None)
    if not isinstance(text, str):
        raise DataError(f"{place}: {text_column!r} is not a text but {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{place}: {text_column!r} is empty; leave it out")
    check_unicode(text, f"{place}: {text_column!r}")
    if set(fields) == {"metadata"} and isinstance(fields["metadata"], Mapping | None):
        fields = dict(fields["metadata"] or {})
    try:
        name = default_key if key is None else key_of(key, f"{place}: the key ({key_column!r})")
    except TypeError as error:
        raise DataError(str(error)) from error
    made: DocumentRow = {"key": name, "text": str(text), "metadata": checked_metadata(fields, place)}
    if ids is not None:
        if not isinstance(ids, list) or not all(type(item) is int for item in ids):
            raise DataError(f"{place}: 'input_ids' must be a list of integers")
        made["input_ids"] = ids
    return made


def report_lines(skipped: Sequence[Skipped]) -> list[str]:
    """Lines on what was left out, one for each reason with the first places; bad ones by themselves, ten at most."""
    groups: dict[str, list[str]] = {}
    bad = []
    for item in skipped:
        if item.bad:
            bad.append(item)
        else:
            groups.setdefault(item.reason, []).append(item.place)
    lines = []
    for reason, places in groups.items():
        more = ", ..." if len(places) > 3 else ""
        lines.append(f"skipped {len(places)} {reason}: {', '.join(places[:3])}{more}")
    lines += [f"skipped as bad: {item.reason}" for item in bad[:10]]
    if len(bad) > 10:
        lines.append(f"skipped as bad: {len(bad) - 10} more")
    return lines


def _digest(row: DocumentRow) -> bytes:
    content = json.dumps(row, sort_keys=True)
    return hashlib.sha256(content.encode()).digest()[:DIGEST_BYTES]
