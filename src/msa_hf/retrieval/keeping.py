"""Giving a bank that is there what `search` needs: a lexical index, vectors."""

from __future__ import annotations

from pathlib import Path

from ..json_object import JsonObject
from ..model.memory_msa import MemoryBank
from .dense import PASSAGE_CHARACTERS, DenseSearcher, VectorMaker, probe
from .dense_files import has_vectors
from .embedders import Embedder
from .lexical_files import read_record, search_in_memory
from .rows import rows_of_bank


def add_lexical_index(bank: MemoryBank | str | Path, language: str = "english", sole_writer: bool = False) -> None:
    """Make a lexical index of a bank's texts: in memory, or for a directory, kept in it from now on.

    Args:
        sole_writer: of a directory, as of `BankStore`.

    Raises:
        ImportError: where tantivy is missing.
        ValueError: for a directory that has an index of another language.
    """
    if isinstance(bank, MemoryBank):
        bank.indexes["lexical"] = search_in_memory(rows_of_bank(bank), language)
    else:
        keep_indexes(bank, lexical=language, sole_writer=sole_writer)


def add_vectors(
    bank: MemoryBank | str | Path,
    embedder: Embedder,
    characters: int | None = PASSAGE_CHARACTERS,
    sole_writer: bool = False,
) -> None:
    """Embed a bank's texts: in memory, or for a directory, kept in it from now on.

    Args:
        characters: of a passage, each of which has a vector; None: one vector per document. In memory alone; a
            directory has the default.
        sole_writer: of a directory, as of `BankStore`.

    Raises:
        ValueError: for a directory that has vectors of another model.
    """
    if not isinstance(bank, MemoryBank):
        keep_indexes(bank, embedder=embedder, sole_writer=sole_writer)
        return
    rows, fingerprint = rows_of_bank(bank), probe(embedder)
    maker = VectorMaker(embedder, characters, len(fingerprint[0]))
    vectors = maker.make(rows.rows, rows.documents.texts())
    bank.indexes["dense"] = DenseSearcher([vectors], len(fingerprint[0]), embedder.name, embedder, fingerprint)


def keep_indexes(
    directory: str | Path,
    lexical: bool | str | None = None,
    embedder: Embedder | None = None,
    sole_writer: bool = False,
) -> JsonObject:
    """Bring what is kept with the bank of a directory up to date, and make what is asked for and not there.

    Args:
        lexical: True or a language, as of `BankStore`; None: where the bank has an index.
        embedder: as of `BankStore`; None: vectors of a bank that has some follow where no text is new.
        sole_writer: as of `BankStore`.

    Returns:
        `BankStore.stat()["indexes"]`.

    Raises:
        RuntimeError: where one could not be brought up to date.
    """
    path = Path(directory)
    if not lexical and embedder is None and read_record(path) is None and not has_vectors(path):
        return {}
    from ..bank import BankStore  # here, because banks that change keep indexes

    with BankStore(None, path, lexical=lexical, embedder=embedder, sole_writer=sole_writer) as store:
        found: JsonObject = store.stat()["indexes"]
    for name, about in found.items():
        if not about.get("current", True):
            raise RuntimeError(f"{path}: the {name} index could not be brought up to date; the log says why.")
    return found
