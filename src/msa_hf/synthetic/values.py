"""The closed lists that facts take their values from: 20 to 200 each, every value as it stands in the text."""


def _split(text: str) -> list[str]:
    return text.split(", ")


_MONTHS = _split("January, February, March, April, May, June, July, August, September, October, November, December")

YEARS = [str(year) for year in range(1820, 2020)]
DATES = [f"{day} {month}" for month in _MONTHS for day in range(2, 29, 2)]
POPULATIONS = [f"{100 * (7 * step + 13):,}" for step in range(200)]
HEADCOUNTS = [str(13 * step + 41) for step in range(200)]
HEIGHTS = [f"{centimetres} centimetres" for centimetres in range(141, 209)]
WEIGHTS = [f"{halves / 2} kilograms" for halves in range(3, 180)]
LENGTHS = [f"{minutes} minutes" for minutes in range(12, 190)]
WINDS = _split(
    "north, north by east, north-north-east, north-east by north, north-east, north-east by east, east-north-east, "
    "east by north, east, east by south, east-south-east, south-east by east, south-east, south-east by south, "
    "south-south-east, south by east, south, south by west, south-south-west, south-west by south, south-west, "
    "south-west by west, west-south-west, west by south, west, west by north, west-north-west, north-west by west, "
    "north-west, north-west by north, north-north-west, north by west"
)
COLOURS = _split(
    "crimson, scarlet, vermilion, maroon, burgundy, ruby, coral, salmon, apricot, orange, tangerine, amber, ochre, "
    "saffron, lemon, mustard, khaki, olive, emerald, jade, turquoise, teal, cyan, azure, cobalt, navy, indigo, "
    "violet, lilac, lavender, purple, magenta, fuchsia, rose, beige, cream, white, grey, charcoal, black, sepia, "
    "chestnut"
)
MATERIALS = _split(
    "bronze, copper, brass, pewter, silver, gold, platinum, iron, steel, zinc, nickel, ebony, walnut, mahogany, "
    "rosewood, cedar, birch, maple, elm, bamboo, cork, ivory, amethyst, onyx, quartz, obsidian, porcelain, "
    "terracotta, earthenware, crystal, alabaster, soapstone, leather, parchment, velvet, linen, wool, silk, felt, "
    "lacquer, horn"
)
STONES = _split(
    "granite, limestone, sandstone, marble, basalt, slate, flint, chalk, travertine, gneiss, schist, dolomite, "
    "tuff, quartzite, red brick, yellow brick, black brick, glazed tile, oak timber, pine timber, larch timber, "
    "whitewashed clay, rammed earth, cobblestone, concrete, cast iron, porphyry, greenstone, pumice, serpentine"
)
PRODUCTS = _split(
    "cheese, honey, cider, wool blankets, embroidery, pottery, salt, smoked herring, mustard seed, olives, almonds, "
    "walnuts, cherries, plums, grapes, tobacco, hops, barley, oats, rye bread, sausages, ham, oysters, mussels, "
    "mushrooms, truffles, asparagus, cabbages, onions, garlic, candles, soap, paper, glass beads, umbrellas, "
    "gloves, hats, clogs, carpets, baskets, barrels, knives, needles, buttons, kites, dolls, saddles, fishing nets, "
    "roses, tulips, peat"
)
PROFESSIONS = _split(
    "architect, astronomer, baker, beekeeper, blacksmith, botanist, brewer, bricklayer, butcher, carpenter, "
    "cartographer, chemist, clockmaker, cobbler, cook, dentist, diplomat, diver, draper, dyer, engineer, engraver, "
    "falconer, farmer, ferryman, fisher, florist, forester, gardener, geologist, glassblower, goldsmith, grocer, "
    "gunsmith, historian, innkeeper, jeweller, joiner, judge, librarian, locksmith, mason, mathematician, midwife, "
    "miller, miner, nurse, optician, painter, pharmacist, photographer, physician, pilot, plumber, poet, potter, "
    "printer, roofer, sailor, sculptor, shepherd, shoemaker, surgeon, surveyor, tailor, tanner, translator, "
    "upholsterer, vintner, weaver, wheelwright, zoologist"
)
INSTRUMENTS = _split(
    "accordion, bagpipes, banjo, bassoon, bugle, castanets, celesta, cello, clarinet, cornet, cymbals, double bass, "
    "dulcimer, fiddle, flute, glockenspiel, guitar, hammered zither, harmonica, harmonium, harp, harpsichord, "
    "hurdy-gurdy, kettledrum, lute, lyre, mandolin, marimba, oboe, ocarina, pan flute, piano, piccolo, psaltery, "
    "recorder, saxophone, sitar, snare drum, spinet, tambourine, theremin, triangle, trombone, trumpet, tuba, "
    "viola, violin, xylophone"
)
LANGUAGES = _split(
    "Albanian, Amharic, Arabic, Armenian, Basque, Bengali, Breton, Bulgarian, Burmese, Catalan, Croatian, Czech, "
    "Danish, Dutch, Estonian, Faroese, Finnish, French, Frisian, Galician, Georgian, German, Greek, Gujarati, "
    "Hausa, Hebrew, Hindi, Hungarian, Icelandic, Irish, Italian, Japanese, Kazakh, Khmer, Korean, Latin, Latvian, "
    "Lithuanian, Maltese, Mongolian, Nepali, Norwegian, Persian, Polish, Portuguese, Romanian, Russian, Sanskrit, "
    "Serbian, Slovak, Somali, Spanish, Swahili, Swedish, Tamil, Thai, Tibetan, Turkish, Ukrainian, Urdu, "
    "Vietnamese, Welsh"
)
TRADES = _split(
    "shipbuilding, bookbinding, optics, bell casting, cartography, forestry, brewing, weaving, dyeing, tanning, "
    "papermaking, glassmaking, mining, quarrying, fishing, canal transport, horse breeding, cheese making, "
    "viticulture, beekeeping, archaeology, astronomy, botany, geology, meteorology, medicine, dentistry, veterinary "
    "care, law, banking, insurance, printing, translation, typography, photography, sculpture, choral singing, "
    "ballet, puppetry, chess, fencing, rowing, mountaineering, sailing, clockmaking, lock making, rope making, "
    "pottery, tea blending"
)
ANIMALS = _split(
    "badger, bear, beaver, bison, boar, butterfly, camel, chamois, cormorant, crane, cricket, crocodile, deer, "
    "dolphin, dragonfly, eagle, elephant, falcon, flamingo, fox, gazelle, giraffe, goose, hare, hawk, hedgehog, "
    "heron, horse, ibex, jackal, kingfisher, leopard, lion, lizard, lobster, lynx, magpie, marten, mole, moose, "
    "nightingale, octopus, otter, owl, panther, peacock, pelican, pheasant, pigeon, rabbit, raven, rooster, "
    "salamander, scorpion, seahorse, squirrel, stork, sturgeon, swallow, swan, tiger, tortoise, walrus, whale, "
    "wolf, woodpecker, zebra"
)
SUBJECTS = _split(
    "a shipwreck, a flood, a famine, a long siege, a lost child, a stolen horse, a forbidden marriage, a duel, a "
    "pilgrimage, a harvest, a volcano, an eclipse, a comet, a plague, a snowstorm, a great fire, a forest, a "
    "lighthouse, a monastery, a mutiny, a treasure, a shepherd girl, a blind king, an old soldier, a jealous queen, "
    "a ghost, a dragon, a sea serpent, a talking raven, a wandering minstrel, a miser, a false prophet, a "
    "coronation, a gold rush, a desert crossing, a polar voyage, a spring morning, a winter night, a railway "
    "strike, a trial for witchcraft"
)
DISHES = _split(
    "onion soup, lentil stew, fish soup, roast duck, roast goose, apple cake, plum cake, carrot cake, honey cake, "
    "cherry pie, pumpkin pie, meat pie, cheese fondue, potato pancakes, buckwheat pancakes, stuffed peppers, "
    "stuffed cabbage, grilled trout, smoked eel, pickled herring, boiled crab, barley porridge, rice pudding, "
    "almond biscuits, ginger biscuits, poppy rolls, cinnamon rolls, garlic bread, mutton curry, bean salad, "
    "beetroot salad, mushroom omelette, venison stew, rabbit stew, liver dumplings, cheese dumplings, fried squid, "
    "walnut bread, lemon sorbet"
)
