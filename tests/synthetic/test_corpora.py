"""Corpora of invented entities.

Most tests read the generated texts back: `Reader` knows the templates and nothing else, takes every sentence of every
document apart, and answers the questions from what it has read.
"""

import hashlib
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable

import pytest
from helpers.world_reader import (
    DESCRIPTIONS,
    NOUNS,
    QUESTIONS,
    STATEMENTS,
    Reader,
    kind_of,
    readings_of,
    sentences_of,
)

from msa_hf.evaluation import UNANSWERABLE, Corpus, make_corpus
from msa_hf.synthetic import values as value_lists
from msa_hf.synthetic.names import KINDS
from msa_hf.synthetic.templates import ATTRIBUTES, LEADS

PROSE = [f"Real prose, item {number}, without any name." for number in range(7)]
EVERY_KIND = ("one_hop", "two_hop", "unanswerable")


@pytest.fixture(scope="module", params=[1, 10**9], ids=["usual", "crowded"])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    return make_corpus(3000, seed=4, split="test", prose=PROSE, prose_share=0.2, crowding=request.param)


@pytest.fixture(scope="module")
def reader(corpus: Corpus) -> Reader:
    return Reader(corpus)


# The same everywhere


def digest(corpus: Corpus) -> str:
    content = (corpus.texts(), corpus.facts(), *(corpus.questions(40, kind, seed=5) for kind in EVERY_KIND))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"documents": 100}, "5543a06160d8b889"),
        ({"documents": 100, "crowding": 1}, "5543a06160d8b889"),
        ({"documents": 300, "seed": 7, "split": "test", "prose": PROSE, "prose_share": 0.25}, "c79ed6220be8d0b8"),
        ({"documents": 100, "crowding": 500}, "64a0b9a3d32f0614"),
    ],
)
def test_a_corpus_is_the_same_on_every_machine(options: dict, expected: str):
    """Digests of what an earlier version made. They change when templates do; nothing else may change them."""
    assert digest(make_corpus(**options)) == expected


def test_ranges_and_copies_give_the_documents_of_the_whole():
    """Across the internal block size, and in another process's copy."""
    corpus = make_corpus(9000, prose=PROSE, prose_share=0.1)
    texts, names = corpus.texts(), corpus.names()
    copy = pickle.loads(pickle.dumps(corpus))
    for start, stop in ((0, 1), (4095, 4098), (8999, 9000), (17, 17), (4000, 8500)):
        assert copy.texts(start, stop) == texts[start:stop]
        assert copy.names(start, stop) == names[start:stop]
    assert copy.facts(4090, 4100) == corpus.facts()[4090:4100]


@pytest.mark.parametrize("change", [{"seed": 5}, {"split": "train"}, {"documents": 5000}, {"crowding": 2}])
def test_other_arguments_give_other_documents(change: dict):
    options = {"documents": 3000, "seed": 4, "split": "test", "prose": PROSE, "prose_share": 0.2}
    texts, others = (make_corpus(**options | other).texts(0, 500) for other in ({}, change))
    assert not [a for a, b in zip(texts, others, strict=True) if a == b and "Real prose" not in a]


def test_other_seeds_give_other_questions(corpus: Corpus):
    for kind in EVERY_KIND:
        first, second = ({question.text for question in corpus.questions(100, kind, seed)} for seed in (0, 1))
        assert len(first & second) < 10


# Documents


def test_every_sentence_states_one_fact_and_facts_are_those_of_the_text(corpus: Corpus, reader: Reader):
    for record, facts, name in zip(reader.records, corpus.facts(), reader.names, strict=True):
        assert list(record.items()) == [(fact.attribute, fact.answer) for fact in facts]
        assert 5 <= len(record) <= 7 if name else not record
        for fact in facts:
            attribute = next(a for a in ATTRIBUTES[KINDS.index(kind_of(name))] if a.name == fact.attribute)
            assert len(fact.questions) == len(attribute.questions) >= 4
            assert all(name in question for question in fact.questions)


def test_a_document_names_its_entity_at_both_ends_and_in_between(reader: Reader):
    for text, name in zip(reader.texts, reader.names, strict=True):
        if name:
            sentences = sentences_of(text)
            assert name in sentences[0] and name in sentences[-1]
            assert any(name in sentence for sentence in sentences[1:-1])


def test_documents_have_about_the_length_of_one_or_two_chunks(reader: Reader):
    lengths = sorted(
        len(re.findall(r"\w+|[^\w\s]", text)) for text, name in zip(reader.texts, reader.names, strict=True) if name
    )
    assert lengths[0] >= 25 and lengths[-1] <= 110
    assert 50 <= sum(lengths) / len(lengths) <= 70


def test_kinds_have_equal_shares_wherever_one_looks(reader: Reader):
    """Neither the kind nor prose can be told from the position."""
    for start in (0, 1500):
        shares = Counter(kind_of(name) if name else "prose" for name in reader.names[start : start + 1500])
        assert abs(shares.pop("prose") - 300) < 80
        assert len(shares) == len(KINDS) and all(abs(count - 200) < 60 for count in shares.values())
    assert all(len({kind_of(name) for name in reader.names[rest::6] if name}) == len(KINDS) for rest in range(6))


