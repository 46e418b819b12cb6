"""Randomness that is a function of its arguments: the same on every machine, in any order, for any part of a range.

Everything here is integer arithmetic modulo 2^64 (the finaliser of SplitMix64); there is no generator with a state,
whose stream could change between versions and would have to be run from its beginning.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]
T = TypeVar("T")
_WORD = (1 << 64) - 1


def derive_key(*parts: int | str) -> int:
    """One 64-bit key from numbers and words; another order or another part gives an unrelated key."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def random_bits(key: int, index: Integers) -> Bits:
    """Independent uniform 64-bit numbers, one for each index."""
    bits = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_below(key: int, index: Integers, bound: int | Integers) -> Integers:
    """Uniform integers in [0, bound), one for each index; bounds below 2^31."""
    high = (random_bits(key, index) >> np.uint64(32)).astype(np.int64)
    return (high * bound) >> 32


def random_true(key: int, index: Integers, share: float) -> npt.NDArray[np.bool_]:
    """True with probability `share`, one for each index."""
    return (random_bits(key, index) >> np.uint64(11)).astype(np.float64) < share * 2.0**53


class Permutation:
    """A keyed bijection of [0, size) that needs no table: a Feistel network over two digits.

    A number is `left * columns + right`. Each step adds a hash of one digit to the other, which can be undone. Numbers
    that land in [size, rows * columns) are sent round again.
    """

    _STEPS = 6

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._rows = math.isqrt(max(size - 1, 0)) + 1
        self._columns = max(1, -(-size // self._rows))
        self._keys = [derive_key(key, step) for step in range(self._STEPS)]

    def forward(self, index: Integers) -> Integers:
        """Images of numbers in [0, size)."""
        return self._walk(index, self._forward_once)

    def inverse(self, image: Integers) -> Integers:
        """The numbers whose images these are."""
        return self._walk(image, self._inverse_once)

    def _walk(self, index: Integers, once: Callable[[Integers], Integers]) -> Integers:
        result = once(index)
        while (outside := np.nonzero(result >= self.size))[0].size:
            result[outside] = once(result[outside])
        return result

    def _forward_once(self, index: Integers) -> Integers:
        digits, sizes = [index // self._columns, index % self._columns], (self._rows, self._columns)
        for step, key in enumerate(self._keys):
            side = step % 2
            digits[side] = (digits[side] + random_below(key, digits[1 - side], sizes[side])) % sizes[side]
        return digits[0] * self._columns + digits[1]

    def _inverse_once(self, image: Integers) -> Integers:
        digits, sizes = [image // self._columns, image % self._columns], (self._rows, self._columns)
        for step in reversed(range(self._STEPS)):
            side = step % 2
            digits[side] = (digits[side] - random_below(self._keys[step], digits[1 - side], sizes[side])) % sizes[side]
        return digits[0] * self._columns + digits[1]


class Draws:
    """A stream of random numbers, for what is made one after the other; the same on every machine.

    Args:
        parts: numbers and words; others give an unrelated stream.
    """

    def __init__(self, *parts: int | str) -> None:
        self._key, self._drawn = derive_key("draws", *parts), 0

    def below(self, bound: int) -> int:
        """A uniform integer in [0, bound); bounds below 2^31."""
        self._drawn += 1
        bits = (self._drawn * 0x9E3779B97F4A7C15 + self._key) & _WORD
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _WORD
        return ((bits ^ (bits >> 31)) >> 32) * bound >> 32

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        mixed = list(items)
        for end in range(len(mixed) - 1, 0, -1):
            other = self.below(end + 1)
            mixed[end], mixed[other] = mixed[other], mixed[end]
        return mixed
