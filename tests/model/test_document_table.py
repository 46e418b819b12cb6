"""The documents of a bank as a sequence."""

import random

import numpy as np
import pyarrow as pa
import pytest

from msa_hf.model.bank_format_msa import BankFormatError
from msa_hf.model.document_table_msa import Document, DocumentTable


def documents(count: int) -> list[Document]:
    return [
        Document(
            f"k{n}", None if n % 5 == 0 else f"text {n}", {"n": n} if n % 3 else None, 1 + n, 1, n if n % 2 else None
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_reads_like_a_list(seed: int, stored: bool) -> None:
    pick = random.Random(seed)
    count = pick.randint(1, 30)
    rows = (
        documents(count) if not stored else [Document(f"k{n}", f"text {n}", {"n": n}, 1, 1, n, n) for n in range(count)]
    )
    deleted = sorted(pick.sample(range(count), pick.randint(0, count - 1)))
    wanted = [row for number, row in enumerate(rows) if number not in deleted]
    table = DocumentTable(rows)
    found = DocumentTable(table.to_arrow() if stored else rows, np.array(deleted, np.int64))
    assert len(found) == len(wanted) and list(found) == wanted
    for index in range(-len(wanted), len(wanted)):
        assert found[index] == wanted[index]
    for _ in range(5):
        positions = pick.choices(range(len(wanted)), k=pick.randint(0, 12))
        assert found.at(positions) == [wanted[position] for position in positions]
        part = slice(
            *(pick.choice([None, *range(-count - 2, count + 3)]) for _ in range(2)), pick.choice([None, 2, -1])
        )
        assert found[part] == wanted[part]
    for wrong in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            found[wrong]
    for positions in ([0, len(wanted)], [-1]):
        with pytest.raises(IndexError, match="no positions"):
            found.at(positions)


def test_damaged_rows_are_not_followed() -> None:
    """The offset between two texts points out of the file; the others can be read."""
    table = DocumentTable([Document(f"k{n}", f"text {n}", None, 1, 1) for n in range(4)]).to_arrow()
    text = table["text"].combine_chunks()
    text = text.chunk(0) if isinstance(text, pa.ChunkedArray) else text
    offsets = np.frombuffer(text.buffers()[1], np.int32 if text.type == pa.string() else np.int64).copy()
    offsets[2] += 1 << 20
    broken = pa.Array.from_buffers(text.type, len(text), [None, pa.py_buffer(offsets), text.buffers()[2]])
    found = DocumentTable(table.set_column(table.column_names.index("text"), "text", broken))
    assert [document.text for document in found.at([3, 0])] == ["text 3", "text 0"]
    for positions in ([1], [2], [0, 3, 1]):
        with pytest.raises(BankFormatError, match="damaged"):
            found.at(positions)
