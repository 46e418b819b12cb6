"""Corpora with planted questions: what is asked is read back out of the texts, with the templates and nothing else."""

import hashlib
import pickle
import re
from collections import Counter
from itertools import pairwise

import pytest
from helpers.world_reader import HEADING, QUESTIONS, Reader, kind_of, readings_of

from msa_hf.synthetic.chain_corpora import ChainCorpus, ChainQuestion, make_chain_corpus
from msa_hf.synthetic.corpora import UNANSWERABLE, make_corpus
from msa_hf.synthetic.kinds import BREAKS, CHAIN_KINDS, HOPS, ChainKind
from msa_hf.synthetic.names import FORMS, KINDS
from msa_hf.synthetic.templates import ATTRIBUTES
from msa_hf.synthetic.two_entities import COMPARISONS, HAPPENINGS, JOIN_QUESTIONS, ORDER_QUESTIONS

PROSE = [f"Real prose, item {number}, without any name." for number in range(7)]
EVERY = dict.fromkeys(CHAIN_KINDS, 8)
DISTANCES = (40, 700)


@pytest.fixture(scope="module", params=[1, 10**6], ids=["usual", "crowded"])
def corpus(request: pytest.FixtureRequest) -> ChainCorpus:
    options = {"seed": 4, "split": "test", "prose": PROSE, "prose_share": 0.2, "crowding": request.param}
    return make_chain_corpus(2000, EVERY, DISTANCES, **options)


@pytest.fixture(scope="module")
def reader(corpus: ChainCorpus) -> Reader:
    return Reader(corpus)


def some(corpus: ChainCorpus, *kinds: ChainKind, twins: bool) -> list[ChainQuestion]:
    found = [q for q in corpus.questions if q.kind in kinds and (q.broken is not None) == twins]
    assert len(found) >= 8
    return found


def two_named(text: str, templates: list[str]) -> set[tuple[str, str, str]]:
    """(template, first, second) of every way to read a question about two entities; subjects without article."""
    found = set()
    for template in templates:
        pattern = re.escape(template).replace(r"\{n\}", "(.+)", 1).replace(r"\{m\}", "(.+)", 1)
        if match := re.fullmatch(pattern, text):
            found.add((template, match[1].removeprefix("the "), match[2].removeprefix("the ")))
    return found


# Chains


def test_chains_have_one_answer_that_takes_every_document(corpus: ChainCorpus, reader: Reader):
    for question in some(corpus, *HOPS, twins=False):
        assert len(question.positives) == len(set(question.positives)) == HOPS[question.kind] == question.hops
        assert question.rounds == tuple((place,) for place in question.positives)
        assert reader.answer(question.text) == {question.answer}
        *before, last = question.positives
        assert question.answer in reader.texts[last]
        assert not any(question.answer in reader.texts[place] for place in before)
        names = [reader.names[place] or "" for place in question.positives]
        assert names[0] in question.text and not any(name in question.text for name in names[1:])
        for hop, place in enumerate(question.positives[:-1]):
            told = [name for name in names[hop + 1 :] if name in reader.texts[place]]
            assert told == [names[hop + 1]]  # the next one, and none that would skip a document


def test_no_document_of_a_chain_leads_past_the_next_one_in_small_worlds():
    """Where few entities are linked to each other, some would by chance."""
    count = 0
    for seed in range(8):
        corpus = make_chain_corpus(90, {"three_hop": 3, "four_hop": 2}, seed=seed)
        texts, names = corpus.texts(), corpus.names()
        for question in corpus.questions[::2]:
            for hop, place in enumerate(question.positives):
                later = [*(names[other] or "" for other in question.positives[hop + 2 :]), question.answer]
                assert not any(text in texts[place] for text in later if place != question.positives[-1])
                count += 1
    assert count == 8 * (9 + 8)


