"""Sentences put into documents of any kind so that they look as if they had stood there: in lists as items of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..synthetic.hashing import derive_key
from ..synthetic.sentences import OTHER_MARKS, SENTENCE_END

ITEM = re.compile(r"(\s*(?:[-*+•]|\d{1,3}[.)])\s+)\S")
FENCE = re.compile(r"\s*(?:```|~~~)")
CLOSED = re.compile(r"\s*(?:#|\||<|>|\.\. |={3,}|-{3,}|:::|!\[)")  # lines that no sentence goes behind
CLOSING = "\"'”’」』）)]"  # marks behind a sentence's own
WORD = re.compile(r"(?<![\w/.@-])[^\W\d_]{4,12}(?![\w/@-])")  # of any alphabet; those of small letters are taken
MOST_WORDS = 600


def insert_in_style(text: str, sentence: str, place: float) -> str:
    """The text with a sentence at the place, 0 to 1, nearest to it that takes one.

    Between sentences of a paragraph it is one more; among the items of a list it is an item, with their mark. Code,
    tables, headings and markup are left as they are; where there is nothing else, it becomes a paragraph at an end.
    """
    spots: list[tuple[int, str, str]] = []  # where, what stands before it, what behind
    start, fenced = 0, False
    for line in text.splitlines(keepends=True):
        end, body = start + len(line), line.rstrip("\r\n")
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and body.strip() and not CLOSED.match(line) and not body.startswith(("    ", "\t")):
            if item := ITEM.match(line):
                mark = item[1]
                spots += [(start, mark, "\n"), (start + len(body), f"\n{mark}", "")]
            else:
                ends = {0, len(body), *(match.end() for match in SENTENCE_END.finditer(body))}
                for cut in sorted(ends):
                    before = " " if cut and not body[:cut].endswith(" ") else ""
                    after = " " if cut < len(body) else ""
                    if cut not in (0, len(body)) or body.rstrip().rstrip(CLOSING)[-1:] in (*".!?:：", *OTHER_MARKS):
                        spots.append((start + cut, before, after))
        start = end
    if not spots:
        return f"{sentence}\n\n{text}" if place < 0.5 else f"{text.rstrip()}\n\n{sentence}"
    where, before, after = min(spots, key=lambda spot: abs(spot[0] - place * len(text)))
    return text[:where] + before + sentence + after + text[where:]


def own_words(texts: Iterable[str]) -> list[str]:
    """The words of small letters that most documents of a corpus have, but for those that a third of them has.

    They stand in the order of their numbers, equal ones by alphabet.
    """
    each = [{word for word in WORD.findall(text) if word.islower()} for text in texts]
    counts = Counter(word for words in each for word in words)
    usual = sorted(
        (item for item in counts.items() if 1 < item[1] <= max(len(each) / 3, 2)), key=lambda item: (-item[1], item[0])
    )
    return [word for word, _ in usual[:MOST_WORDS]]


def own_terms(words: Sequence[str], texts: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Terms that look like the corpus' own and that it does not have: pairs that share their first word.

    Args:
        words: of `own_words`.

    Returns:
        `count` pairs, or fewer where the corpus has too few words; no term is in two of them, nor in a text.
    """
    ordered = sorted(words, key=lambda word: derive_key("term", seed, word))
    third = len(ordered) // 3
    whole = "\n".join(texts).lower()
    found: list[tuple[str, str]] = []
    for lap in range(third):
        for place in range(third):
            if len(found) == count:
                return found
            first = ordered[place]
            terms = (
                f"{first}-{ordered[third + (place + lap) % third]}",
                f"{first}-{ordered[2 * third + (place + lap) % third]}",
            )
            if not any(term in whole or term.replace("-", " ") in whole for term in terms):
                found.append(terms)
    return found
