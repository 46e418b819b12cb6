"""Training rows of `msa-hf-tiny` about needles: one value or several, and keys of which nothing is said.

Most corpora have keys, values and wordings of their own, of words that mean nothing together. So a value is copied and
not recognized, whatever its words are, and a question is answered by its key, however it is put.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tiny_chains import ChainRows
from tiny_rows import Row, encode_all

from msa_hf.synthetic.hashing import derive_key
from msa_hf.synthetic.needle_corpora import NeedleCorpus, NeedleQuestion
from msa_hf.synthetic.needle_wordings import Wording, words_of
from msa_hf.synthetic.needles import VALUES
from msa_hf.synthetic.words import Words

OWN_WORDS = 0.75  # of the corpora, which have words of their own
OWN_WORDINGS = 0.7
PROSE_SHARES = (0.2, 0.6, 0.9)
KEYS = 32  # words that keys of a corpus begin with, and as many that they end with
ASKING = ("What is", "What was", "What are", "Which", "Which are", "Tell me", "Name", "Give", "Do you know")


def needle_corpus(documents: int, seed: int, prose: Sequence[str] = (), **options: Any) -> NeedleCorpus:
    """A corpus of needles for training; words of its own are real ones of `prose`, or invented.

    Args:
        options: of `make_corpus`; in most corpora the share of prose is larger, for needles are asked for among such
            texts.
    """
    draw = random.Random(f"needle corpus {seed}")
    real = real_words(tuple(prose))
    words, wordings = None, None
    if real and draw.random() < OWN_WORDS:
        invented = Words(2 * KEYS, derive_key("needle words", seed), "train").spell(np.arange(2 * KEYS))
        share = draw.choice((0.0, 0.3, 1.0))
        mixed = [word.lower() if draw.random() < share else draw.choice(real) for word in invented]
        mixed = list(dict.fromkeys(mixed))
        words = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
    if real and draw.random() < OWN_WORDINGS:
        wordings = [strange_wording(real, draw) for _ in range(12)]
    if real:
        options["prose_share"] = draw.choice(PROSE_SHARES)
    return NeedleCorpus(documents, seed, "train", words, wordings, prose=prose, **options)


@lru_cache(1)
def real_words(texts: tuple[str, ...]) -> list[str]:
    """The words of texts that may stand in keys of the training: none that the keys of the tests have."""
    tested = {word for words in words_of("test") for word in words}
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]{3,12}\b", text)} - tested)


def strange_wording(words: Sequence[str], draw: random.Random) -> Wording:
    """Sentences and questions about a key and its value whose other words are any."""

    def some(least: int, most: int) -> str:
        return "".join(f" {word}" for word in draw.choices(words, k=draw.randint(least, most)))

    noun = {values: draw.choice(words) for values in VALUES}

    def sentence() -> str:
        named = "{noun}" if draw.random() < 0.8 else "one"
        first, second = ("{key}", "{value}") if draw.random() < 0.75 else ("{value}", "{key}")
        inner = f"{some(0, 3)} {named}{some(0, 2)}" if draw.random() < 0.6 else some(1, 4)
        opening = f"{draw.choice(words).capitalize()}{some(0, 4)} " if draw.random() < 0.7 else ""
        if not opening and first == "{key}" and draw.random() < 0.5:
            opening = "The {noun} of "
        return f"{opening}{first}{inner}{draw.choice((' ', ': ', ' is ', ' was '))}{second}{some(0, 2)}."

    def question(noun: str, key: str) -> str:
        return f"{draw.choice(ASKING)}{some(0, 3)} {noun}{some(0, 3)} {key}{some(0, 5)}?"

    return Wording(
        [sentence() for _ in range(3)],
        [question("{noun}", "{key}") for _ in range(3)],
        [question(noun, "{key}") for noun in ("{noun}s", "all {noun}s", "all the {noun}s")],
        [question("{noun}s", "{keys}") for _ in range(2)],
        noun,
    )


@dataclass
class NeedleRows(ChainRows):
    """Makes the rows of a batch; rounds are those of chains whose documents come in any order."""

    corpus: NeedleCorpus  # type: ignore[assignment]

    def needle_rounds(self, count: int) -> list[Row]:
        """Up to a round: the question and the texts of the rounds before, then the ids of the next one, if any."""
        return self.following(count)

    def needles(self, count: int) -> list[Row]:
        """Whole transcripts: question, texts of all rounds, and the values in the order in which they were read."""
        questions: list[NeedleQuestion] = self.questions(count)  # type: ignore[assignment]
        orders = [self.draw.sample(range(len(item.answers)), len(item.answers)) for item in questions]
        values = [[item.answers[place] for place in order] for item, order in zip(questions, orders, strict=True)]
        said = [", ".join(found) or item.answer for found, item in zip(values, questions, strict=True)]
        coded = encode_all(self.tokenizer, [question.text for question in questions])
        answers = encode_all(self.tokenizer, [f" {text}" for text in said])
        rows = []
        for question, order, asked, answer in zip(questions, orders, coded, answers, strict=True):
            places = [question.positives[place] for place in order]
            blocks = self.blocks(places, question.near) or [self.others(places, 1, question.near)]
            row = self.opened(asked)
            for number, chosen in enumerate(blocks):
                row.add(self.pieces.named(chosen))
                row.add(self.pieces.block(chosen), routes=number == len(blocks) - 1)
            row.add([self.pieces.symbols["<|answer|>"]], labeled=self.memory and bool(places))
            row.add([*asked, self.pieces.symbols["\n"]])
            row.add([*answer, self.pieces.symbols["<|end|>"]], labeled=True)
            row.positives = places
            rows.append(row)
        return rows

    dense_needles = needles
