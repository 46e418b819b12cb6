"""Questions about two entities: which has more of something, which came first, what they share."""

from typing import NamedTuple

from .names import KINDS
from .templates import ATTRIBUTES


class Comparison(NamedTuple):
    """A way to compare two entities of a kind by one attribute; `{n}` and `{m}` in the questions are the entities."""

    kind: int
    attribute: int
    greatest: bool
    questions: tuple[str, ...]


class Happening(NamedTuple):
    """An event of an entity in a year; `{n}` in the phrases is the entity."""

    kind: int
    attribute: int
    phrases: tuple[str, ...]


def _place(kind: str, attribute: str) -> tuple[int, int]:
    number = KINDS.index(kind)
    return number, next(place for place, item in enumerate(ATTRIBUTES[number]) if item.name == attribute)


def _both_ways(kind: str, attribute: str, least: str, greatest: str) -> list[Comparison]:
    """Questions for the least and for the greatest, alternatives between bars."""
    return [
        Comparison(*_place(kind, attribute), want, tuple(questions.split(" | ")))
        for want, questions in ((False, least), (True, greatest))
    ]


COMPARISONS = [
    *_both_ways(
        "person",
        "birth_year",
        "Who is older, {n} or {m}? | Who was born earlier, {n} or {m}?",
        "Who is younger, {n} or {m}? | Who was born later, {n} or {m}?",
    ),
    *_both_ways(
        "person",
        "height",
        "Who is shorter, {n} or {m}? | Which of the two is less tall, {n} or {m}?",
        "Who is taller, {n} or {m}? | Which of the two is the taller one, {n} or {m}?",
    ),
    *_both_ways(
        "place",
        "founded",
        "Which place is older, {n} or {m}? | Which was founded earlier, {n} or {m}?",
        "Which place is younger, {n} or {m}? | Which was founded later, {n} or {m}?",
    ),
    *_both_ways(
        "place",
        "population",
        "Which place is smaller, {n} or {m}? | Which has fewer inhabitants, {n} or {m}?",
        "Which place is larger, {n} or {m}? | Which has more inhabitants, {n} or {m}?",
    ),
    *_both_ways(
        "organisation",
        "founded",
        "Which organisation is older, {n} or {m}? | Which was founded earlier, {n} or {m}?",
        "Which organisation is younger, {n} or {m}? | Which was founded later, {n} or {m}?",
    ),
    *_both_ways(
        "organisation",
        "staff",
        "Which organisation is smaller, {n} or {m}? | Which has fewer employees, {n} or {m}?",
        "Which organisation is larger, {n} or {m}? | Which has more employees, {n} or {m}?",
    ),
    *_both_ways(
        "object",
        "made",
        "Which object is older, {n} or {m}? | Which was made earlier, {n} or {m}?",
        "Which object is younger, {n} or {m}? | Which was made later, {n} or {m}?",
    ),
    *_both_ways(
        "object",
        "weight",
        "Which is lighter, {n} or {m}? | Which weighs less, {n} or {m}?",
        "Which is heavier, {n} or {m}? | Which weighs more, {n} or {m}?",
    ),
    *_both_ways(
        "work",
        "finished",
        "Which work is older, {n} or {m}? | Which was finished earlier, {n} or {m}?",
        "Which work is younger, {n} or {m}? | Which was finished later, {n} or {m}?",
    ),
    *_both_ways(
        "work",
        "length",
        "Which is shorter, {n} or {m}? | Which lasts less long, {n} or {m}?",
        "Which is longer, {n} or {m}? | Which lasts longer, {n} or {m}?",
    ),
    *_both_ways(
        "event",
        "first_held",
        "Which event is older, {n} or {m}? | Which was first held earlier, {n} or {m}?",
        "Which event is younger, {n} or {m}? | Which was first held later, {n} or {m}?",
    ),
    *_both_ways(
        "event",
        "entrants",
        "Which event is smaller, {n} or {m}? | Which had fewer entrants, {n} or {m}?",
        "Which event is larger, {n} or {m}? | Which had more entrants, {n} or {m}?",
    ),
]

HAPPENINGS = [
    Happening(*_place(kind, attribute), tuple(phrases.split(" | ")))
    for kind, attribute, phrases in (
        ("person", "birth_year", "the birth of {n} | the year in which {n} was born"),
        ("place", "founded", "the founding of {n} | the first houses of {n}"),
        ("organisation", "founded", "the founding of {n} | the opening of {n}"),
        ("object", "made", "the making of {n} | the year in which {n} was made"),
        ("work", "finished", "the completion of {n} | the last page of {n}"),
        ("event", "first_held", "the first year of {n} | the year in which {n} was first held"),
    )
]
# [is the later one wanted] -> questions about two happenings
ORDER_QUESTIONS = (
    ("Which came first, {n} or {m}?", "What happened earlier, {n} or {m}?", "Which is further back, {n} or {m}?"),
    ("Which came last, {n} or {m}?", "What happened later, {n} or {m}?", "Which is more recent, {n} or {m}?"),
)

JOIN_QUESTIONS = (
    "What do {n} and {m} have in common?",
    "What do {n} and {m} share?",
    "What is the same for {n} and {m}?",
    "In what do {n} and {m} agree?",
)


def measure_of(value: str) -> float:
    """The number that a value begins with: "4.5 kilograms" is 4.5, "13,400" is 13400."""
    return float(value.split()[0].replace(",", ""))
