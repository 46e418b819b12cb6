"""Documents as users keep them, and what is said where they cannot be read."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..json_object import JsonObject
from ..model.bounds_msa import check_json
from ..user_errors import UserError, reported

SUFFIXES = (".txt", ".md")
DIGEST_BYTES = 16


class Corpus:
    """Documents to encode: mappings, read again by every iteration.

    Args:
        source: a folder of texts, a `.jsonl`, or a directory that `datasets.save_to_disk` saved.
        text_column, key_column: names of the fields; None for `"text"` and `"key"`.

    Attributes:
        keys: key -> where its document is, for messages.
        sizes: of the texts, in bytes of UTF-8.
        skipped: files without text.

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
        self.skipped: set[str] = set()
        self.keys: dict[str, str] = {}
        self.sizes = array("q")
        self._digests = bytearray()
        self._starts: list[Any] = []  # from where `_rows` goes on
        for place, start, row in self._rows():
            self._check(place, row)
            key = row.get(self.key_column)
            key = str(len(self) if key is None else key)
            if key in self.keys:
                raise UserError(f"{place}: the key {key!r} is that of {self.keys[key]} already")
            self.keys[key] = place
            self.sizes.append(len(row[self.text_column].encode(errors="surrogatepass")))
            self._digests += _digest(row)
            self._starts.append(start)
        if not len(self):
            what = f"no {' or '.join(SUFFIXES)} file with text" if self._rows == self._folder_rows else "no documents"
            raise UserError(f"{source}: {what}")

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[JsonObject]:
        return (row for *_, row in self._rows())

    def read(self, first: int, end: int) -> Iterator[JsonObject]:
        """Documents `first` up to `end` (excluded), without reading those before.

        Raises:
            UserError: where they are not what they were when they were looked at.
        """
        rows = self._rows(self._starts[first:end])
        for number in range(first, end):
            place, _, row = next(rows, (str(self.path), None, {}))
            if _digest(row) != self.digest(number, number + 1):
                raise UserError(f"{place}: changed while it was encoded; run the command again")
            yield row

    def digest(self, first: int, end: int) -> bytes:
        """A digest that tells documents `first` up to `end` (excluded) from others."""
        return bytes(self._digests[DIGEST_BYTES * first : DIGEST_BYTES * end])

    def _check(self, place: str, row: JsonObject) -> None:
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

    def _folder_rows(self, starts: list[Path] | None = None) -> Iterator[tuple[str, Path, JsonObject]]:
        for path in sorted(self.path.rglob("*")) if starts is None else starts:
            if path.suffix.lower() in SUFFIXES and path.is_file():
                text = _decoded(path.read_bytes(), str(path))
                key = path.relative_to(self.path).as_posix()
                if text.strip():
                    yield str(path), path, {"key": key, "text": text}
                else:
                    self.skipped.add(key)

    def _json_rows(
        self, starts: list[tuple[int, int]] | None = None
    ) -> Iterator[tuple[str, tuple[int, int], JsonObject]]:
        def refuse(constant: str) -> NoReturn:
            raise ValueError(f"{constant} is not JSON")

        first, following = starts[0] if starts else (1, 0)
        with self.path.open("rb") as file:
            file.seek(following)
            for number, line in enumerate(file, start=first):
                offset, following = following, following + len(line)
                place = f"{self.path}, line {number}"
                try:
                    check_json(line)
                except ValueError as error:
                    raise UserError(f"{place}: {error}") from error
                text = _decoded(line, place)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text, parse_constant=refuse)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not valid JSON ({error})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place}: not a JSON object but {type(row).__name__}")
                yield place, (number, offset), row

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

    def _dataset_rows(self, starts: list[int] | None = None) -> Iterator[tuple[str, int, JsonObject]]:
        first = starts[0] if starts else 0
        rows = self._dataset if starts is None else self._dataset.select(starts)
        for number, row in enumerate(rows, start=first):
            yield f"{self.path}, row {number}", number, dict(row)


def _digest(row: JsonObject) -> bytes:
    content = json.dumps(row, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).digest()[:DIGEST_BYTES]


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start})") from error