def test_twins_of_chains_have_no_answer_and_break_where_they_say(corpus: ChainCorpus, reader: Reader):
    seen = Counter()
    for question in some(corpus, *HOPS, twins=True):
        assert question.answer == UNANSWERABLE
        assert reader.answer(question.text) == set()
        hop, broken = question.broken_hop, question.broken
        assert hop is not None and 1 <= hop <= question.hops
        assert len(question.positives) == hop - (broken == "removed")
        for place, following in pairwise(question.positives):
            assert (reader.names[following] or "") in reader.texts[place]
        seen[question.kind, broken] += 1
    assert set(seen) == {(kind, broken) for kind in HOPS for broken in BREAKS}


def test_a_question_and_its_twin_ask_the_same_of_others(corpus: ChainCorpus, reader: Reader):
    for question, twin in zip(corpus.questions[::2], corpus.questions[1::2], strict=True):
        assert question.kind == twin.kind and question.broken is None and twin.broken is not None
        assert question.text != twin.text and not set(question.positives) & set(twin.positives)
        if question.kind in HOPS:
            slots = [{slot for slot, _ in readings_of(item.text, QUESTIONS)} for item in (question, twin)]
            assert slots[0] & slots[1]
    places = [place for question in corpus.questions for place in question.positives]
    assert len(places) == len(set(places))  # no document serves two questions


# Two entities


def compared(reader: Reader, question: ChainQuestion) -> set[str]:
    """All answers to a comparison that the records allow."""
    answers = set()
    for way in COMPARISONS:
        for _, *names in two_named(question.text, list(way.questions)):
            attribute = ATTRIBUTES[way.kind][way.attribute].name
            answers |= winner(reader, names, [KINDS[way.kind]] * 2, [attribute] * 2, way.greatest)
    return answers


def ordered(reader: Reader, question: ChainQuestion) -> set[str]:
    answers = set()
    for latest, frames in enumerate(ORDER_QUESTIONS):
        for _, *phrases in two_named(question.text, list(frames)):
            readings = [
                [
                    (match[1].removeprefix("the "), KINDS[item.kind], ATTRIBUTES[item.kind][item.attribute].name)
                    for item in HAPPENINGS
                    for phrase in item.phrases
                    if (match := re.fullmatch(re.escape("the " + phrase.removeprefix("the ")).replace(r"\{n\}", "(.+)"),
                                              "the " + told))
                ]
                for told in phrases
            ]  # fmt: skip
            for one in readings[0]:
                for other in readings[1]:
                    names, kinds, attributes = zip(one, other, strict=True)
                    answers |= winner(reader, list(names), list(kinds), list(attributes), bool(latest))
    return answers


def winner(reader: Reader, names: list[str], kinds: list[str], attributes: list[str], greatest: bool) -> set[str]:
    if any(name not in reader.where or kind_of(name) != kind for name, kind in zip(names, kinds, strict=True)):
        return set()
    values = [reader.records[reader.where[name]].get(item) for name, item in zip(names, attributes, strict=True)]
    if None in values:
        return set()
    numbers = [float(str(value).split()[0].replace(",", "")) for value in values]
    assert numbers[0] != numbers[1]
    return {names[(numbers[1] > numbers[0]) == greatest]}


def shared(reader: Reader, question: ChainQuestion) -> set[str]:
    answers = set()
    for _, *names in two_named(question.text, list(JOIN_QUESTIONS)):
        if all(name in reader.where for name in names):
            first, second = (set(reader.records[reader.where[name]].values()) for name in names)
            answers |= first & second
    return answers


