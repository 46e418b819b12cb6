"""A place with checkpoints, documents and banks, for the tests of all commands."""

from pathlib import Path

import pytest
from commands import TEXTS, tokenizer_of_words
from families import base_model

from msa_hf.cli import main
from msa_hf.generation import COMPACT


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a retrofit of it with and one without a protocol, a folder of documents and a bank by either."""
    root = tmp_path_factory.mktemp("cli")
    base_model("qwen3").save_pretrained(root / "base")
    tokenizer_of_words().save_pretrained(root / "base")
    for name, text in TEXTS.items():
        (root / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "docs" / name).write_text(text)
    (root / "docs" / "notes.csv").write_text("not a document")
    for name in ("plain", "compact"):
        assert main(["retrofit", str(root / "base"), str(root / name), "--chunk-size", "4", "--top-k", "2"]) == 0
        if name == "compact":
            COMPACT.save_pretrained(root / name)
        assert main(["encode", str(root / name), str(root / "docs"), str(root / f"{name}-bank")]) == 0
    return root
