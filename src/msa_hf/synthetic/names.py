"""Names of invented entities: unique within a world, new in every split, and some of them alike on purpose.

A name has two parts. People have a given and a family name; everything else has one invented word and one common noun
("Port Velmara", "Tarnis Foundry"). Every entity has invented words of its own. They are shared only where a lookalike
is wanted, and then the other part differs: no two entities have the same name, by construction.
"""

import numpy as np
import numpy.typing as npt

from .hashing import Integers, Permutation, derive_key, random_below, random_true
from .words import Split, Words

KINDS = ("person", "place", "organisation", "object", "work", "event")
PERSON = KINDS.index("person")
ARTICLES = {"object": "the ", "work": "the ", "event": "the "}  # never a part of the name
# {} is the invented word. 32 of each kind: an odd step through them visits 32 different ones.
FORMS: dict[str, list[str]] = {
    kind: forms.split(", ")
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
_COMPARED = 1 << 20  # pairs of names at a time


class Names:
    """The names of a world: for each kind, entities 0 .. known - 1 have documents, those after them have none.

    Args:
        known: how many entities of each kind have a document.
        unknown: how many of each kind have none.
        seed: another seed gives other names.
        split: the invented words of "train" and "test" are disjoint, whatever the seeds.
        alike: the share of entities whose name shares a part with a documented entity's.
        crowding: names are as near to each other as with so many times the entities (`Words`). Words of fewer syllables
            have fewer neighbors at one syllable's distance, so nouns are as many fewer, four of a kind at least:
            neighbors that share the noun are then as frequent as with so many times the entities.
    """

    def __init__(
        self, known: list[int], unknown: list[int], seed: int, split: Split, alike: float, crowding: int = 1
    ) -> None:
        self.known, self.alike = known, alike
        self._key = derive_key("names", seed, split)
        words_needed = 2 * len(KINDS) * (max(known) + max(unknown))
        self._words = Words(words_needed, derive_key(self._key, "words"), split, crowding)
        share, whole = self._words.share
        self._form_count = next(count for count in (4, 8, 16, _FORMS) if count * whole >= share * _FORMS)
        self._forms = [
            np.sort(Permutation(_FORMS, derive_key(self._key, "forms", kind)).forward(np.arange(self._form_count)))
            for kind in range(len(KINDS))
        ]

    def names(self, kind: int, numbers: Integers) -> list[str]:
        """The names of entities of one kind, without article."""
        first, second = self.parts(kind, numbers)
        words = self._words.spell(_given(kind, first))
        if kind == PERSON:
            families = self._words.spell(_family(kind, second))
            return [f"{given} {family}" for given, family in zip(words, families, strict=True)]
        forms = FORMS[KINDS[kind]]
        return [forms[form].replace("{}", word) for word, form in zip(words, second.tolist(), strict=True)]

    def parts(self, kind: int, numbers: Integers) -> tuple[Integers, Integers]:
        """The numbers behind the parts of a name: the entity that owns the word; for other kinds than people the second
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
        start = random_below(derive_key(self._key, "form"), pair, self._form_count)
        step = 2 * random_below(derive_key(self._key, "step"), pair, self._form_count // 2) + 1
        return first, self._forms[kind][(start + member * step) % self._form_count]

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

    def nearest(self, kind: int, numbers: Integers, count: int) -> Integers:
        """[n, count] for documented entities, the others whose names agree with theirs in the most places (syllables,
        noun), best first; -1 where there are no more. Of equals, those whose numbers follow next come first. Every name
        is compared with all documented ones of the kind."""
        known = self.known[kind]
        theirs = self._features(kind, np.arange(known))
        found = np.full((len(numbers), count), -1)
        some = min(count, known - 1)
        step = max(1, _COMPARED // max(known, 1))
        for start in range(0, len(numbers), step):
            rows = numbers[start : start + step, None]
            distance = (np.arange(known) - rows) % known
            for feature in range(theirs.shape[1]):
                distance -= known * (theirs[rows, feature] == theirs[:, feature])
            best = np.sort(np.partition(distance, some, axis=1)[:, : some + 1], axis=1)
            found[start : start + step, :some] = (best[:, 1:] + rows) % known  # the best is the entity itself
        return found

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

    def _features(self, kind: int, numbers: Integers) -> Integers:
        """[n, some] the syllables of each name's invented words, and its noun."""
        first, second = self.parts(kind, numbers)
        word = self._words.syllables(_given(kind, first))
        rest = self._words.syllables(_family(kind, second)) if kind == PERSON else second[:, None]
        return np.concatenate([word, rest], axis=1)


def _given(kind: int, owners: Integers) -> Integers:
    """The number of an entity's invented word; of people, that of the given name."""
    return 2 * (owners * len(KINDS) + kind)


def _family(kind: int, owners: Integers) -> Integers:
    return _given(kind, owners) + 1
