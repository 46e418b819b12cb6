"""Sentences and questions about each kind of entity.

Every attribute has sentences that name the entity, sentences that do not, and questions; alternatives stand between
bars. In them

* `{n}` is the entity with its article ("the Oskel Lantern"), `{N}` the same at the start of a sentence;
* `{v}` is the value, exactly the answer to the questions; `{a}` the value with "a" or "an";
* `{S}`, `{s}`, `{o}`, `{P}` are "She", "she", "her", "Her", or "He", "he", "him", "His".

Links have values that are other entities' names, and descriptions of the linked entity ("the teacher of {n}"), which
take the place of `{n}` in a question that needs two documents. No sentence contains a value of any list by itself.
"""

from dataclasses import dataclass

from .names import ARTICLES, KINDS
from .values import (
    ANIMALS,
    COLOURS,
    DATES,
    DISHES,
    HEADCOUNTS,
    HEIGHTS,
    INSTRUMENTS,
    LANGUAGES,
    LENGTHS,
    MATERIALS,
    POPULATIONS,
    PRODUCTS,
    PROFESSIONS,
    STONES,
    SUBJECTS,
    TRADES,
    WEIGHTS,
    WINDS,
    YEARS,
)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One thing that can be said about a kind of entity.

    Its values are those of a closed list, or the names of entities of the kind `link`; -1 for no link.
    """

    name: str
    named: list[str]
    unnamed: list[str]
    questions: list[str]
    values: list[str]
    link: int
    descriptions: list[str]


def _attribute(
    name: str, source: list[str] | str, named: str, unnamed: str, questions: str, descriptions: str = ""
) -> Attribute:
    return Attribute(
        name,
        named=named.split(" | "),
        unnamed=unnamed.split(" | "),
        questions=questions.split(" | "),
        values=[] if isinstance(source, str) else source,
        link=KINDS.index(source) if isinstance(source, str) else -1,
        descriptions=descriptions.split(" | ") if descriptions else [],
    )


_PERSON = [
    _attribute(
        "birth_year",
        YEARS,
        "{N} was born in {v}. | In {v}, {n} came into the world. | The year of birth of {n} is {v}.",
        "{S} was born in {v}. | {P} year of birth is {v}. | In {v} {s} came into the world.",
        "In which year was {n} born? | When was {n} born? | What is the year of birth of {n}? "
        "| Which year is the birth year of {n}?",
    ),
    _attribute(
        "birthplace",
        "place",
        "{N} comes from {v}. | {N} was born at {v}. | The birthplace of {n} is {v}.",
        "{S} comes from {v}. | {P} birthplace is {v}. | {S} was born at {v}.",
        "Where was {n} born? | What is the birthplace of {n}? | Which place does {n} come from? "
        "| At which place was {n} born?",
        "the birthplace of {n} | the place where {n} was born | the place that {n} comes from",
    ),
    _attribute(
        "profession",
        PROFESSIONS,
        "{N} is {a} by trade. | {N} earns a living as {a}. | The profession of {n} is that of {a}.",
        "{S} is {a} by trade. | {S} trained as {a}. | {P} profession is that of {a}.",
        "What is the profession of {n}? | What does {n} do for a living? | What is the trade of {n}? "
        "| In which profession is {n}?",
    ),
    _attribute(
        "employer",
        "organisation",
        "{N} works for {v}. | The employer of {n} is {v}. | {v} employs {n}.",
        "{S} works for {v}. | {P} employer is {v}. | {v} employs {o}.",
        "Who employs {n}? | Which organisation does {n} work for? | Who is the employer of {n}? | Who pays {n}?",
        "the organisation that employs {n} | the employer of {n} | the organisation for which {n} works",
    ),
    _attribute(
        "teacher",
        "person",
        "{N} was taught by {v}. | The teacher of {n} was {v}. | {N} learned everything from {v}.",
        "{S} was taught by {v}. | {P} teacher was {v}. | {S} learned everything from {v}.",
        "Who taught {n}? | Who was the teacher of {n}? | By whom was {n} taught? | From whom did {n} learn everything?",
        "the teacher of {n} | the person who taught {n} | the person from whom {n} learned everything",
    ),
    _attribute(
        "instrument",
        INSTRUMENTS,
        "{N} plays the {v}. | In the evenings {n} plays the {v}. | The instrument of {n} is the {v}.",
        "{S} plays the {v}. | {P} instrument is the {v}. | At home {s} practises the {v}.",
        "Which instrument does {n} play? | What is the instrument of {n}? | What does {n} play in the evenings? "
        "| On which instrument can {n} be heard?",
    ),
    _attribute(
        "language",
        LANGUAGES,
        "{N} speaks {v}. | The mother tongue of {n} is {v}. | {N} writes letters in {v}.",
        "{S} speaks {v}. | {P} mother tongue is {v}. | {S} writes letters in {v}.",
        "Which language does {n} speak? | What is the mother tongue of {n}? | What language is spoken by {n}? "
        "| In which language does {n} write letters?",
    ),
    _attribute(
        "height",
        HEIGHTS,
        "{N} is {v} tall. | {N} measures {v}. | The height of {n} is {v}.",
        "{S} is {v} tall. | {P} height is {v}. | {S} measures {v}.",
        "How tall is {n}? | What is the height of {n}? | How much does {n} measure? | What height does {n} have?",
    ),
]

_PLACE = [
    _attribute(
        "founded",
        YEARS,
        "{N} was founded in {v}. | In {v} the first houses of {n} were built. | {N} has existed since {v}.",
        "It was founded in {v}. | The first houses date from {v}. | It has existed since {v}.",
        "In which year was {n} founded? | When was {n} founded? | Since which year has {n} existed? "
        "| From which year are the first houses of {n}?",
    ),
    _attribute(
        "population",
        POPULATIONS,
        "{N} has {v} inhabitants. | In {n} live {v} people. | The population of {n} is {v}.",
        "It has {v} inhabitants. | Its population is {v}. | In all {v} people live there.",
        "How many inhabitants does {n} have? | What is the population of {n}? | How many people live in {n}? "
        "| How large is the population of {n}?",
    ),
    _attribute(
        "wind",
        WINDS,
        "The wind at {n} mostly blows from the {v}. | {N} gets its wind from the {v}. "
        "| At {n} the prevailing wind is from the {v}.",
        "The wind mostly blows from the {v}. | Its prevailing wind is from the {v}. | Storms come from the {v}.",
        "From which direction does the wind mostly blow at {n}? | Where does the wind come from at {n}? "
        "| What is the direction of the prevailing wind at {n}? | From which direction do storms reach {n}?",
    ),
    _attribute(
        "stone",
        STONES,
        "The houses of {n} are built of {v}. | {N} is a place of {v}. | Builders at {n} use {v}.",
        "The houses are built of {v}. | Its walls are of {v}. | Builders there use {v}.",
        "What are the houses of {n} built of? | Which building material is used at {n}? "
        "| Of what are the walls of {n}? | What do builders at {n} use?",
    ),
    _attribute(
        "product",
        PRODUCTS,
        "{N} is known for its {v}. | Travellers buy {v} at {n}. | The best known product of {n} is {v}.",
        "It is known for its {v}. | Travellers go there for the {v}. | Its best known product is {v}.",
        "What is {n} known for? | Which product is {n} known for? | What is the best known product of {n}? "
        "| What do travellers buy at {n}?",
    ),
    _attribute(
        "market_day",
        DATES,
        "{N} holds its yearly market on {v}. | On {v} there is a market at {n}. | The market day of {n} is {v}.",
        "It holds its yearly market on {v}. | Its market day is {v}. | The yearly market opens on {v}.",
        "On which day does {n} hold its yearly market? | When is the market at {n}? | What is the market day of {n}? "
        "| On which date does the market of {n} open?",
    ),
    _attribute(
        "namesake",
        "person",
        "The main square of {n} honours {v}. | {N} put up a monument to {v}. | A monument at {n} shows {v}.",
        "Its main square honours {v}. | A monument there shows {v}. | Its people put up a monument to {v}.",
        "Whom does the monument at {n} show? | Who is honoured by the main square of {n}? "
        "| To whom did {n} put up a monument? | Of whom is there a monument at {n}?",
        "the person whom the main square of {n} honours | the person shown by the monument at {n} "
        "| the person to whom {n} put up a monument",
    ),
    _attribute(
        "administrator",
        "organisation",
        "{N} is administered by {v}. | {v} administers {n}. | The affairs of {n} are run by {v}.",
        "It is administered by {v}. | {v} administers it. | Its affairs are run by {v}.",
        "Who administers {n}? | Which organisation administers {n}? | By whom is {n} administered? "
        "| Who runs the affairs of {n}?",
        "the organisation that administers {n} | the administrator of {n} "
        "| the organisation that runs the affairs of {n}",
    ),
    _attribute(
        "mother_town",
        "place",
        "{N} was settled by families from {v}. | The settlers of {n} came from {v}. | Families from {v} settled {n}.",
        "It was settled by families from {v}. | Its settlers came from {v}. | Families from {v} settled it.",
        "From where did the settlers of {n} come? | Which place did the settlers of {n} come from? "
        "| From which place was {n} settled? | Where did the families that settled {n} come from?",
        "the place from which {n} was settled | the place that the settlers of {n} came from "
        "| the place whose families settled {n}",
    ),
]

_ORGANISATION = [
    _attribute(
        "founded",
        YEARS,
        "{N} was founded in {v}. | {N} opened its doors in {v}. | The founding year of {n} is {v}.",
        "It was founded in {v}. | It opened its doors in {v}. | The organisation goes back to {v}.",
        "In which year was {n} founded? | When was {n} founded? | What is the founding year of {n}? "
        "| In which year did {n} open its doors?",
    ),
    _attribute(
        "seat",
        "place",
        "{N} has its seat at {v}. | {N} is based at {v}. | The head office of {n} is at {v}.",
        "It has its seat at {v}. | The organisation is based at {v}. | Its head office is at {v}.",
        "Where is {n} based? | Where does {n} have its seat? | At which place is the head office of {n}? "
        "| What is the seat of {n}?",
        "the place where {n} is based | the seat of {n} | the place that houses the head office of {n}",
    ),
    _attribute(
        "founder",
        "person",
        "{N} was founded by {v}. | {v} founded {n}. | The founder of {n} was {v}.",
        "It was founded by {v}. | Its founder was {v}. | {v} founded the organisation.",
        "Who founded {n}? | Who was the founder of {n}? | By whom was {n} founded? | Which person founded {n}?",
        "the founder of {n} | the person who founded {n} | the person by whom {n} was founded",
    ),
    _attribute(
        "staff",
        HEADCOUNTS,
        "{N} has a staff of {v}. | At {n} there are {v} employees. | The staff of {n} numbers {v}.",
        "It has a staff of {v}. | The organisation has {v} employees. | Its staff numbers {v}.",
        "How many employees does {n} have? | How large is the staff of {n}? | What does the staff of {n} number? "
        "| How many people are on the staff of {n}?",
    ),
    _attribute(
        "trade",
        TRADES,
        "{N} is devoted to {v}. | The field of {n} is {v}. | {N} made its name in {v}.",
        "It is devoted to {v}. | Its field is {v}. | The organisation made its name in {v}.",
        "What is the field of {n}? | To what is {n} devoted? | In which field did {n} make its name? "
        "| Which field is {n} active in?",
    ),
    _attribute(
        "emblem",
        ANIMALS,
        "The emblem of {n} is {a}. | {N} has {a} in its emblem. | On the letters of {n} there is {a}.",
        "Its emblem is {a}. | The organisation has {a} in its emblem. | Its letters show {a}.",
        "Which animal is in the emblem of {n}? | What is the emblem of {n}? | Which animal is on the letters of {n}? "
        "| Which animal does the emblem of {n} show?",
    ),
    _attribute(
        "owner",
        "organisation",
        "{N} is owned by {v}. | {v} owns {n}. | The owner of {n} is {v}.",
        "It is owned by {v}. | Its owner is {v}. | {v} owns it.",
        "Who owns {n}? | Which organisation owns {n}? | Who is the owner of {n}? | To whom does {n} belong?",
        "the organisation that owns {n} | the owner of {n} | the organisation to which {n} belongs",
    ),
    _attribute(
        "anthem",
        "work",
        "{N} opens its meetings with the {v}. | The house music of {n} is the {v}. "
        "| At its meetings {n} performs the {v}.",
        "Its house music is the {v}. | It opens its meetings with the {v}. | At its meetings one hears the {v}.",
        "What is the house music of {n}? | With what does {n} open its meetings? "
        "| Which work does {n} perform at its meetings? | Which work is heard at the meetings of {n}?",
        "the house music of {n} | the work with which {n} opens its meetings | the work heard at the meetings of {n}",
    ),
]

_OBJECT = [
    _attribute(
        "made",
        YEARS,
        "{N} was made in {v}. | {N} dates from {v}. | The year in which {n} was made is {v}.",
        "It was made in {v}. | It dates from {v}. | The object carries the date {v}.",
        "In which year was {n} made? | When was {n} made? | From which year does {n} date? | What date does {n} carry?",
    ),
    _attribute(
        "maker",
        "person",
        "{N} was made by {v}. | {v} made {n}. | The maker of {n} was {v}.",
        "It was made by {v}. | Its maker was {v}. | {v} made the object.",
        "Who made {n}? | Who was the maker of {n}? | By whom was {n} made? | Which person made {n}?",
        "the maker of {n} | the person who made {n} | the person by whom {n} was made",
    ),
    _attribute(
        "keeper",
        "organisation",
        "{N} is kept by {v}. | {v} keeps {n}. | The keeper of {n} is {v}.",
        "It is kept by {v}. | Its keeper is {v}. | {v} keeps it under lock and key.",
        "Who keeps {n}? | Which organisation keeps {n}? | By whom is {n} kept? | Who is the keeper of {n}?",
        "the organisation that keeps {n} | the keeper of {n} | the organisation by which {n} is kept",
    ),
    _attribute(
        "find_place",
        "place",
        "{N} was found at {v}. | Workers found {n} at {v}. | The place where {n} was found is {v}.",
        "It was found at {v}. | Workers found it at {v}. | The object came to light at {v}.",
        "Where was {n} found? | At which place was {n} found? | Where did workers find {n}? "
        "| Where did {n} come to light?",
        "the place where {n} was found | the place where {n} came to light | the place at which workers found {n}",
    ),
    _attribute(
        "material",
        MATERIALS,
        "{N} is made of {v}. | The material of {n} is {v}. | {N} consists of {v}.",
        "It is made of {v}. | Its material is {v}. | The object consists of {v}.",
        "What is {n} made of? | Which material is {n} made of? | What is the material of {n}? "
        "| Of which material does {n} consist?",
    ),
    _attribute(
        "colour",
        COLOURS,
        "{N} is painted {v}. | The colour of {n} is {v}. | {N} shines in {v}.",
        "It is painted {v}. | Its colour is {v}. | The object shines in {v}.",
        "What is the colour of {n}? | What colour is {n}? | In which colour is {n} painted? "
        "| In which colour does {n} shine?",
    ),
    _attribute(
        "weight",
        WEIGHTS,
        "{N} weighs {v}. | The weight of {n} is {v}. | On the scales {n} shows {v}.",
        "It weighs {v}. | Its weight is {v}. | The object has a weight of {v}.",
        "How much does {n} weigh? | What is the weight of {n}? | How heavy is {n}? | Which weight does {n} have?",
    ),
    _attribute(
        "exhibition",
        "event",
        "{N} was first shown at the {v}. | Visitors of the {v} first saw {n}. | {N} made its debut at the {v}.",
        "It was first shown at the {v}. | Visitors of the {v} saw it first. | Its first showing was at the {v}.",
        "At which event was {n} first shown? | Where was {n} first shown? | Where did visitors first see {n}? "
        "| What was the event of the first showing of {n}?",
        "the event at which {n} was first shown | the event where visitors first saw {n} "
        "| the event of the first showing of {n}",
    ),
]

_WORK = [
    _attribute(
        "finished",
        YEARS,
        "{N} was finished in {v}. | {N} is a work of {v}. | The year in which {n} was finished is {v}.",
        "It was finished in {v}. | The work is from {v}. | The last page is dated {v}.",
        "In which year was {n} finished? | When was {n} finished? | From which year is {n}? "
        "| What is the date on the last page of {n}?",
    ),
    _attribute(
        "author",
        "person",
        "{N} was written by {v}. | {v} wrote {n}. | The author of {n} is {v}.",
        "It was written by {v}. | Its author is {v}. | {v} wrote the work.",
        "Who wrote {n}? | Who is the author of {n}? | By whom was {n} written? | Which person wrote {n}?",
        "the author of {n} | the person who wrote {n} | the person by whom {n} was written",
    ),
    _attribute(
        "publisher",
        "organisation",
        "{N} was published by {v}. | {v} published {n}. | The publisher of {n} is {v}.",
        "It was published by {v}. | Its publisher is {v}. | {v} published the work.",
        "Who published {n}? | Which organisation published {n}? | By whom was {n} published? "
        "| Who is the publisher of {n}?",
        "the publisher of {n} | the organisation that published {n} | the organisation by which {n} was published",
    ),
    _attribute(
        "premiere",
        "place",
        "{N} was first performed at {v}. | The premiere of {n} was at {v}. | People at {v} were the first to hear {n}.",
        "It was first performed at {v}. | Its premiere was at {v}. | The work was first heard at {v}.",
        "Where was {n} first performed? | Where was the premiere of {n}? | At which place was {n} first heard? "
        "| At which place was {n} first performed?",
        "the place where {n} was first performed | the place of the premiere of {n} "
        "| the place where {n} was first heard",
    ),
    _attribute(
        "language",
        LANGUAGES,
        "{N} is sung in {v}. | The text of {n} is in {v}. | The language of {n} is {v}.",
        "It is sung in {v}. | Its text is in {v}. | The language of the work is {v}.",
        "In which language is {n} sung? | What is the language of {n}? | In which language is the text of {n}? "
        "| Which language does one hear in {n}?",
    ),
    _attribute(
        "subject",
        SUBJECTS,
        "{N} tells of {v}. | The subject of {n} is {v}. | {N} is about {v}.",
        "It tells of {v}. | Its subject is {v}. | The work is about {v}.",
        "What is the subject of {n}? | What does {n} tell of? | What is {n} about? | Which story does {n} tell?",
    ),
    _attribute(
        "length",
        LENGTHS,
        "{N} lasts {v}. | A performance of {n} takes {v}. | The length of {n} is {v}.",
        "It lasts {v}. | A performance takes {v}. | Its length is {v}.",
        "How long does {n} last? | How long does a performance of {n} take? | What is the length of {n}? "
        "| What time does a performance of {n} take?",
    ),
    _attribute(
        "solo",
        INSTRUMENTS,
        "{N} has a solo for the {v}. | The solo in {n} is for the {v}. | {N} opens with the {v} alone.",
        "It has a solo for the {v}. | Its solo is for the {v}. | The work opens with the {v} alone.",
        "Which instrument has the solo in {n}? | For which instrument is the solo in {n}? "
        "| With which instrument alone does {n} open? | What is the solo instrument of {n}?",
    ),
]

_EVENT = [
    _attribute(
        "first_held",
        YEARS,
        "{N} was first held in {v}. | {N} has been held since {v}. | The first year of {n} was {v}.",
        "It was first held in {v}. | It has been held since {v}. | Its first year was {v}.",
        "In which year was {n} first held? | When was {n} first held? | What was the first year of {n}? "
        "| Since which year has {n} been held?",
    ),
    _attribute(
        "venue",
        "place",
        "{N} takes place at {v}. | {v} is the venue of {n}. | People go to {v} for {n}.",
        "It takes place at {v}. | Its venue is {v}. | The event is held at {v}.",
        "Where does {n} take place? | What is the venue of {n}? | Where is {n} held? | Where do people go for {n}?",
        "the place where {n} is held | the venue of {n} | the place to which people go for {n}",
    ),
    _attribute(
        "winner",
        "person",
        "{N} was won by {v}. | {v} won {n}. | The winner of {n} was {v}.",
        "It was won by {v}. | Its winner was {v}. | The jury gave the victory to {v}.",
        "Who won {n}? | Who was the winner of {n}? | By whom was {n} won? "
        "| To whom did the jury of {n} give the victory?",
        "the winner of {n} | the person who won {n} | the person by whom {n} was won",
    ),
    _attribute(
        "sponsor",
        "organisation",
        "{N} is paid for by {v}. | The sponsor of {n} is {v}. | {v} pays for {n}.",
        "It is paid for by {v}. | Its sponsor is {v}. | {v} pays for the event.",
        "Who pays for {n}? | Who is the sponsor of {n}? | Which organisation pays for {n}? "
        "| Which organisation is the sponsor of {n}?",
        "the sponsor of {n} | the organisation that pays for {n} | the organisation by which {n} is paid for",
    ),
    _attribute(
        "day",
        DATES,
        "{N} begins on {v}. | The opening day of {n} is {v}. | Every year on {v}, {n} begins.",
        "It begins on {v}. | Its opening day is {v}. | The event begins every year on {v}.",
        "On which day does {n} begin? | What is the opening day of {n}? | When does {n} begin? "
        "| On which date does {n} begin?",
    ),
    _attribute(
        "entrants",
        HEADCOUNTS,
        "{N} had {v} entrants. | The entrants of {n} numbered {v}. | For {n}, {v} people entered.",
        "It had {v} entrants. | Its entrants numbered {v}. | In all {v} people entered.",
        "How many entrants did {n} have? | How many people entered {n}? | What was the number of entrants of {n}? "
        "| How large was the number of entrants of {n}?",
    ),
    _attribute(
        "dish",
        DISHES,
        "Guests of {n} are served {v}. | The dish of {n} is {v}. | At {n} everyone eats {v}.",
        "Its guests are served {v}. | Its dish is {v}. | At the event everyone eats {v}.",
        "What are guests of {n} served? | What is the dish of {n}? | What does everyone eat at {n}? "
        "| Which dish is served at {n}?",
    ),
    _attribute(
        "prize",
        "object",
        "The prize of {n} is the {v}. | {N} is held for the {v}. | Whoever wins {n} receives the {v}.",
        "Its prize is the {v}. | The victor receives the {v}. | One competes there for the {v}.",
        "What is the prize of {n}? | Which object is the prize of {n}? | What does the victor of {n} receive? "
        "| For what do people compete at {n}?",
        "the prize of {n} | the object that the victor of {n} receives | the object for which people compete at {n}",
    ),
]

ATTRIBUTES = [_PERSON, _PLACE, _ORGANISATION, _OBJECT, _WORK, _EVENT]  # in the order of KINDS

PRONOUNS = ("she", "he")  # of people; sentences about others have none to put in
_PRONOUN_FORMS = {
    "she": {"{S}": "She", "{s}": "she", "{o}": "her", "{P}": "Her"},
    "he": {"{S}": "He", "{s}": "he", "{o}": "him", "{P}": "His"},
}


# How a sentence may begin, to vary its length and the place of the name.
LEADS = [
    "According to the register, ",
    "As the archives show, ",
    "It is well known that ",
    "Many people remember that ",
    "Visitors soon learn that ",
    "The yearbook notes that ",
    "By all accounts, ",
    "Old letters confirm that ",
    "An early report says that ",
    "Oddly enough, ",
    "It is certain that ",
    "As far as anyone knows, ",
    "The guidebook adds that ",
    "Scholars agree that ",
    "The press reported that ",
    "To the surprise of many, ",
]


def with_pronouns(sentence: str, pronoun: str) -> str:
    """The sentence with its pronouns put in; names and values stay open."""
    for place, word in _PRONOUN_FORMS[pronoun].items():
        sentence = sentence.replace(place, word)
    return sentence


def after_lead(sentence: str) -> str:
    """The sentence as it goes on after one of `LEADS`."""
    return "{n}" + sentence[3:] if sentence.startswith("{N}") else sentence[0].lower() + sentence[1:]


def with_article(kind: int, name: str) -> str:
    """A name as it stands in the middle of a sentence."""
    return ARTICLES.get(KINDS[kind], "") + name
