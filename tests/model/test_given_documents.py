"""Documents as users hold them in Python: what becomes of them, and what is refused before a model runs."""

import datetime
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fake_model import FakeModel

from msa_hf.bank import BankStore
from msa_hf.data import read_documents
from msa_hf.model.encoding_msa import _Reader
from msa_hf.model.given_documents_msa import each_document
from msa_hf.model.metadata_msa import checked_metadata
from msa_hf.model.tokenizing_msa import tokenize_texts

ROWS = [{"key": "a", "text": "one", "n": 1}, {"key": "b", "text": "two", "n": 2}]


@dataclass
class LangChain:
    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass
class LlamaIndex:
    text: str
    id_: str
    metadata: dict[str, Any] = field(default_factory=dict)


def looked_at(documents: Any) -> list[tuple[str, str | None, Any]]:
    """Key, text and metadata as the encoder has them."""
    reader = _Reader(None, 10, "error", 4, False, "text", "key")
    return [
        (item.key, item.text, item.metadata)
        for item in (reader._fields(number, document) for number, document in enumerate(each_document(documents)))
    ]


def stored(documents: Any) -> list[tuple[str, str | None, Any]]:
    with BankStore(FakeModel(), None) as bank:  # type: ignore[arg-type]
        bank.add(documents)
        return [(item.key, item.text, item.metadata) for item in bank.snapshot().documents]


def read(documents: Any) -> list[tuple[str, str | None, Any]]:
    return [(row["key"], row["text"], row["metadata"] or None) for row in read_documents(documents)]


WAYS = pytest.mark.parametrize("way", [looked_at, stored, read])
SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas with an index": lambda: pd.DataFrame(ROWS).set_index("key"),
    "arrow": lambda: pa.Table.from_pylist(ROWS),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "streamed": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "langchain": lambda: [LangChain(row["text"], {"n": row["n"]}, row["key"]) for row in ROWS],
    "llamaindex": lambda: [LlamaIndex(row["text"], row["key"], {"n": row["n"]}) for row in ROWS],
}


@WAYS
@pytest.mark.parametrize("source", SOURCES)
def test_collections(way: Callable[[Any], Any], source: str) -> None:
    assert way(SOURCES[source]()) == [("a", "one", {"n": 1}), ("b", "two", {"n": 2})]


@WAYS
def test_polars(way: Callable[[Any], Any]) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame([{**row, "list": [{"x": 1}]} for row in ROWS])
    assert way(frame) == [(row["key"], row["text"], {"n": row["n"], "list": [{"x": 1}]}) for row in ROWS]
    with pytest.raises(TypeError, match=r"LazyFrame; pass what its collect\(\) returns"):
        way(frame.lazy())


@WAYS
@pytest.mark.parametrize(
    "texts",
    [
        lambda: np.array(["x", "y"]),
        lambda: np.array(["x", "y"], dtype=object),
        lambda: pd.Series(["x", "y"]),
        lambda: ("x", "y"),
        lambda: {"1": "x", "2": "y"}.values(),
        lambda: map(str, "xy"),
    ],
    ids=["array", "objects", "series", "tuple", "values", "map"],
)
def test_texts(way: Callable[[Any], Any], texts: Callable[[], Any]) -> None:
    found = way(texts())
    assert found == [("0", "x", None), ("1", "y", None)] and {type(text) for _, text, _ in found} == {str}


