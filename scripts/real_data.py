"""Real questions and real text from a directory: passages, questions, and what a question wants to find.

The directory holds one folder per set with `documents.jsonl.xz` (`key`, `title`, `text`) and two files of questions,
`questions.train.jsonl.xz` and `questions.dev.jsonl.xz` (`question`, `answers`, `gold`: keys of all documents needed). A
folder `wikipedia` holds `part-NN.jsonl.xz` (`key`, `title`, `text`): further text, in which none of it is to be found.

Sets may have any names. Of those in `KNOWN` each stage uses the ones that it was made with, of all others every one.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

LONGEST = 900  # characters of a passage, its title left out
KNOWN = frozenset(
    (
        *("covidqa", "fairytaleqa", "multihop", "needles", "nq", "squad11"),
        *("squadshifts_amazon", "squadshifts_newwiki", "squadshifts_reddit"),
    )
)
SENTENCE_END = re.compile(r"(?<=[.!?])[\s\"')\]]*\s+|\n+")


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def split_passages(text: str, longest: int = LONGEST) -> list[str]:
    """A text in passages of at most `longest` characters that end with a line, a sentence or, failing that, a word."""
    pieces: list[str] = []
    start, end = 0, 0
    for found in [*SENTENCE_END.finditer(text), None]:
        stop = len(text) if found is None else found.end()
        if stop - start > longest and end > start:
            pieces.append(text[start:end])
            start = end
        while stop - start > longest:
            cut = text.rfind(" ", start, start + longest) + 1
            cut = cut if cut > start else start + longest
            pieces.append(text[start:cut])
            start = cut
        end = stop
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces if piece.strip()]


def passage_text(title: str, piece: str) -> str:
    """A passage as it is encoded."""
    return f"{title}\n{piece}" if title else piece


@dataclass
class Passages:
    """Passages of a source in order.

    Attributes:
        texts: as they are encoded.
        documents: for every passage, the place of its document.
        keys: of the documents.
        articles: for every passage, what its document was cut out of; the document itself where it was not.
    """

    texts: list[str] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    articles: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        for piece in split_passages(row["text"]):
            self.texts.append(passage_text(row.get("title") or "", piece))
            self.documents.append(len(self.keys))
            self.articles.append(row.get("article") or row["key"])
        self.keys.append(row["key"])


def sets_of(directory: str | Path) -> list[str]:
    """Folders with documents of their own, in alphabetical order."""
    return sorted(path.parent.name for path in Path(directory).glob("*/documents.jsonl.xz"))


def sets_among(there: Collection[str], chosen: Iterable[str]) -> list[str]:
    """Of the sets that are there the chosen ones, in their order, then in alphabetical order those not in `KNOWN`."""
    return [*(name for name in chosen if name in there), *sorted(set(there) - KNOWN)]


def read_passages(directory: str | Path, limit: int | None = None) -> Passages:
    """The passages of all sets, of the first `limit` documents of each."""
    found = Passages()
    for name in sets_of(directory):
        for row in islice(read_rows(Path(directory, name, "documents.jsonl.xz")), limit):
            found.add(row)
    return found


def read_filler(directory: str | Path, part: int, limit: int | None = None) -> Passages:
    """The passages of one part of the further text, of its first `limit` documents."""
    found = Passages()
    for row in islice(read_rows(Path(directory, "wikipedia", f"part-{part:02d}.jsonl.xz")), limit):
        found.add(row)
    return found


def read_questions(directory: str | Path, split: str) -> list[dict[str, Any]]:
    """Questions of all sets, each with the name of its `set`."""
    found = []
    for name in sets_of(directory):
        path = Path(directory, name, f"questions.{split}.jsonl.xz")
        if path.exists():
            found += [{**row, "set": name} for row in read_rows(path)]
    return found


def wanted_passages(question: dict[str, Any], passages: Passages, of_document: dict[str, list[int]]) -> list[list[int]]:
    """For every gold document of a question the places of its passages: those that hold an answer, or all."""
    answers = [answer.lower() for answer in question["answers"] if answer.strip()]
    wanted = []
    for key in question["gold"]:
        places = of_document[key]
        holding = [place for place in places if any(answer in passages.texts[place].lower() for answer in answers)]
        wanted.append(holding or places)
    return wanted


def passages_of(passages: Passages) -> dict[str, list[int]]:
    """Key of a document -> the places of its passages."""
    places: dict[str, list[int]] = {key: [] for key in passages.keys}
    for place, document in enumerate(passages.documents):
        places[passages.keys[document]].append(place)
    return places
