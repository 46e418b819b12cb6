"""`msa-hf encode --lexical`, `bank index` and `search`, end to end on a tiny model."""

import json
import shutil
from pathlib import Path

import fake_embedder
import pytest
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model

from msa_hf import MemoryBank
from msa_hf.cli import bank, encode, main, search
from msa_hf.retrieval import FusionWeights

pytest.importorskip("tantivy")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    model.config.routers_trained = True
    for item in (model, tokenizer, COMPACT):
        item.save_pretrained(root / "model")
    lines = [json.dumps({"key": f"k{number}", "text": text}) for number, text in enumerate(TEXTS)]
    (root / "documents.jsonl").write_text("\n".join(lines))
    assert main(["encode", str(root / "model"), str(root / "documents.jsonl"), str(root / "bank"), "--lexical"]) == 0
    return root


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding models by any name."""
    for module in (bank, encode, search):
        monkeypatch.setattr(module, "embedder_of", lambda name, device="cpu": name and fake_embedder.FakeEmbedder(name))


def found(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert main(["search", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_search(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = found(capsys, place / "bank", "the pine", "--mode", "lexical", "--k", 3)
    assert record["query"] == "the pine" and [hit["key"] for hit in record["hits"]] == ["k15"]
    assert record["hits"][0]["why"]["terms"] == ["pine"] and record["hits"][0]["text"] == TEXTS[15]
    two = found(capsys, place / "bank", "the pine", "cedar", "--model", place / "model", "--k", 4)
    assert [len(item["hits"]) for item in two] == [4, 4] and two[0]["hits"][0]["why"]["fused_by"] == "reciprocal ranks"
    assert {item["layer"] for item in two[1]["hits"][0]["why"]["layers"]} == {1, 3}
    FusionWeights(("lexical", "dense"), "lexical").save_pretrained(tmp_path)
    hybrid = [place / "bank", "the pine", "--model", place / "model", "--k", 4, "--fusion"]
    assert main(["search", *map(str, hybrid), str(tmp_path)]) == 2 and "--fusion reciprocal" in capsys.readouterr().err
    (record,) = found(capsys, *hybrid, "reciprocal")
    assert [hit["key"] for hit in record["hits"]] == [hit["key"] for hit in two[0]["hits"]]
    expected = MemoryBank.from_pretrained(place / "bank").search("cedar", 3, "lexical")
    (record,) = found(capsys, place / "bank", "cedar", "--mode", "lexical", "--k", 3)
    assert record["hits"] == [json.loads(json.dumps(hit.to_dict())) for hit in expected]
    capsys.readouterr()
    assert main(["search", str(place / "bank"), "cedar", "--mode", "lexical"]) == 0
    assert (
        capsys.readouterr().out.startswith("1. [2] k2 (")
        and main(["search", str(place / "bank"), "xyzzy", "--mode", "lexical"]) == 0
    )
    assert capsys.readouterr().out.endswith("bank: no document fits\n")


def test_ask_fuses_as_it_is_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights beside the bank that are for other ways are refused, and given way to on request."""
    copied = shutil.copytree(place / "bank", tmp_path / "bank")
    FusionWeights(("lexical", "dense"), "lexical").save_pretrained(copied)
    FusionWeights(("router", "lexical"), "lexical").save_pretrained(tmp_path)
    ask = ["ask", place / "model", copied, "pine", "--select", "hybrid", "--max-rounds", 1, "--max-new-tokens", 2]
    options: list[tuple[list[object], int]] = [([], 2), (["--fusion", "reciprocal"], 0), (["--fusion", tmp_path], 0)]
    for given, code in options:
        assert main([str(item) for item in [*ask, "--json", *given]]) == code
    said = capsys.readouterr()
    assert "for lexical, dense, but router, lexical were asked" in said.err and "--fusion reciprocal" in said.err
    sources = [[source["key"] for source in json.loads(line)["sources"]] for line in said.out.splitlines()]
    assert len(sources) == 2 and sources[1] == ["k15"]


def test_where(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    years = [1889, "1889", True, None, "a=b", 2022]
    rows = [{"key": str(number), "text": f"the pine {number}", "year": year} for number, year in enumerate(years)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = ["encode", place / "model", tmp_path / "rows.jsonl", tmp_path / "bank", "--lexical"]
    assert main([str(item) for item in made]) == 0
    for given, keys in (
        (["year=1889"], "01"),
        (["year=true"], "2"),
        (["year=null"], "3"),
        (["year=a=b"], "4"),
        (["year=1889", "year=2022"], "015"),
        (["year=1889", "other=x"], ""),
    ):
        options = [part for condition in given for part in ("--where", condition)]
        (record,) = found(capsys, tmp_path / "bank", "pine", "--mode", "lexical", *options)
        assert "".join(sorted(hit["key"] for hit in record["hits"])) == keys, given
    assert main(["search", str(tmp_path / "bank"), "pine", "--where", "year"]) == 2
    assert "'year' is not NAME=VALUE" in capsys.readouterr().err


def test_what_is_missing_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["cedar"], "needs two of router, lexical, dense or more; there is lexical"),
        (["cedar", "--mode", "router"], "--mode router needs --model"),
        (["cedar", "--mode", "dense"], "no vectors. Make them: `msa-hf bank index BANK --embedder MODEL`"),
        ([" ", "--mode", "lexical"], "Query 0 is ' '"),
        (["cedar", "--fusion", str(place)], "fusion.json"),
    ):
        capsys.readouterr()
        assert main(["search", str(place / "bank"), *arguments]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("msa-hf: error: ") and message in error


def test_a_bank_is_given_indexes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(place / "model"), str(place / "documents.jsonl"), str(tmp_path / "bank")]
    assert main(["bank", "add", arguments[0], *arguments[:0:-1], "--lexical", "german"]) == 0
    capsys.readouterr()
    assert main(["bank", "index", str(tmp_path / "bank"), "--embedder", "fake", "--json"]) == 0
    indexes = json.loads(capsys.readouterr().out)
    assert indexes["lexical"]["language"] == "german" and indexes["dense"]["vectors"] == len(TEXTS)
    (record,) = found(capsys, tmp_path / "bank", TEXTS[4], "--embedder", "fake", "--k", 1)
    assert record["hits"][0]["key"] == "k4" and record["hits"][0]["why"]["dense"]["rank"] == 1
    # Encoded anew, what is kept with it follows; and so it does when documents are deleted.
    assert main(["encode", *arguments, "--embedder", "fake"]) == 0
    assert main(["bank", "delete", str(tmp_path / "bank"), "k4"]) == 0
    assert main(["bank", "stat", str(tmp_path / "bank")]) == 0
    printed = capsys.readouterr().out
    assert "lexical index: language german" in printed and "dense index: model fake, current True" in printed
    (record,) = found(capsys, tmp_path / "bank", TEXTS[4], "--embedder", "fake", "--k", 1)
    assert record["hits"][0]["key"] != "k4"
    assert main(["bank", "index", str(place / "bank")]) == 0
    assert "lexical index: language english, documents 18" in capsys.readouterr().out
