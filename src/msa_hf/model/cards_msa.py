"""Cards: the README.md of a checkpoint or a bank, written here and never over one that a person wrote or changed."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import DatasetCard, ModelCard, ModelCardData

CARD = "README.md"
MOST_BYTES = 2**20  # of a card that is read
TAG = "msa_hf"
_MARK = "\n<!-- Written by msa_hf ({}), which replaces this card as long as nobody changes it. -->\n"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z")


def signed(card: DatasetCard | ModelCard) -> str:
    """The text of a card, with a mark by which it is known again as long as nobody changes it."""
    text = str(card).rstrip("\n") + "\n"
    return text + _MARK.format(_digest(text))


def is_ours(path: Path) -> bool:
    """Tell whether a card is as `signed` made it; not so where nothing lies there, or what cannot be read."""
    text = read_card(path)
    found = None if text is None else _MARKED.search(text)
    return text is not None and found is not None and found[1] == _digest(text[: found.start()])


def is_made_by_transformers(path: Path) -> bool:
    """Tell whether a card is the empty one that transformers makes, as where a tokenizer is pushed first."""
    text = read_card(path)
    if text is None or "[More Information Needed]" not in text:
        return False
    try:
        said = "This is the model card of a 🤗 transformers model that has been pushed on the Hub."
        said += " This model card has been automatically generated."
        empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=said)
    except ImportError:  # of jinja2, with which it was made
        return False
    added = metadata_of(path).keys() - {"library_name", "tags"}
    return not added and ModelCard(text, ignore_metadata_errors=True).text.strip() == empty.text.strip()


def write_card(directory: Path, text: str) -> bool:
    """Write a card into a directory, unless another one lies there than `signed` made; returns whether it did."""
    path = directory / CARD
    if path.is_symlink() or (path.exists() and not is_ours(path)):
        return False
    path.write_text(text, encoding="utf-8", newline="\n")
    return True


def read_card(path: Path) -> str | None:
    """The text of a card, None where there is none that can be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError):
        return None


def metadata_of(path: Path) -> Mapping[str, object]:
    """The metadata of a card; empty where there are none, or none that can be read."""
    text = read_card(path)
    if text is None or not text.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a stranger's YAML: whatever is wrong with it, it says nothing
        return {}


def table(rows: Mapping[str, object]) -> str:
    """A table of two columns in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