def test_links_lead_to_documents_in_the_stated_share():
    for share in (0.0, 0.6, 1.0):
        corpus = make_corpus(3000, linked_share=share)
        names = set(corpus.names())
        links = {(kind, a.name) for kind, row in zip(KINDS, ATTRIBUTES, strict=True) for a in row if a.link >= 0}
        leads = [
            fact.answer in names
            for name, facts in zip(corpus.names(), corpus.facts(), strict=True)
            for fact in facts
            if (kind_of(name or ""), fact.attribute) in links
        ]
        assert len(leads) > 5000
        assert abs(sum(leads) / len(leads) - share) < 0.03


def test_nobody_is_linked_to_themselves():
    corpus = make_corpus(24, linked_share=1.0)
    for name, facts in zip(corpus.names(), corpus.facts(), strict=True):
        assert all(fact.answer != name for fact in facts)


def test_every_template_and_lead_is_used():
    reader = Reader(make_corpus(9000, seed=1))
    templates = {template for rows in STATEMENTS.values() for template, *_ in rows}
    assert set(reader.used) == templates | set(LEADS) | {""}


def test_every_phrasing_of_questions_and_links_is_used():
    corpus = make_corpus(6000, seed=2)
    texts = [question.text for kind in ("one_hop", "two_hop") for question in corpus.questions(9000, kind)]
    for phrases in (QUESTIONS, DESCRIPTIONS):
        inside = "\n".join(texts)
        missing = [
            phrase.template
            for phrase in phrases
            if not re.search(re.escape(phrase.template).replace(r"\{n\}", ".+"), inside)
        ]
        assert not missing


def test_no_sentence_contains_a_value_by_itself():
    """Else a two-hop answer could stand in the first document by chance."""
    lists = {name: values for name, values in vars(value_lists).items() if name.isupper() and name[0] != "_"}
    assert len(lists) == 19
    frames = [*LEADS, *(template for rows in STATEMENTS.values() for template, *_ in rows)]
    for values in lists.values():
        assert 20 <= len(set(values)) == len(values) <= 200
        assert not [(value, frame) for value in values for frame in frames if value.lower() in frame.lower()]


# Questions


def test_one_hop_questions_have_one_answer_and_it_stands_in_the_gold_document(corpus: Corpus, reader: Reader):
    for question in corpus.questions(2000, "one_hop"):
        (gold,) = question.positives
        assert question.rounds == ((gold,),)
        assert reader.names[gold] in question.text
        assert reader.answer(question.text) == {question.answer}
        assert question.answer in reader.texts[gold]


def test_two_hop_questions_have_one_answer_and_need_both_documents(corpus: Corpus, reader: Reader):
    for question in corpus.questions(2000, "two_hop"):
        first, second = question.positives
        assert question.rounds == ((first,), (second,))
        assert reader.answer(question.text) == {question.answer}
        assert question.answer in reader.texts[second] and question.answer not in reader.texts[first]
        assert reader.names[first] in question.text and reader.names[second] not in question.text
        assert reader.names[second] in reader.texts[first]


def test_unanswerable_questions_have_no_answer(corpus: Corpus, reader: Reader):
    """Half about nobody that the corpus has a document of, half about what a document leaves out."""
    questions = corpus.questions(2000, "unanswerable")
    assert sum(not question.positives for question in questions) == 1000
    for question in questions:
        assert question.answer == UNANSWERABLE and question.kind == "unanswerable"
        assert question.rounds == tuple((position,) for position in question.positives)
        assert reader.answer(question.text) == set()
        slots = readings_of(question.text, QUESTIONS)
        names = {subject.removeprefix("the ") for _, subject in slots}
        if question.positives:
            (name,) = {name for name in names if name in reader.where}
            assert question.positives == (reader.where[name],)
        else:
            assert not names & set(reader.where)
        kinds = {kind_of(name) for name in names if re.fullmatch(r"[A-Z]\w+ [A-Z]\w+", name)}
        assert kinds & {kind for (kind, _), _ in slots}, question.text


def test_some_unknown_entities_are_mentioned_and_some_are_not(corpus: Corpus, reader: Reader):
    together = "\n".join(reader.texts)
    unknown = [question for question in corpus.questions(600, "unanswerable") if not question.positives]
    mentioned = sum(
        any(subject.removeprefix("the ") in together for _, subject in readings_of(question.text, QUESTIONS))
        for question in unknown
    )
    assert 0.2 < mentioned / len(unknown) < 0.95


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_hard_negatives_are_the_documents_whose_names_share_a_word(corpus: Corpus, reader: Reader, kind: str):
    owners: dict[str, set[int]] = {}
    for name, position in reader.where.items():
        for word in set(name.split()) - set(NOUNS):
            owners.setdefault(word, set()).add(position)
    count = 0
    questions = corpus.questions(1500, kind)
    for question in questions:
        asked = {word for position in question.positives for word in (reader.names[position] or "").split()}
        if not question.positives:
            asked = set(re.findall(r"[A-Z]\w+", question.text))
        expected = set().union(*(owners.get(word, set()) for word in asked - set(NOUNS))) - set(question.positives)
        assert set(question.hard_negatives) == expected and len(question.hard_negatives) == len(expected)
        count += bool(expected)
    expected_share = 1 - 0.85**2 if kind == "two_hop" else 0.15
    assert abs(count / len(questions) - expected_share) < 0.04


