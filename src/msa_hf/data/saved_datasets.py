"""Datasets that `datasets.save_to_disk` saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..json_object import JsonObject
from ..user_errors import reported
from .errors import DataError
from .files import Found, Rows

FILES = ("state.json", "dataset_dict.json")


class Dataset(Protocol):
    """Of the library `datasets`."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[JsonObject]: ...
    def select(self, indices: range) -> Dataset: ...


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a directory is a saved dataset."""
    return any((path / name).is_file() for name in FILES)


def saved_dataset(path: Path, split: str | None) -> Rows:
    """A reader of a saved dataset, or of one of its splits.

    Raises:
        DataError: where the library is missing, the dataset cannot be loaded, or it is not told which split is meant.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: reading a saved dataset needs `pip install datasets`") from error
    with reported(foreign=True):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(map(str, loaded))
        if split is None:
            raise DataError(f"{path}: holds the splits {names}; give --split NAME or the directory of one")
        if split not in loaded:
            raise DataError(f"{path}: holds the splits {names}, none that is called {split!r} (--split)")
        loaded = loaded[split]
    elif split is not None:
        raise DataError(f"{path}: is a dataset without splits; leave out --split {split}")
    dataset: Dataset = loaded

    def read(path: Path, encoding: str | None, first: int = 0) -> Iterator[Found]:
        rows = dataset.select(range(first, len(dataset)))
        return (Found(number, dict(row)) for number, row in enumerate(rows, start=first))

    return Rows(read, "row")
