"""Tell whether an answer is the right one."""

import re
import string
import unicodedata

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_INSIDE_NUMBERS = re.compile(r"(?<=\d)([.,])(?=\d)")
_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation + "“”‘’„«»–—…"})


def normalize_answer(text: str) -> str:
    """An answer without case, articles, punctuation and surplus white space. A decimal point stays, and a comma between
    digits joins them: "The Oskel Lantern." is "oskel lantern", "48,200" is "48200", and "4.2" is not "42"."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = _INSIDE_NUMBERS.sub(lambda mark: "\0" if mark[1] == "." else "", text)
    text = text.translate(_PUNCTUATION).replace("\0", ".")
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answer: str) -> bool:
    """Tell whether the prediction is the answer, up to `normalize_answer`. An empty prediction never is."""
    normalized = normalize_answer(prediction)
    return bool(normalized) and normalized == normalize_answer(answer)
