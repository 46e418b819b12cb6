"""Training rows of `msa-hf-tiny` about needles: one value or several, and keys of which nothing is said."""

from __future__ import annotations

from dataclasses import dataclass

from tiny_chains import ChainRows
from tiny_rows import Row, encode_all

from msa_hf.synthetic.needle_corpora import NeedleCorpus, NeedleQuestion


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