@pytest.mark.parametrize(("kind", "answers"), [("comparison", compared), ("order", ordered), ("join", shared)])
def test_questions_about_two_have_one_answer_and_twins_none(corpus: ChainCorpus, reader: Reader, kind, answers):
    for question in some(corpus, kind, twins=False):
        assert answers(reader, question) == {question.answer}
        assert len(set(question.positives)) == 2
        if kind != "join":  # one of the two: neither document alone tells
            assert question.answer in {reader.names[place] for place in question.positives}
    first = [q.answer == reader.names[q.positives[0]] for q in some(corpus, kind, twins=False)]
    assert kind == "join" or 0 < sum(first) < len(first)
    broken = Counter()
    for twin in some(corpus, kind, twins=True):
        assert answers(reader, twin) == set() and twin.answer == UNANSWERABLE
        assert len(twin.positives) == 1 + (twin.broken == "unstated")
        broken[twin.broken] += 1
    assert set(broken) == set(BREAKS)


# Versions


def edition(text: str) -> int:
    heading = HEADING.match(text)
    assert heading, text
    return int(heading[1] or heading[2])


def test_the_later_edition_holds(corpus: ChainCorpus, reader: Reader):
    later_first = Counter()
    for question in some(corpus, "version", twins=False):
        one, other = question.positives
        assert reader.names[one] == reader.names[other]
        older, newer = sorted(question.positives, key=lambda place: edition(reader.texts[place]))
        assert edition(reader.texts[older]) < edition(reader.texts[newer])
        slots = {slot for slot, subject in readings_of(question.text, QUESTIONS) if reader.names[one] in subject}
        states = [{reader.records[place].get(attribute) for _, attribute in slots} - {None} for place in (older, newer)]
        assert question.answer in states[1] and not states[0] & states[1]
        assert question.answer not in reader.texts[older]
        later_first[newer < older, newer == one] += 1
    assert len(later_first) >= 3  # neither the place in the corpus nor the order tells


def test_neither_edition_of_a_twin_states_what_is_asked(corpus: ChainCorpus, reader: Reader):
    for twin in some(corpus, "version", twins=True):
        one, other = twin.positives
        assert reader.names[one] == reader.names[other] and reader.texts[one] != reader.texts[other]
        slots = {attribute for (_, attribute), subject in readings_of(twin.text, QUESTIONS) if subject}
        kinds = {kind for (kind, _), _ in readings_of(twin.text, QUESTIONS)}
        assert kind_of(reader.names[one] or "") in kinds
        for place in twin.positives:
            known = {a.name for a in ATTRIBUTES[KINDS.index(kind_of(reader.names[one] or ""))]}
            assert not (slots & known) & set(reader.records[place]) or len(slots & known) > 1


def test_only_editions_have_headings(corpus: ChainCorpus, reader: Reader):
    places = {place for question in corpus.questions if question.kind == "version" for place in question.positives}
    assert {place for place, text in enumerate(reader.texts) if HEADING.match(text)} == places


# Places


def test_facts_lie_as_far_apart_as_was_asked(corpus: ChainCorpus):
    asked = Counter()
    for question in corpus.questions:
        for one, other in pairwise(question.positives):
            assert question.distance in DISTANCES
            assert abs(abs(other - one) - question.distance) <= question.distance / 8
        if len(question.positives) < 2:
            assert question.distance is None
        asked[question.kind, question.distance] += len(question.positives) == question.hops
    for kind in CHAIN_KINDS[1:]:
        assert all(asked[kind, distance] >= 8 for distance in DISTANCES)


def test_facts_lie_far_apart_in_a_corpus_of_a_million_documents():
    corpus = make_chain_corpus(940_000, {"four_hop": 6}, (470_000, 150), seed=2, split="test")
    for question in corpus.questions:
        gaps = [abs(b - a) for a, b in pairwise(question.positives)]
        assert all(abs(gap - (question.distance or 0)) <= (question.distance or 0) / 8 for gap in gaps)
        names = [corpus.names(place, place + 1)[0] or "" for place in question.positives]
        texts = [corpus.texts(place, place + 1)[0] for place in question.positives]
        assert all(name in text for name, text in zip(names, texts, strict=True))
        assert all(name in text for name, text in zip(names[1:], texts, strict=False))