@pytest.mark.parametrize("way", [stored, read])  # of the encoder this is asked in tests/cli
def test_paths(way: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.jsonl").write_text('{"key": "k", "text": "beta"}')
    assert way(tmp_path) == way([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert way(tmp_path) == [("a.txt", "alpha", None), ("k", "beta", None)]


@WAYS
@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (lambda: {"a": "text"}, "got one dict; put it in a list, or a mapping"),
        (lambda: LangChain("x"), "got one LangChain; put it in a list"),
        (lambda: LlamaIndex("x", "k"), "got one LlamaIndex; put it in a list"),
        (lambda: b"x", "got one bytes"),
        (lambda: {"x"}, "a set, which has no order"),
        (lambda: io.StringIO("x"), "an open file; pass the pathlib.Path"),
        (lambda: 5, "must be an iterable of documents, got int"),
        (lambda: None, "must be an iterable of documents, got NoneType"),
        (lambda: np.array([["x", "y"]]), r"an array of shape \(1, 2\)"),
        (lambda: np.array(3), r"an array of shape \(\)"),
        (
            lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)),
            r"has the splits train, test; give one of them, as documents\['train'\]",
        ),
    ],
    ids=["dict", "langchain", "llamaindex", "bytes", "set", "file", "int", "none", "2d", "0d", "splits"],
)
def test_what_is_no_collection_is_refused(
    way: Callable[[Any], Any], documents: Callable[[], Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        way(documents())


@pytest.mark.parametrize("way", [looked_at, stored])
def test_one_text_is_no_collection_and_no_path(way: Callable[[Any], Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got one str; put it in a list"):
        way("a text")
    with pytest.raises(TypeError, match=r"got one str; pass pathlib.Path"):
        way(str(tmp_path))


@WAYS
def test_gaps_of_pandas_are_none(way: Callable[[Any], Any]) -> None:
    frame = pd.DataFrame(
        {
            "text": ["x", "y"],
            "f": [1.5, float("nan")],
            "d": [pd.Timestamp("2020-01-02"), pd.NaT],
            "s": ["a", None],
            "i": pd.array([1, None], dtype="Int64"),
        }
    )
    first, second = way(frame)
    assert first[2] == {"f": 1.5, "d": "2020-01-02T00:00:00", "s": "a", "i": 1}
    assert second[2] == dict.fromkeys("fdsi")
    with pytest.raises(ValueError, match="two columns of the same name"):
        way(pd.DataFrame([["x", "y"]], columns=["text", "text"]))
    with pytest.raises((TypeError, ValueError), match=r"got float: 1\.0"):  # what pandas makes of 1 beside a gap
        way(pd.DataFrame({"key": [1, None], "text": ["x", "y"]}))


@WAYS
@pytest.mark.parametrize("key", [True, 1.0, ["a"], ("a",), {"a": 1}, b"a", "", "\ud800"], ids=repr)
def test_keys_that_are_none(way: Callable[[Any], Any], key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"key.* is (a string, or an integer|empty|not Unicode)"):
        way([{"key": key, "text": "x"}])


@pytest.mark.parametrize("way", [stored, read])
def test_one_and_its_text_are_the_same_key(way: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="the key '1'"):
        way([{"key": 1, "text": "x"}, {"key": "1", "text": "y"}])
    assert way([{"key": np.int64(3), "text": "x"}, {"key": np.str_("s"), "text": "y"}]) == [
        ("3", "x", None),
        ("s", "y", None),
    ]


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC), "2020-01-02T00:00:00+00:00"),
        (datetime.time(3, 4), "03:04:00"),
        (np.datetime64("2020-01-02"), "2020-01-02"),
        (np.float32(1.5), 1.5),
        (np.bool_(True), True),
        (np.array([[1], [2]]), [[1], [2]]),
        ({"a": (1, None)}, {"a": [1, None]}),
        (10**30, 10**30),
    ],
    ids=repr,
)
def test_metadata_that_is_kept(value: Any, kept: Any) -> None:
    (found,) = checked_metadata({"m": value}, "Document 0").values()
    assert found == kept and type(found) is type(kept)


@WAYS
@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("-inf"),
        np.float32("nan"),
        np.array([float("nan")]),
        pd.NaT,
        pd.NA,
        np.datetime64("NaT"),
        b"x",
        {1, 2},
        {1: "a", "1": "b"},
        {None: 1},
        object(),
        "\udc80",
        {"\ud83d": 1},
        CYCLE,
        {"deep": [{"a": float("nan")}]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_metadata_that_is_refused(way: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ValueError, match=r"Document '?0'?: its metadata cannot be written as JSON: .*"):
        way([{"text": "x", "m": value}])


def test_metadata_that_no_reader_would_take_is_refused() -> None:
    with pytest.raises(ValueError, match="so many values"):
        checked_metadata({"m": [{}] * 400_000}, "Document 0")


@pytest.mark.parametrize(
    "bad", ["half \ud83d", {"text": "x", "m": float("nan")}, {"text": 3}, {"key": 1.0, "text": "x"}]
)
def test_nothing_is_encoded_before_all_was_looked_at(bad: Any) -> None:
    from msa_hf.model.encoding_msa import encode_documents

    class NotAsked:
        class config:
            max_position_embeddings, chunk_size, vocab_size, memory_layers = 64, 4, 10, [0]
            prefix_token_ids: tuple[int, ...] = ()

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the model was asked for its {name}")

    with pytest.raises((TypeError, ValueError), match="Document 300"):
        encode_documents(NotAsked(), [*([5] for _ in range(300)), bad], bank_device="cpu")  # type: ignore[arg-type]


def test_a_bank_is_as_before_where_a_document_is_refused() -> None:
    model = FakeModel()
    with BankStore(model, None) as bank:  # type: ignore[arg-type]
        bank.upsert("a", "one")
        for change in (
            lambda: bank.add(["new", "half \ud83d"]),
            lambda: bank.upsert("b", "x", metadata={"m": float("nan")}),
            lambda: bank.upsert("b", "x", metadata={1: 2}),  # type: ignore[dict-item]
            lambda: bank.upsert("", "x"),
            lambda: bank.upsert(None, "x"),  # type: ignore[arg-type]
            lambda: bank.delete("\ud800"),
            lambda: bank.add([5, 6]),
        ):
            with pytest.raises((TypeError, ValueError)):
                change()
        assert [item.key for item in bank.snapshot().documents] == ["a"] and "new" not in model.encoded


def test_what_is_tokenized_is_unicode() -> None:
    """Questions, too, wherever they come from."""
    with pytest.raises(ValueError, match="not Unicode"):
        tokenize_texts(None, ["ok", "half \ud83d"])  # type: ignore[arg-type]


def test_a_generator_is_read_once() -> None:
    reads = []

    def documents() -> Iterator[str]:
        reads.append(1)
        yield from ("x", "y")

    assert looked_at(documents()) and reads == [1]
