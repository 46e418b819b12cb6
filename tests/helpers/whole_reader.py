"""A stand-in for a model that answers: it reads whole banks, so that tests see what lies in them."""

from collections.abc import Iterator, Sequence
from typing import Any

from msa_hf.bench.asking import Ask, Outcome


class Reader:
    """Stands for `put`: answers with the gold documents of a bank, and refuses where there are none."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.banks: list[list[str]] = []
        self.fail_after, self.asked = fail_after, 0

    def __call__(
        self, model: Any, tokenizer: Any, bank: Any, protocol: Any, questions: Sequence[Ask], judge: Any, **options: Any
    ) -> Iterator[list[Outcome]]:
        texts = [document.text or "" for document in bank.documents]
        self.banks.append(texts)
        for item in questions:
            if self.asked == self.fail_after:
                raise KeyboardInterrupt
            self.asked += 1
            gold = " ".join(texts[place] for place in item.gold) or item.expected[0]
            right = judge(gold, item.expected)
            if len(item.gold) == len(item.expected):  # each where it should be
                right &= all(
                    judge(texts[place], [value]) for place, value in zip(item.gold, item.expected, strict=True)
                )
            yield [Outcome(gold, right, len(item.expected) if right else 0, item.gold, "" if right else "routing")]