def test_ranges_and_copies_give_the_documents_of_the_whole():
    corpus = make_chain_corpus(4200, {"three_hop": 9, "version": 9}, (2000,), prose=PROSE, prose_share=0.3)
    texts, names, copy = corpus.texts(), corpus.names(), pickle.loads(pickle.dumps(corpus))
    assert len(texts) == len(names) == len(set(texts)) == 4200
    for start, stop in ((0, 1), (4094, 4099), (4199, 4200), (17, 17), (3000, 4150)):
        assert copy.texts(start, stop) == texts[start:stop] and copy.names(start, stop) == names[start:stop]


def test_nearest_are_others_of_the_kind(corpus: ChainCorpus, reader: Reader):
    asked = [place for question in corpus.questions for place in question.positives][:60]
    for place, row in zip(asked, corpus.nearest(asked, 3).tolist(), strict=True):
        assert len(set(row)) == 3 and reader.names[place] not in [reader.names[other] for other in row]
        assert {kind_of(reader.names[other] or "") for other in row} == {kind_of(reader.names[place] or "")}


# Names, and the same everywhere


def test_no_name_of_a_test_corpus_is_ever_trained_on():
    """Those of entities without a document among them, which only questions and links name."""
    nouns = {noun for forms in FORMS.values() for form in forms for noun in form.replace("{}", "").split()}
    words = {}
    for split in ("train", "test"):
        found: set[str] = set()
        for seed in range(3):
            corpus = make_chain_corpus(
                600, dict.fromkeys(CHAIN_KINDS, 4), seed=seed, split=split, crowding=1 + 99 * seed
            )
            old = make_corpus(300, seed=seed, split=split)
            told = [*corpus.texts(), *(question.text for question in corpus.questions), *old.texts()]
            known = [name for name in (*corpus.names(), *old.names()) if name]
            found |= {word for name in known for word in name.split()} - nouns
            found |= {word for text in told for word in re.findall(r"(?<=[a-z] )[A-Z][a-z]{6,}", text)} - nouns
        words[split] = found - {word for attributes in ATTRIBUTES for a in attributes for value in a.values
                                for word in value.split()}  # fmt: skip
    assert min(map(len, words.values())) > 1000
    assert not words["train"] & words["test"]


@pytest.mark.parametrize("change", [{"seed": 5}, {"split": "train"}, {"crowding": 2}])
def test_other_arguments_give_other_questions(change: dict):
    options = {"seed": 4, "split": "test"}
    one, other = (
        {question.text for question in make_chain_corpus(700, EVERY, **options | more).questions}
        for more in ({}, change)
    )
    assert not one & other


def test_a_corpus_is_the_same_on_every_machine():
    """The digest of what an earlier version made. It changes with the templates; nothing else may change it."""
    corpus = make_chain_corpus(500, dict.fromkeys(CHAIN_KINDS, 2), (9, 200), seed=3, prose=PROSE, prose_share=0.2)
    content = repr((corpus.texts(), corpus.names(), corpus.questions))
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "94c91e0fcf76e0ff"


# Misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, {"five_hop": 1}), "no questions of kind 'five_hop'"),
        ((100, {"two_hop": -1}), "no -1 questions"),
        ((100, {"two_hop": 1}, (100,)), "100 documents do not lie 100 apart"),
        ((100, {"two_hop": 1}, (0,)), "do not lie 0 apart"),
        ((60, {"four_hop": 40}), "too many questions .* Ask fewer questions, or of more documents"),
        ((10, {"version": 40}), "too few"),
        ((-1, {}), "no corpus"),
        ((10, {}, (None,), 0, "dev"), "dev"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        make_chain_corpus(*arguments)


def test_a_corpus_may_have_no_questions():
    corpus = make_chain_corpus(20, {})
    assert len(corpus.texts()) == 20 and corpus.questions == ()
    with pytest.raises(IndexError):
        corpus.texts(5, 21)
