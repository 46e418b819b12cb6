"""The words of needles: how they are said and asked for, and what keys are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .words import Split


@dataclass(frozen=True, slots=True)
class Wording:
    """A way to say a needle and to ask for it.

    Attributes:
        sentences: of `{key}`, `{value}` and `{noun}`.
        questions: for one value, of `{key}` and `{noun}`.
        several: for all values of a key.
        together: for the values of `{keys}`.
        nouns: kind of values -> what they are called.
    """

    sentences: list[str]
    questions: list[str]
    several: list[str]
    together: list[str]
    nouns: Mapping[str, str]


def _wording(sentences: str, questions: str, several: str, together: str, nouns: str) -> Wording:
    named = dict(zip(("words", "numbers", "uuids"), nouns.split(" | "), strict=True))
    said = [text.split(" | ") for text in (sentences, questions, several, together)]
    return Wording(said[0], said[1], said[2], said[3], named)


RULER = _wording(
    "One of the special magic {noun}s for {key} is: {value}.",
    "What is the special magic {noun} for {key} mentioned in the provided text?",
    "What are all the special magic {noun}s for {key} mentioned in the provided text?",
    "What are the special magic {noun}s for {keys} mentioned in the provided text?",
    "word | number | uuid",
)

# As `train` and `test` have no wording in common, a model that was trained on needles is tested on ones that it has to
# read, not to recognize.
WORDINGS: Mapping[Split, list[Wording]] = {
    "train": [
        _wording(
            "The {noun} of {key} is {value}. | {key} has the {noun} {value}. | Note the {noun} of {key}: {value}.",
            "What is the {noun} of {key}? | Which {noun} does {key} have?",
            "What are all the {noun}s of {key}? | Which {noun}s does {key} have?",
            "What are the {noun}s of {keys}? | Which {noun}s do {keys} have?",
            "password | number | identifier",
        ),
        _wording(
            "The secret {noun} for {key} is: {value}. | For {key} the secret {noun} is {value}.",
            "What is the secret {noun} for {key}? | Which secret {noun} belongs to {key}?",
            "What are all the secret {noun}s for {key}? | Which secret {noun}s belong to {key}?",
            "What are the secret {noun}s for {keys}? | Which secret {noun}s belong to {keys}?",
            "word | code | UUID",
        ),
        _wording(
            "{key} is registered under the {noun} {value}. | The register lists {key} under the {noun} {value}.",
            "Under which {noun} is {key} registered? | Which {noun} does the register list for {key}?",
            "Under which {noun}s is {key} registered? | Which are all the {noun}s that the register lists for {key}?",
            "Under which {noun}s are {keys} registered? | Which {noun}s does the register list for {keys}?",
            "name | file number | record id",
        ),
        _wording(
            "Whoever asks about {key} should remember the {noun} {value}. "
            "| One thing to remember about {key} is its {noun}: {value}. "
            "| Remember this about {key}: its {noun} is {value}.",
            "Which {noun} should be remembered for {key}? | What {noun} does the text give for {key}?",
            "Which {noun}s should be remembered for {key}? | What are the {noun}s that the text gives for {key}?",
            "Which {noun}s should be remembered for {keys}? | What {noun}s does the text give for {keys}?",
            "keyword | access number | uuid",
        ),
        _wording(
            "{value} is the {noun} that was given to {key}. | To {key} was given the {noun} {value}. "
            "| The {noun} given to {key} was {value}.",
            "Which {noun} was given to {key}? | What is the {noun} that {key} was given?",
            "Which {noun}s were given to {key}? | What are all {noun}s that {key} was given?",
            "Which {noun}s were given to {keys}? | What are the {noun}s that {keys} were given?",
            "label | serial number | reference",
        ),
    ],
    "test": [
        RULER,
        _wording(
            "The lucky {noun} of {key} turned out to be {value}. "
            "| It was {value} that became the lucky {noun} of {key}.",
            "What did the lucky {noun} of {key} turn out to be? | What became the lucky {noun} of {key}?",
            "What did the lucky {noun}s of {key} turn out to be? | What became the lucky {noun}s of {key}?",
            "What did the lucky {noun}s of {keys} turn out to be? | What became the lucky {noun}s of {keys}?",
            "charm | number | identifier",
        ),
        _wording(
            "To open {key}, enter the {noun} {value}. | {key} opens with the {noun} {value}.",
            "Which {noun} opens {key}? | What {noun} has to be entered to open {key}?",
            "Which {noun}s open {key}? | What are all {noun}s that open {key}?",
            "Which {noun}s open {keys}? | What {noun}s have to be entered to open {keys}?",
            "passphrase | PIN | token",
        ),
    ],
}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _listed(
    "able amber ancient arctic ashen autumn azure bitter blazing bold brave breezy bright brisk broad bronze calm "
    "candid careful casual cheerful chilly civil classic clever coastal cobalt copper coral cosmic cozy crimson crisp "
    "curious daring dapper distant dusty eager early earnest eastern elegant emerald endless exact faint fair famous "
    "fancy fearless fierce floral fluffy foggy forest formal frank fresh frosty gentle gilded glad gleaming golden "
    "graceful grand grassy handy happy hasty hazel hidden hollow honest humble icy idle inner ivory jade jolly joyful "
    "keen kind lavish lively lofty loyal lucid lunar marble mellow merry mighty misty modern mossy muted narrow neat "
    "nimble noble northern novel olive opal orderly patient peaceful pearly placid plain polite proud purple quick "
    "quiet rapid rustic scarlet serene silent silver"
)
NOUNS = _listed(
    "acorn anchor anthem apron arrow atlas badge bakery balcony banjo barge barrel basin basket beacon bell bench "
    "blanket blossom bobbin bonnet bottle boulder bracket branch bridge bucket buckle cabin cactus camel candle canoe "
    "canyon carpet castle cellar chapel cherry chisel cider circus clover cobbler comet compass cottage cradle cricket "
    "crystal curtain cushion dagger dairy daisy dolphin donkey drawer easel ember falcon feather ferry fiddle flagon "
    "flute fountain galaxy garden garnet glacier goblet granite hammer harbor harvest hatchet hedge helmet heron hinge "
    "island jacket jasmine jetty kettle kitten ladder lagoon lantern lattice leaflet lemon lighthouse lily locket "
    "magnet mallet maple meadow melon mirror mitten monsoon mosaic museum napkin nectar needle notebook nutmeg oasis "
    "orchard otter oyster paddle parcel parrot pebble pepper"
)


def words_of(split: Split) -> tuple[Sequence[str], Sequence[str]]:
    """The adjectives that keys of a split begin with, and the nouns that they end with."""
    half = 0 if split == "train" else 1
    return ADJECTIVES[half::2], NOUNS[half::2]
