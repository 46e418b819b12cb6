"""Words find the needles that share none with other documents."""

from pathlib import Path

import pytest
from scripted import byte_tokenizer

ROOT = Path(__file__).parents[2]


def test_words_alone_find_needles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tantivy")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import needle_words

    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = [f"{number} ships left in May. They came back in June, all but {number}." for number in range(120)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    needle_words.main(
        f"--tokenizer {tmp_path}/model --text {tmp_path}/texts.txt --sizes 3K,6K --depths 1 --repeats 1 "
        "--document-tokens 150".split()
    )
    rows = {tuple(line.split()[0:3:2]): line.split()[3:] for line in capsys.readouterr().out.splitlines()[1:]}
    for tokens in ("3K", "6K"):
        assert rows[tokens, "single"] == ["3"] * 6
        assert rows[tokens, "multi_query"][:3] == ["3", "0", "0"] and rows[tokens, "multi_query"][-1] == "3"
