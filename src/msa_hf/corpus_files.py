"""Documents as users keep them, and what is said where they cannot be read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

SUFFIXES = (".txt", ".md")


class UserError(Exception):
    """A mistake of the user; the message is all that is shown."""


@contextlib.contextmanager
def reported(foreign: bool = False, subject: str = "") -> Iterator[None]:
    """Turn the errors that tell a user what is wrong into `UserError`.

    Args:
        subject: what the message begins with, for errors that do not say what they are about.
        foreign: also a `ValueError` that another library raised, as for a checkpoint that transformers cannot read.
            Without it only those of this package count: elsewhere they are faults, which keep their traceback.
    """
    opening = f"{subject}: " if subject else ""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{opening}{error}") from error
    except ValueError as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        home = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
        if not foreign and home.partition(".")[0] != "msa_hf":
            raise
        raise UserError(f"{opening}{error}") from error


class Corpus:
    """Documents to encode: mappings, read again by every iteration.

    Args:
        source: a folder of texts, a `.jsonl`, or a directory that `datasets.save_to_disk` saved.
        text_column, key_column: names of the fields; None for `"text"` and `"key"`.

    Raises:
        UserError: for what cannot be read, naming file and line; everything is looked at before anything is encoded.
    """

    def __init__(self, source: str, text_column: str | None = None, key_column: str | None = None) -> None:
        self.path = Path(source)
        self.text_column, self.key_column = text_column or "text", key_column or "key"
        self._key_required = key_column is not None
        if not self.path.exists():
            raise UserError(f"{source}: no such file or directory")
        if self.path.is_dir() and any((self.path / name).exists() for name in ("state.json", "dataset_dict.json")):
            self._rows: Any = self._dataset_rows
            self._dataset = self._load_dataset()
        elif self.path.is_dir():
            self._rows = self._folder_rows
            self.text_column, self.key_column = "text", "key"
        elif self.path.suffix == ".jsonl":
            self._rows = self._json_rows
        else:
            raise UserError(f"{source}: not a folder of {' and '.join(SUFFIXES)}, a .jsonl or a saved dataset")
        self.skipped: set[str] = set()  # files without text
        keys: dict[str, str] = {}
        self._count = 0
        for place, row in self._rows():
            self._check(place, row)
            key = row.get(self.key_column)
            key = str(self._count if key is None else key)
            if key in keys:
                raise UserError(f"{place}: the key {key!r} is that of {keys[key]} already")
            keys[key] = place
            self._count += 1
        if not self._count:
            what = f"no {' or '.join(SUFFIXES)} file with text" if self._rows == self._folder_rows else "no documents"
            raise UserError(f"{source}: {what}")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self._rows())

    def _check(self, place: str, row: dict[str, Any]) -> None:
        names = ", ".join(row) or "none"
        if self.text_column not in row:
            raise UserError(f"{place}: no field {self.text_column!r} (--text-column); there are: {names}")
        if self._key_required and self.key_column not in row:
            raise UserError(f"{place}: no field {self.key_column!r} (--key-column); there are: {names}")
        text = row[self.text_column]
        if not isinstance(text, str):
            raise UserError(f"{place}: {self.text_column!r} is not a text but {type(text).__name__}")
        if not text.strip():
            raise UserError(f"{place}: {self.text_column!r} is empty; leave it out")

    def _folder_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self.path.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                text = _decoded(path.read_bytes(), str(path))
                key = path.relative_to(self.path).as_posix()
                if text.strip():
                    yield str(path), {"key": key, "text": text}
                else:
                    self.skipped.add(key)

    def _json_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        def refuse(constant: str) -> NoReturn:
            raise ValueError(f"{constant} is not JSON")

        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{self.path}, line {number}"
                text = _decoded(line, place)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text, parse_constant=refuse)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place}: not a JSON object but {type(row).__name__}")
                yield place, row

    def _load_dataset(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{self.path}: reading a saved dataset needs `pip install datasets`") from None
        with reported(foreign=True):
            dataset = datasets.load_from_disk(str(self.path))
        if isinstance(dataset, datasets.DatasetDict):
            raise UserError(f"{self.path}: holds the splits {', '.join(dataset)}; give the directory of one")
        return dataset

    def _dataset_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(self._dataset):
            yield f"{self.path}, row {number}", dict(row)


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start})") from error
