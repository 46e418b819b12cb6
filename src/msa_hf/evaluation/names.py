"""Names of invented entities: unique within a world, new in every split, and some of them alike on purpose.

A name has two parts. People have a given and a family name; everything else has one invented word and one common noun
("Port Velmara", "Tarnis Foundry"). Invented words are the digits of a number, three syllables, so that one number only
spells a word; which number an entity gets is a keyed permutation of its own. Parts are shared only where a lookalike
is wanted, and then the other part differs: no two entities have the same name, by construction.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from .hashing import Integers, Permutation, derive_key, random_below, random_true

KINDS = ("person", "place", "organisation", "object", "work", "event")
PERSON = KINDS.index("person")
ARTICLES = {"object": "the ", "work": "the ", "event": "the "}  # never a part of the name
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
WORDS = len(_FIRST) * len(_SECOND) * len(_THIRD)  # 72 million; each split uses one half of them

# {} is the invented word. 32 of each kind: an odd step through them visits 32 different ones.
FORMS: dict[str, list[str]] = {
    kind: _split(forms)
    for kind, forms in {
        "place": "Port {}, Lake {}, Mount {}, Fort {}, New {}, Old {}, Upper {}, Lower {}, Saint {}, East {}, West {}, "
        "Great {}, Little {}, {} Harbour, {} Valley, {} Falls, {} Heights, {} Bridge, {} Cross, {} Point, {} Springs, "
        "{} Island, {} Hills, {} Moor, {} Ferry, {} Green, {} Hollow, {} Bay, {} Ford, {} Gate, {} Fields, {} Junction",
        "organisation": "{} Foundry, {} Academy, {} Institute, {} Society, {} Guild, {} Company, {} Works, {} Press, "
        "{} Bank, {} Museum, {} Trust, {} Brewery, {} Shipyard, {} Mill, {} Observatory, {} Laboratory, {} College, "
        "{} Theatre, {} Orchestra, {} Library, {} Hospital, {} Railway, {} Cooperative, {} Workshop, {} Union, "
        "{} Bureau, {} Agency, {} Partners, {} Brothers, {} Archive, {} Conservatory, {} Exchange",
        "object": "{} Lantern, {} Clock, {} Chalice, {} Sword, {} Globe, {} Mirror, {} Crown, {} Bell, {} Casket, "
        "{} Compass, {} Astrolabe, {} Tapestry, {} Throne, {} Goblet, {} Mask, {} Necklace, {} Chest, {} Lamp, "
        "{} Statue, {} Vase, {} Ring, {} Shield, {} Sceptre, {} Telescope, {} Brooch, {} Anchor, {} Candlestick, "
        "{} Helmet, {} Medallion, {} Sundial, {} Urn, {} Banner",
        "work": "{} Ballad, {} Opera, {} Cantata, {} Symphony, {} Hymn, {} Overture, {} Masque, {} Operetta, {} Suite, "
        "{} Sonata, {} Serenade, {} Requiem, {} Rhapsody, {} Nocturne, {} Oratorio, {} Concerto, {} Fantasia, "
        "{} Prelude, {} Chorale, {} Waltz, {} Madrigal, {} Mass, {} Ode, {} Anthem, {} Lament, {} Drama, {} Comedy, "
        "{} Tragedy, {} Elegy, {} Musical, {} Cycle, {} Saga",
        "event": "{} Regatta, {} Festival, {} Race, {} Fair, {} Tournament, {} Marathon, {} Rally, {} Contest, "
        "{} Games, {} Cup, {} Derby, {} Championship, {} Carnival, {} Trophy, {} Gala, {} Parade, {} Pageant, "
        "{} Trial, {} Meet, {} Open, {} Classic, {} Match, {} Joust, {} Relay, {} Ride, {} Challenge, {} Prize, "
        "{} League, {} Jubilee, {} Climb, {} Swim, {} Crossing",
    }.items()
}
_FORMS = 32


class Names:
    """The names of a world: for each kind, entities 0 .. known - 1 have documents, those after them have none.

    Args:
        known: how many entities of each kind have a document.
        unknown: how many of each kind have none.
        seed: another seed gives other names.
        split: the invented words of "train" and "test" are disjoint, whatever the seeds.
        alike: the share of entities whose name shares a part with a documented entity's.
    """

    def __init__(self, known: list[int], unknown: list[int], seed: int, split: Split, alike: float) -> None:
        self.known, self.alike = known, alike
        words_needed = 2 * len(KINDS) * (max(known) + max(unknown))
        if words_needed > WORDS // 2:
            raise ValueError(f"too many entities: {words_needed:,} invented words, and there are {WORDS // 2:,}")
        self._key = derive_key("names", seed, split)
        self._own = Permutation(WORDS // 2, derive_key(self._key, "words"))
        self._spread = Permutation(WORDS, derive_key("the halves of the word space"))
        self._half = {"train": 0, "test": WORDS // 2}[split]

    def names(self, kind: int, numbers: Integers) -> list[str]:
        """The names of entities of one kind, without article."""
        first, second = self.parts(kind, numbers)
        words = self._words(2 * (first * len(KINDS) + kind))
        if kind == PERSON:
            families = self._words(2 * (second * len(KINDS) + kind) + 1)
            return [f"{given} {family}" for given, family in zip(words, families, strict=True)]
        forms = FORMS[KINDS[kind]]
        return [forms[form].replace("{}", word) for word, form in zip(words, second.tolist(), strict=True)]

    def parts(self, kind: int, numbers: Integers) -> tuple[Integers, Integers]:
        """What decides each part of a name: the entity that owns the word; for other kinds than people the second
        part is a form, 0 .. 31."""
        known = self.known[kind]
        documented = numbers < known
        twin = np.where(documented, numbers, numbers - known)  # an entity without document may look like its twin
        has_twin = documented | (twin < known)
        first, second = self._documented_parts(kind, np.where(has_twin, twin, 0))
        borrows = self._chosen("twins", kind, twin) & has_twin & ~documented
        borrows_first = self._borrows_first(kind, numbers)
        first = np.where(documented | (borrows & borrows_first), first, numbers)
        if kind == PERSON:
            return first, np.where(documented | (borrows & ~borrows_first), second, numbers)
        # The two of a pair and their twins take four different forms, whether they share the word or not.
        pair = twin // 2 * len(KINDS) + kind
        member = twin % 2 + 2 * (~documented)
        start = random_below(derive_key(self._key, "form"), pair, _FORMS)
        step = 2 * random_below(derive_key(self._key, "step"), pair, _FORMS // 2) + 1
        return first, (start + member * step) % _FORMS

    def lookalikes(self, kind: int, numbers: Integers) -> Integers:
        """[n, 2] the documented entities whose names share a part with each of these, -1 for none."""
        known = self.known[kind]
        twin = np.where(numbers < known, numbers, numbers - known)
        others = twin[:, None] // 2 * 2 + np.arange(2)
        if known == 0:
            return np.full_like(others, -1)
        first, second = self.parts(kind, numbers)
        other_first, other_second = self.parts(kind, np.minimum(others, known - 1).ravel())
        shared = other_first.reshape(others.shape) == first[:, None]
        if kind == PERSON:
            shared |= other_second.reshape(others.shape) == second[:, None]
        return np.where(shared & (others < known) & (others != numbers[:, None]), others, -1)

    def _documented_parts(self, kind: int, numbers: Integers) -> tuple[Integers, Integers]:
        """Owners of given and family name; the second of a pair may borrow one of the first's."""
        odd = numbers % 2 == 1
        borrows = odd & self._chosen("pairs", kind, numbers // 2)
        borrows_first = self._borrows_first(kind, numbers)
        return numbers - (borrows & borrows_first), numbers - (borrows & ~borrows_first)

    def _chosen(self, purpose: str, kind: int, index: Integers) -> npt.NDArray[np.bool_]:
        return random_true(derive_key(self._key, purpose), index * len(KINDS) + kind, self.alike)

    def _borrows_first(self, kind: int, numbers: Integers) -> npt.NDArray[np.bool_]:
        """People share either part; the others share the word, since nouns are common to all anyway."""
        if kind != PERSON:
            return np.ones(numbers.shape, bool)
        return random_true(derive_key(self._key, "which part"), numbers, 0.5)

    def _words(self, numbers: Integers) -> list[str]:
        spelling = self._spread.forward(self._own.forward(numbers) + self._half)
        spelling, third = np.divmod(spelling, len(_THIRD))
        first, second = np.divmod(spelling, len(_SECOND))
        digits = zip(first.tolist(), second.tolist(), third.tolist(), strict=True)
        return [_FIRST[a] + _SECOND[b] + _THIRD[c] for a, b, c in digits]
