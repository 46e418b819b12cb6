"""Needles: sentences that give a key a word, a number or a UUID, and the questions about them, after RULER.

Keys are pairs such as "quiet-harbor". Training and testing share no word of a key, no value of the kind "words" and no
wording: RULER's own belongs to the tests. A task owns four keys that are easily taken for each other, each differing
from two of the others in one word, so that no two tasks of a split can be confused by more than that.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .hashing import Draws, Permutation, derive_key
from .needle_wordings import WORDINGS, Wording, words_of
from .words import Split

TASKS = ("single", "multi_key_2", "multi_key_3", "multi_value", "multi_query")
VALUES = ("words", "numbers", "uuids")
SEVERAL = 4  # values of a multi-value task, keys of a multi-query task: RULER's
DIGITS = 7  # of a number: RULER's


@dataclass(frozen=True, slots=True)
class Needle:
    """One sentence: the value of a key."""

    key: str
    value: str
    sentence: str


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """A question and the sentences that it is about.

    Attributes:
        question: names a key, or several.
        answers: the values that it asks for.
        needles: to be planted: first those that hold the answers, in the order of `answers`, then those that are easily
            taken for them.
    """

    question: str
    answers: tuple[str, ...]
    needles: tuple[Needle, ...]

    @property
    def gold(self) -> tuple[Needle, ...]:
        return self.needles[: len(self.answers)]


class NeedleTasks:
    """Tasks by number, the same for the same arguments on every machine.

    Args:
        seed: another seed gives other keys, values and wordings.
        split: "train" and "test" share no keys and no wordings.
        words: those that keys begin and end with, two of each at least; the split's by default.
        wordings: to choose from, those of the split by default.

    Raises:
        ValueError: for words that keys cannot be made of.
    """

    def __init__(
        self,
        seed: int = 0,
        split: Split = "test",
        words: tuple[Sequence[str], Sequence[str]] | None = None,
        wordings: Sequence[Wording] | None = None,
    ) -> None:
        self._key = derive_key("needles", seed, split)
        self._words = [list(each) for each in words or words_of(split)]
        every = [word for each in self._words for word in each]
        if min(map(len, self._words)) < 2 or len(set(every)) < len(every) or not all(map(str.isalpha, every)):
            raise ValueError(
                "Keys need two words or more to begin and to end with, of letters alone, each of them once."
            )
        self._wordings = wordings or WORDINGS[split]
        # Blocks of two adjectives and two nouns, each the four keys of one task.
        self._blocks = Permutation(
            len(self._words[0]) // 2 * (len(self._words[1]) // 2), derive_key(self._key, "blocks")
        )
        self._pairs = Permutation(len(self._words[0]) * len(self._words[1]), derive_key(self._key, "values"))

    def __len__(self) -> int:
        """The number of tasks; no two of them share a key."""
        return self._blocks.size

    def keys(self, number: int) -> tuple[str, str, str, str]:
        """The four keys of a task; the second differs from the first in the noun, the third in the adjective.

        Raises:
            IndexError: for a number that no task has.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"task {number} of {len(self)}")
        block = int(self._blocks.forward(np.array([number]))[0])
        first, second = divmod(block, len(self._words[1]) // 2)
        (one, other), (this, that) = self._words[0][2 * first :][:2], self._words[1][2 * second :][:2]
        return f"{one}-{this}", f"{one}-{that}", f"{other}-{this}", f"{other}-{that}"

    def keys_in(self, texts: Iterable[str]) -> set[str]:
        """The keys that stand in texts, with a hyphen or a space between their words."""
        words = ("|".join(item) for item in self._words)
        key = re.compile(rf"\b({next(words)})[- ]({next(words)})\b")
        return {f"{one}-{other}" for text in texts for one, other in key.findall(text.lower())}

    def task(self, name: str, values: str, number: int) -> NeedleTask:
        """A task.

        Args:
            name: among `TASKS`.
            values: among `VALUES`.
            number: 0 up to `len(self)`; each for one task only, if their needles lie in one haystack.

        Raises:
            ValueError: for another name or kind of values.
            IndexError: for a number that no task has.
        """
        if name not in TASKS or values not in VALUES:
            raise ValueError(f"no needles {name!r} of {values!r}; there are {', '.join(TASKS)} of {', '.join(VALUES)}")
        keys = self.keys(number)
        draws = Draws(self._key, "task", number)
        wording = draws.pick(self._wordings)
        noun = wording.nouns[values]
        fresh = iter(
            dict.fromkeys(
                self._value(values, number, place) for place in range(SEVERAL if values == "words" else 2 * SEVERAL)
            )
        )

        def needle(key: str) -> Needle:
            value = next(fresh)
            sentence = draws.pick(wording.sentences)
            return Needle(key, value, sentence.format(key=key, value=value, noun=noun))

        if name == "multi_value":
            needles = [needle(keys[0]) for _ in range(SEVERAL)]
            asked, answers = wording.several, SEVERAL
        elif name == "multi_query":
            needles, asked, answers = [needle(key) for key in keys[:SEVERAL]], wording.together, SEVERAL
        else:
            extra = {"single": 0, "multi_key_2": 1, "multi_key_3": 2}[name]
            needles, asked, answers = [needle(key) for key in keys[: 1 + extra]], wording.questions, 1
        listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
        question = draws.pick(asked).format(key=keys[0], keys=listed, noun=noun)
        return NeedleTask(question, tuple(item.value for item in needles[:answers]), tuple(needles))

    def unanswerable(self, values: str, number: int) -> str:
        """A question about the last key of a task, of which its needles say nothing if they are of one key or three."""
        draws = Draws(self._key, "unanswerable", number)
        wording = draws.pick(self._wordings)
        return draws.pick(wording.questions).format(key=self.keys(number)[-1], noun=wording.nouns[values])

    def _value(self, values: str, number: int, place: int) -> str:
        draws = Draws(self._key, "value", values, number, place)
        if values == "words":  # no two needles have the same, and as its noun comes first, no key is one
            pair = int(self._pairs.forward(np.array([number * SEVERAL + place]))[0])
            first, second = divmod(pair, len(self._words[1]))
            return f"{self._words[1][second]}-{self._words[0][first]}"
        if values == "numbers":
            return str(10 ** (DIGITS - 1) + draws.below(9 * 10 ** (DIGITS - 1)))
        return str(uuid.UUID(int=sum(draws.below(1 << 16) << 16 * part for part in range(8)), version=4))
