"""Chance in shares of right answers: intervals of one share, and whether two differ."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(right: int, asked: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share by Wilson's score, 95 % by default; (0, 1) where nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    share, spread = right / asked, z * z / asked
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return max(0.0, center - half) if right else 0.0, min(1.0, center + half) if right < asked else 1.0


def sign_test(gained: int, lost: int) -> float:
    """The chance that as many of the questions that changed would have changed one way, were both ways alike.

    Args:
        gained, lost: the same questions, put twice: wrong then right, and right then wrong.

    Returns:
        p of the exact two-sided test (McNemar's); 1 where nothing changed.
    """
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def fisher_test(right: int, asked: int, other_right: int, other_asked: int) -> float:
    """The chance of a difference as unlikely as this one between the shares of different questions, were they alike.

    Returns:
        p of Fisher's exact two-sided test.
    """
    total, good = asked + other_asked, right + other_right

    def log_chance(count: int) -> float:
        ways = math.lgamma(asked + 1) - math.lgamma(count + 1) - math.lgamma(asked - count + 1)
        ways += math.lgamma(other_asked + 1) - math.lgamma(good - count + 1)
        ways -= math.lgamma(other_asked - good + count + 1)
        return ways - (math.lgamma(total + 1) - math.lgamma(good + 1) - math.lgamma(total - good + 1))

    found = log_chance(right) + 1e-9
    possible = range(max(0, good - other_asked), min(asked, good) + 1)
    return min(1.0, sum(math.exp(chance) for count in possible if (chance := log_chance(count)) <= found))
