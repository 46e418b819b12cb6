"""Statements about a person: attributes with their values, sentences and questions.

In sentences and questions `{n}` is the person, `{v}` the value, exactly as it answers the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that a person has one of at a time.

    Attributes:
        name: a noun: "What is Ana Brandt's <name>?"
        values: to choose from; none for numbers.
        sentences: that say it.
        questions: that ask for it.
        numbers: the smallest and the largest number; they can be compared.
        unit: behind a number.
    """

    name: str
    values: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    numbers: tuple[int, int] | None = None
    unit: str = ""

    def draw(self, chance: random.Random, without: Sequence[str] = ()) -> str:
        """A value that is none of those."""
        while True:
            value = (
                chance.choice(self.values) if self.numbers is None else f"{chance.randint(*self.numbers)}{self.unit}"
            )
            if value not in without:
                return value


def words_of(text: str) -> tuple[str, ...]:
    """Words that stand between commas."""
    return tuple(text.split(", "))


_CITIES = words_of(
    "Aarhus, Basel, Bergen, Bologna, Bordeaux, Bremen, Brno, Cork, Dresden, Dundee, Ghent, Girona, Graz, "
    "Groningen, Haarlem, Kaunas, Kraków, Leeds, Leipzig, Linz, Lugano, Lyon, Malmö, Maribor, Nantes, Odense, "
    "Oulu, Padua, Porto, Rostock, Salerno, Seville, Split, Tampere, Tartu, Trieste, Turku, Uppsala, Utrecht, "
    "Verona"
)
_JOBS = words_of(
    "an archivist, a baker, a beekeeper, a bookbinder, a carpenter, a cartographer, a cellist, a chemist, a "
    "dentist, an electrician, a florist, a gardener, a geologist, a glazier, a joiner, a judge, a librarian, a "
    "locksmith, a midwife, a notary, an optician, a pharmacist, a pilot, a plumber, a potter, a sculptor, a "
    "surveyor, a tailor, a translator, a welder"
)
_DISHES = words_of(
    "apricot dumplings, baked celery, barley soup, bean stew, beetroot salad, chestnut cake, fish pie, lentil "
    "curry, mushroom risotto, onion tart, paella, pea soup, plum cake, potato pancakes, pumpkin ravioli, rhubarb "
    "crumble, roast fennel, saffron rice, spinach pie, stuffed peppers, tomato gratin, walnut bread"
)
_ANIMALS = words_of(
    "Biscuit, Bramble, Clover, Domino, Fennel, Ginger, Hazel, Juniper, Marble, Mocha, Mustard, Nutmeg, Olive, "
    "Pebble, Pepper, Pickle, Saffron, Scout, Shadow, Sorrel, Thistle, Toffee, Waffle, Willow"
)
_INSTRUMENTS = words_of(
    "accordion, bagpipes, banjo, bassoon, cello, clarinet, double bass, flute, guitar, harp, horn, lute, "
    "mandolin, oboe, organ, piano, recorder, saxophone, trombone, trumpet, tuba, viola, violin, zither"
)
_COLORS = words_of(
    "amber, beige, black, bronze, burgundy, copper, cream, dark green, gold, gray, indigo, ivory, lilac, mint "
    "green, navy blue, orange, pink, purple, red, silver, sky blue, turquoise, white, yellow"
)
_ALLERGIES = words_of(
    "almonds, birch pollen, bee stings, celery, dust mites, eggs, hazelnuts, horse hair, kiwi, latex, lupin, "
    "mustard, nickel, oysters, peanuts, penicillin, ragweed, sesame, shrimp, soy, sulfites, walnuts, wasp stings, "
    "wheat"
)
_DRINKS = words_of(
    "apple juice, barley tea, black tea, buttermilk, camomile tea, cider, cocoa, cold brew, elderflower cordial, "
    "espresso, fennel tea, ginger ale, green tea, hibiscus tea, kefir, lemonade, malt coffee, mint tea, oat milk, "
    "pear juice, rooibos, rose hip tea, tomato juice, tonic water"
)
_LANGUAGES = words_of(
    "Albanian, Armenian, Basque, Breton, Bulgarian, Catalan, Croatian, Czech, Danish, Dutch, Estonian, Finnish, "
    "Georgian, Greek, Hungarian, Icelandic, Irish, Latvian, Lithuanian, Maltese, Norwegian, Polish, Romanian, "
    "Turkish, Welsh"
)
_DAYS = words_of("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
_PLACES = words_of(
    "behind the boiler, below the doormat, in a teapot, in the bread bin, in the garden shed, in the letterbox, "
    "in the piano stool, in the top drawer, inside the clock, on the beam, on the lintel, under a flowerpot, "
    "under the bench, under the blue tile, under the gnome, under the rain barrel"
)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute("city", _CITIES, ("{n} lives in {v}.", "{n} has a flat in {v}."), ("In which city does {n} live?",)),
    Attribute("job", _JOBS, ("{n} works as {v}.", "{n} is {v} by profession."), ("What does {n} work as?",)),
    Attribute(
        "favorite dish",
        _DISHES,
        ("{n}'s favorite dish is {v}.", "Nothing tastes better to {n} than the favorite dish: {v}."),
        ("What is {n}'s favorite dish?",),
    ),
    Attribute("dog", _ANIMALS, ("{n}'s dog is called {v}.", "{n} has a dog, {v}."), ("What is {n}'s dog called?",)),
    Attribute(
        "instrument",
        _INSTRUMENTS,
        ("{n} plays the {v}.", "{n}'s instrument is the {v}."),
        ("Which instrument does {n} play?",),
    ),
    Attribute(
        "car color", _COLORS, ("{n}'s car is {v}.", "{n} drives a car that is {v}."), ("What color is {n}'s car?",)
    ),
    Attribute(
        "allergy", _ALLERGIES, ("{n} is allergic to {v}.", "{n}'s allergy is to {v}."), ("What is {n} allergic to?",)
    ),
    Attribute(
        "usual drink",
        _DRINKS,
        ("{n} always asks for {v}.", "{n}'s usual drink is {v}."),
        ("What is {n}'s usual drink?",),
    ),
    Attribute(
        "course",
        _LANGUAGES,
        ("{n} takes a course in {v}.", "{n} is learning {v}."),
        ("Which language is {n} learning?",),
    ),
    Attribute(
        "free day",
        _DAYS,
        ("{n} has {v} off.", "{n}'s free day is {v}."),
        ("Which day of the week does {n} have off?",),
    ),
    Attribute(
        "spare key",
        _PLACES,
        ("{n}'s spare key is {v}.", "{n} keeps the spare key {v}."),
        ("Where is {n}'s spare key?",),
    ),
    Attribute(
        "rent",
        (),
        ("{n} pays {v} of rent a month.", "{n}'s rent is {v}."),
        ("How high is {n}'s rent?",),
        numbers=(310, 1990),
        unit=" euros",
    ),
    Attribute(
        "extension",
        (),
        ("{n}'s extension is {v}.", "{n} can be reached at extension {v}."),
        ("What is {n}'s extension?",),
        numbers=(1001, 9998),
    ),
    Attribute(
        "locker",
        (),
        ("{n} has locker number {v}.", "{n}'s locker is number {v}."),
        ("Which locker number does {n} have?",),
        numbers=(101, 989),
    ),
)
COMPARABLE = tuple(attribute for attribute in ATTRIBUTES if attribute.numbers is not None)

