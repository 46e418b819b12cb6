"""Invented words: three syllables each, so that a number spells a word and no two numbers spell the same.

Each split owns one half of all words, whatever the seed. A world numbers the words of its half in an order of its own.
In a crowded world it takes only words of a few syllables, chosen by its key: so few that as large a share of those
words is in use as a much larger world uses of all words.
"""

import math
from bisect import bisect_left
from typing import Literal

import numpy as np

from .hashing import Integers, Permutation, derive_key

Split = Literal["train", "test"]


def _split(text: str) -> list[str]:
    return text.split(", ")


# Consonant groups and vowels alternate, so a word can be taken apart in one way only.
_VOWELS = _split("a, e, i, o, u")
_ONSETS = [
    "",
    *_split("b, d, f, g, h, j, k, l, m, n, p, r, s, t, v, w, z, br, dr, fr, gr, kr, tr, st, sk, th, sh, kl, gl"),
]
_MIDDLES = _split(
    "b, d, f, g, k, l, m, n, p, r, s, t, v, z, ld, lm, lt, lv, mb, mp, nd, nk, nt, nz, rd, rk, rl, rm, rn, rs, rt, rv, "
    "sk, sp, st, th, sh, dr, ss, ll"
)
_ENDS = ["", *_split("n, r, s, l, m, t, k, th, nd, st, x")]
_FIRST = [(onset + vowel).capitalize() for onset in _ONSETS for vowel in _VOWELS]
_SECOND = [middle + vowel for middle in _MIDDLES for vowel in _VOWELS]
_THIRD = [middle + vowel + end for middle in _MIDDLES for vowel in _VOWELS for end in _ENDS]
_SYLLABLES = (len(_FIRST), len(_SECOND), len(_THIRD))
WORDS = math.prod(_SYLLABLES)  # 72 million; each split uses one half of them
_HALVES = Permutation(WORDS, derive_key("the halves of the word space"))  # the images of one half of the numbers
_STARTS = {"train": 0, "test": WORDS // 2}


class Words:
    """The words of a world, by number.

    Args:
        count: how many the world needs. A crowded world keeps a table of them.
        key: another key gives other words.
        split: "train" and "test" have no word in common.
        crowding: how many times more words a world would need to have as large a share of all words in use as this one
            has of those of its own syllables. At most twice as many words can be spelled as are needed, or a few more.

    Attributes:
        share: the share of syllables in use, as (some, of all).
    """

    def __init__(self, count: int, key: int, split: Split, crowding: int = 1) -> None:
        if count > WORDS // 2:
            raise ValueError(f"too many entities: {count:,} invented words, and there are {WORDS // 2:,}")
        self._start, self._own = _STARTS[split], Permutation(WORDS // 2, key)
        self.share, self._table = (1, 1), None
        if crowding > 1:
            # Half of the candidates belong to the split, give or take; the margin is ten standard deviations or more.
            candidates = min(2 * count + 16 * math.isqrt(count) + 64, WORDS)
            space = max(WORDS // crowding, candidates)
            kept = bisect_left(range(_SYLLABLES[-1]), space, key=lambda kept: math.prod(_kept(kept)))
            self.share, self._table = (kept, _SYLLABLES[-1]), self._draw(_kept(kept), candidates, key)[:count]

    def spell(self, numbers: Integers) -> list[str]:
        """The words of these numbers."""
        return [_FIRST[a] + _SECOND[b] + _THIRD[c] for a, b, c in self.syllables(numbers).tolist()]

    def syllables(self, numbers: Integers) -> Integers:
        """[n, 3] places of the syllables in their tables."""
        if self._table is not None:
            spelling = self._table[numbers]
        else:
            spelling = _HALVES.forward(self._own.forward(numbers) + self._start)
        return np.stack(np.unravel_index(spelling, _SYLLABLES), axis=-1)

    def _draw(self, kept: list[int], candidates: int, key: int) -> Integers:
        """Words of the split, among the first candidates of the words that a few syllables spell."""
        chosen = Permutation(math.prod(kept), derive_key(key, "crowded")).forward(np.arange(candidates))
        syllables = [
            Permutation(size, derive_key(key, "syllable", place)).forward(digits)
            for place, (size, digits) in enumerate(zip(_SYLLABLES, np.unravel_index(chosen, kept), strict=True))
        ]
        spelling = np.ravel_multi_index(syllables, _SYLLABLES)
        return spelling[_HALVES.inverse(spelling) // (WORDS // 2) == self._start // (WORDS // 2)]


def _kept(last: int) -> list[int]:
    """The number of syllables of each table, for so many of the last: the same share of all, rounded up."""
    return [-(-size * last // _SYLLABLES[-1]) for size in _SYLLABLES]
