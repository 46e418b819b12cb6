"""Documents of files as commands take them: keys, what is bad, several sources, and reading again."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from msa_hf.data import Corpus, DataError, read_documents
from msa_hf.data.documents import report_lines


def written(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["null", "1", '"1"'], "line 3: the key '1' is that of .*line 2 already"),
        (["null", '"0"'], "line 2: the key '0' is that of .*line 1 already"),
        (["true"], "line 1: the key .* got bool: True"),
        (["1.0"], "got float: 1.0"),
        (["[1]"], r"got list: \[1\]"),
        (['""'], "is empty"),
        (['"\\ud800"'], "is not Unicode"),
    ],
    ids=str,
)
def test_keys_are_texts_or_integers_and_differ(tmp_path: Path, keys: list[str], message: str) -> None:
    rows = [f'{{"text": "t{number}", "key": {key}}}' for number, key in enumerate(keys)]
    with pytest.raises(DataError, match=message):
        Corpus(written(tmp_path / "rows.jsonl", *rows))
    good = Corpus(written(tmp_path / "rows.jsonl", *rows, '{"text": "x", "key": "good"}'), skip_bad=True)
    assert "good" in good.keys and any(item.bad for item in good.skipped)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ('{"a": [1, {"b": null}]}', True),
        ("NaN", False),
        ("1e999", False),
        ('"\\udc80"', False),
        ('{"\\ud83d": 1}', False),
        ("[" * 99 + "]" * 99, False),
        ("1" * 30, True),
    ],
    ids=["nested", "nan", "infinite", "half", "half-name", "deep", "large"],
)
def test_metadata_is_looked_at_first(tmp_path: Path, value: str, kept: bool) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a"}', f'{{"text": "b", "m": {value}}}')
    if kept:
        assert list(Corpus(path))[1]["metadata"] == {"m": json.loads(value)}
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl, line 2: "):
            Corpus(path)


def test_bad_ones_are_left_out_and_named(tmp_path: Path) -> None:
    rows = ['{"text": "a"}', "{", '{"text": "half \\ud83d"}', '{"body": "b"}', '{"text": " "}', '{"text": "c"}']
    written(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"latin.txt: not UTF-8"):
        Corpus(tmp_path)
    corpus = Corpus(tmp_path, skip_bad=True)
    assert [row["text"] for row in corpus] == ["b", "a", "c"] == [row["text"] for row in corpus.read(0, 3)]
    said = "\n".join(report_lines(corpus.skipped))
    assert said.count("skipped as bad") == 5
    for part in (
        "latin.txt: not UTF-8",
        "line 2: not valid",
        "line 3: 'text' is not Un",
        "line 4: no field",
        "line 5: ",
    ):
        assert part in said
    with pytest.raises(DataError, match="no documents, skipped as bad"):
        Corpus(written(tmp_path / "bad.jsonl", "{"), skip_bad=True)


def test_what_is_cut_off_ends_where_it_ends(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}, {"te')
    corpus = Corpus(tmp_path / "a.json", skip_bad=True)
    assert [row["text"] for row in corpus] == ["a", "b"] and len(corpus.skipped) == 1
    assert [row["text"] for row in corpus.read(1, 2)] == ["b"]


def test_rows_in_folders_are_named_after_their_file(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", '{"text": "one"}', '{"text": "two", "key": "own"}')
    (tmp_path / "a.txt").write_text("a")
    corpus = Corpus(tmp_path)
    assert [row["key"] for row in corpus] == ["a.txt", "b.jsonl:1", "own"]
    assert corpus.nameless == f"{tmp_path / 'b.jsonl'}, line 1" and Corpus(tmp_path / "a.txt").nameless is None
    assert [corpus.place(number).removeprefix(f"{tmp_path}/") for number in range(3)] == [
        "a.txt",
        "b.jsonl, line 1",
        "b.jsonl, line 2",
    ]


def test_several_sources_are_one_corpus(tmp_path: Path) -> None:
    rows = written(tmp_path / "b.jsonl", '{"text": "one"}', '{"text": "two"}')
    (tmp_path / "a.txt").write_text("a")
    found = read_documents([tmp_path / "a.txt", rows])
    assert [(row["key"], row["text"]) for row in found] == [("a.txt", "a"), ("1", "one"), ("2", "two")]
    with pytest.raises(DataError, match=r"the key 'a\.txt' is that of"):
        read_documents([tmp_path / "a.txt", tmp_path / "a.txt"])


def test_a_changed_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    written(tmp_path / "b.jsonl", '{"text": "one"}', '{"text": "two"}')
    corpus = Corpus(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: changed while"):
        list(corpus.read(0, 1))
    for rows in (['{"text": "one"}', "{"], ['{"text": "one"}'], ['{"text": "one"}', "", '{"text": "two"}']):
        written(tmp_path / "b.jsonl", *rows)
        with pytest.raises(DataError, match=r"b\.jsonl, line 2: changed while"):
            list(corpus.read(2, 3))


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(300):
            file.write(json.dumps({"text": f"{number} " * 20_000}) + "\n")
    size = (tmp_path / "rows.jsonl").stat().st_size
    tracemalloc.start()
    corpus = Corpus(tmp_path / "rows.jsonl")
    assert sum(len(row["text"]) for first in range(0, 300, 10) for row in corpus.read(first, first + 10)) > size * 0.9
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 8


def test_splits_of_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="holds the splits train, test; give --split NAME"):
        Corpus(tmp_path / "splits")
    with pytest.raises(DataError, match="none that is called 'dev'"):
        Corpus(tmp_path / "splits", split="dev")
    assert [row["text"] for row in Corpus(tmp_path / "splits", split="test")] == ["test"]
    assert [row["text"] for row in Corpus(tmp_path / "splits" / "train")] == ["train"]
    for path in (tmp_path / "splits" / "train", written(tmp_path / "a.jsonl", '{"text": "a"}')):
        with pytest.raises(DataError, match="--split"):
            Corpus(path, split="train")


def test_tokens_of_a_dataset_are_kept_beside_the_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows: list[dict[str, Any]] = [{"text": "a", "input_ids": [5, 6], "attention_mask": [1, 1], "n": 1}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    assert list(Corpus(tmp_path / "rows")) == [{"key": "0", "text": "a", "metadata": {"n": 1}, "input_ids": [5, 6]}]
    with pytest.raises(DataError, match="'input_ids' must be a list of integers"):
        Corpus(written(tmp_path / "a.jsonl", '{"text": "a", "input_ids": ["x"]}'))


def test_other_documents_are_read_by_the_same_entry() -> None:
    found = read_documents([{"id": "a", "body": "x", "n": 1}, {"body": "y"}], text_column="body", key_column="id")
    assert list(found) == [
        {"key": "a", "text": "x", "metadata": {"n": 1}},
        {"key": "1", "text": "y", "metadata": {}},
    ]
    with pytest.raises(TypeError, match="glob: only for files"):
        read_documents(["a"], glob="*")
    with pytest.raises(DataError, match="Document 1 has the key '0', which an earlier"):
        list(read_documents(["a", {"key": 0, "text": "b"}]))
    with pytest.raises(DataError, match=r"Document 0 has no field 'text'.*there are: body"):
        list(read_documents([{"body": "x"}]))