def test_no_document_is_positive_and_negative_at_once():
    """Among few people, all of them alike, many are linked to their own lookalike."""
    corpus = make_corpus(24, linked_share=1.0, alike_share=1.0)
    for seed in range(20):
        for question in corpus.questions(24, "two_hop", seed):
            assert not set(question.hard_negatives) & set(question.positives)


def test_questions_are_about_different_entities_until_all_have_had_their_turn():
    corpus = make_corpus(200, seed=9)
    questions = corpus.questions(1000, "one_hop")
    for lap in range(5):
        assert len({question.positives for question in questions[lap * 200 : lap * 200 + 200]}) == 200
    facts = {(question.positives, frozenset(readings_of(question.text, QUESTIONS))) for question in questions}
    reader = Reader(corpus)
    asked = Counter((question.positives, question.answer) for question in questions)
    assert len(asked) > 990 and len(facts) >= len(asked) and max(asked.values()) <= 2
    assert sum(map(len, reader.records)) >= len(asked)


def test_two_hop_questions_do_not_repeat_and_end_with_what_the_corpus_holds():
    corpus = make_corpus(60, seed=3)
    questions = corpus.questions(200, "two_hop")
    assert len({(question.positives, question.answer) for question in questions}) > 190
    with pytest.raises(ValueError, match=r"60 documents gave \d+ two-hop questions, not 2000"):
        corpus.questions(2000, "two_hop")
    with pytest.raises(ValueError, match="gave 0 two-hop questions"):
        make_corpus(60, linked_share=0.0).questions(1, "two_hop")


@pytest.mark.parametrize("documents", [1, 2, 5, 13])
def test_small_corpora_have_questions_too(documents: int):
    corpus = make_corpus(documents)
    assert len(corpus) == len(corpus.texts()) == documents
    assert len(corpus.questions(20, "one_hop")) == len(corpus.questions(20, "unanswerable")) == 20
    assert corpus.questions(0, "two_hop") == []


# Prose


def test_prose_is_mixed_in_and_reprinted_under_a_heading(corpus: Corpus, reader: Reader):
    prose = [text for text, name in zip(reader.texts, reader.names, strict=True) if name is None]
    assert len(prose) == 600 == len(set(prose))
    assert set(PROSE) <= set(prose)
    reprints = [re.fullmatch(r"Reprint (\d+)\. (.+)", text) for text in prose if text not in PROSE]
    assert all(found and found[2] in PROSE for found in reprints)
    assert {int(found[1]) for found in reprints if found} == set(range(1, 600 // len(PROSE) + 1))


def test_a_corpus_may_be_prose_alone_or_empty():
    alone = make_corpus(5, prose=PROSE, prose_share=1.0)
    assert sorted(alone.texts()) == PROSE[:5] and alone.facts() == [[]] * 5
    with pytest.raises(ValueError, match="without entities"):
        alone.questions(1, "one_hop")
    assert make_corpus(0).texts() == []


# Use and misuse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": -1}, "no corpus"),
        ({"documents": 10, "split": "dev"}, "dev"),
        ({"documents": 10, "prose_share": 0.5}, "needs prose"),
        ({"documents": 10, "prose": PROSE, "prose_share": 1.5}, "shares"),
        ({"documents": 10, "linked_share": -0.1}, "shares"),
        ({"documents": 20_000_000}, "too many"),
        ({"documents": 20_000_000, "crowding": 2}, "too many"),
        ({"documents": 10, "crowding": 0}, "crowding.*0"),
        ({"documents": 10, "crowding": 1.5}, "crowding.*1.5"),
    ],
)
def test_impossible_corpora_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_corpus(**options)


def test_impossible_ranges_and_kinds_are_refused():
    corpus = make_corpus(10)
    for start, stop in ((-1, 3), (4, 11), (5, 4)):
        with pytest.raises(IndexError):
            corpus.texts(start, stop)
    with pytest.raises(ValueError, match="three_hop"):
        corpus.questions(1, "three_hop")  # type: ignore[arg-type]


def per_second(count: int, work: Callable[[], object]) -> float:
    """Of processor time, the better of two runs."""
    times = []
    for _ in range(2):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return count / min(times)


def test_documents_and_questions_are_made_fast_in_a_corpus_of_a_million():
    """A fraction of what one core does here (50,000 documents and 40,000 questions a second)."""
    corpus = make_corpus(1_000_000, split="test", prose=PROSE, prose_share=0.2)
    assert per_second(8000, lambda: corpus.texts(500_000, 508_000)) > 15_000
    for kind in EVERY_KIND:
        assert per_second(6000, lambda kind=kind: corpus.questions(6000, kind)) > 12_000
