"""A small world of notes, a tokenizer of its words, and a tiny base."""

import itertools
import random
from pathlib import Path

from families import base_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NOTES, GROUPS, WORDS = 96, 16, 12
COMMON = [
    *("the", "a", "of", "and", "in", "it", "was", "is", "by", "with"),
    *("for", "note", "about", "then", "they", "made", "some", "old", "new"),
]
TOPIC = [[f"w{group}x{number}" for number in range(WORDS)] for group in range(GROUPS)]


def notes(seed: int = 0) -> dict[str, str]:
    """Key -> a title and four sentences on one topic, most of them in other words of it."""
    pick = random.Random(seed)
    found = {}
    for number in range(NOTES):
        own = TOPIC[number % GROUPS]
        sentences = []
        for _ in range(4):
            said = [*pick.sample(own, 3), *pick.sample(COMMON, 3)]
            pick.shuffle(said)
            sentences.append(" ".join(said) + " .")
        found[f"note{number}"] = f"# {' '.join(pick.sample(own, 2))}\n" + " ".join(sentences)
    return found


def tokenizer_of_notes() -> PreTrainedTokenizerFast:
    listed = ["<pad>", "<unk>", "<eos>", ".", "#", ":", "\n", "Question", "Answer", "[", "]", "-", *"0123456789"]
    words = Tokenizer(
        models.WordLevel(
            {word: place for place, word in enumerate([*listed, *COMMON, *itertools.chain(*TOPIC)])}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def save_base(directory: Path) -> Path:
    shape = {"hidden_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 2}
    base_model("llama", vocab_size=300, **shape).save_pretrained(directory)
    tokenizer_of_notes().save_pretrained(directory)
    return directory


def save_notes(directory: Path, texts: dict[str, str] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for key, text in (notes() if texts is None else texts).items():
        (directory / f"{key}.md").write_text(text, encoding="utf-8")
    return directory
