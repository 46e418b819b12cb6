"""Ends of sentences, and putting one more among those of a text."""

import re

# Latin marks need white space behind them, or numbers and abbreviations would be cut; those of other scripts do not.
OTHER_MARKS = "。！？｡।॥؟۔"
SENTENCE_END = re.compile(rf"[.!?][\"')\]]*\s+|[{OTHER_MARKS}][\"'”’」』）)]*\s*|\n+")


def insert_sentence(text: str, sentence: str, place: float) -> str:
    """The text with a sentence between two of its own, at the boundary nearest to `place`, 0 to 1."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    cut = min(ends, key=lambda end: abs(end - place * len(text)))
    before, after = text[:cut].rstrip(" "), text[cut:].lstrip(" ")
    left = "" if not before or before.endswith("\n") else " "
    right = "" if not after or after.startswith("\n") else " "
    return f"{before}{left}{sentence}{right}{after}"