_FIRST = words_of(
    "Ada, Ana, Anton, Astrid, Bela, Carla, Casper, Clara, Dario, Edda, Elin, Emil, Enzo, Esther, Eva, Felix, "
    "Finn, Frida, Gerda, Hanna, Hugo, Ida, Ines, Iris, Ivan, Jakob, Jana, Joel, Julia, Karl, Kira, Lars, Lea, "
    "Leo, Lina, Luca, Magda, Mara, Mateo, Mila, Nadia, Nils, Nora, Oskar, Otto, Paula, Pavel, Petra, Rafael, "
    "Rosa, Ruben, Selma, Simon, Sofia, Tara, Theo, Tilda, Ursula, Viktor, Wanda, Xenia, Yara, Yuri, Zoe"
)
_LAST = words_of(
    "Abel, Adler, Albers, Amsel, Bauer, Berger, Blum, Brandt, Bruns, Costa, Dahl, Duarte, Eklund, Engel, Falk, "
    "Farkas, Fiala, Gallo, Grimm, Haas, Hansen, Heller, Holm, Horvat, Ibsen, Jansen, Jensen, Kaiser, Keller, "
    "Klein, Koch, Kovač, Lang, Larsen, Lenz, Lindt, Lorenz, Lund, Marek, Meyer, Moreau, Novak, Olsen, Ortega, "
    "Pohl, Popov, Reiter, Ribeiro, Rossi, Roth, Sauer, Silva, Sommer, Stein, Tanaka, Thorsen, Urban, Vargas, "
    "Vogel, Wagner, Weiss, Winkler, Ziegler, Zorn"
)
NAMES = tuple(f"{first} {last}" for last in _LAST for first in _FIRST)
"""Names of people, 4,096 of them."""

_ROLES = words_of(
    "accountant, aunt, baker, cousin, decorator, dentist, doctor, driving instructor, florist, gardener, godson, "
    "hairdresser, insurance agent, landlord, lawyer, mechanic, nephew, niece, optician, piano tuner, plumber, "
    "roommate, singing teacher, swimming coach, tax adviser, tennis partner, tutor, uncle, upholsterer, vet"
)
_WHENCE = words_of(
    "from the choir, from the corner house, from the evening class, from the ferry, from the market, from the old "
    "job, from the reading circle, from the ski trip, from upstairs, with the loud laugh, with the red beard, "
    "with the sailboat"
)
ROLES = tuple(f"{role} {whence}" for whence in _WHENCE for role in _ROLES)
"""Relations of a person to the user, 360 of them: "my dentist from the choir"."""
