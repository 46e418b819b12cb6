"""Argument types for sizes: numbers with units."""

from __future__ import annotations

import argparse
import re

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def whole(text: str, units: dict[str, int], suffix: str, examples: str) -> int:
    """A whole number written with a unit."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*([A-Za-z]*)", text.removesuffix(suffix))
    if match is None or match[3] not in units:
        raise argparse.ArgumentTypeError(f"must be a number such as {examples}, got {text!r}")
    decimals = match[2] or ""
    value, rest = divmod(int(match[1] + decimals) * units[match[3]], 10 ** len(decimals))
    if rest:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return value


def amount(text: str) -> int:
    """An argument type: bytes or operations, such as 141GB, 128GiB, 300T."""
    return whole(text, UNITS, "B", "141GB, 128GiB or 300T")


def count(text: str) -> int:
    """An argument type: tokens, such as 100M or 1B."""
    return whole(text, COUNTS, "", "500K, 100M or 1B")


def device_amount(text: str) -> int | None:
    """An argument type: an amount, or "none" for no device."""
    return None if text == "none" else amount(text)
