"""Near-misses: names that differ in one syllable, how many there are, and finding them.

Names are taken apart as they are written, without the numbers that they were made of.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest

from msa_hf.evaluation import make_corpus
from msa_hf.synthetic.names import FORMS

NOUNS = {form.replace("{}", "").strip(): kind for kind, forms in FORMS.items() for form in forms}
WORD = re.compile(r"([A-Z]?[^aeiouAEIOU]*[aeiouAEIOU])([^aeiou]+[aeiou])([^aeiou]+[aeiou][^aeiou]*)")

Parts = tuple[str, ...]


def parts_of(name: str) -> Parts:
    """The kind, and what names of that kind can have in common: the noun and the syllables of each invented word."""
    nouns = [word for word in name.split() if word in NOUNS]
    syllables = [part for word in name.split() if word not in NOUNS for part in WORD.fullmatch(word).groups()]
    return (NOUNS[nouns[0]] if nouns else "person", *nouns, *syllables)


def agreement(first: Parts, second: Parts) -> int:
    """In how many places two names of one kind agree; -1 for different kinds."""
    return sum(a == b for a, b in zip(first, second, strict=True)) - 1 if first[0] == second[0] else -1


def near_pairs(names: Iterable[str | None]) -> list[tuple[Parts, Parts]]:
    """All pairs of names with the same noun, one syllable apart."""
    alike: dict[tuple[int, Parts], list[Parts]] = defaultdict(list)
    for parts in (parts_of(name) for name in names if name):
        if parts[0] != "person":
            for place in (2, 3, 4):
                alike[place, (*parts[:place], "", *parts[place + 1 :])].append(parts)
    return [(a, b) for group in alike.values() for row, a in enumerate(group) for b in group[:row]]


def pairs_per_document(crowding: int) -> float:
    """Near-misses in corpora of 1,024 documents."""
    corpora = 24
    pairs = sum(len(near_pairs(make_corpus(1024, seed, crowding=crowding).names())) for seed in range(corpora))
    return pairs / (corpora * 1024)


@pytest.mark.parametrize(("name", "parts"), [
    ("Port Velmara", ("place", "Port", "Ve", "lma", "ra")),
    ("Ubrasolth Lantern", ("object", "Lantern", "U", "bra", "solth")),
    ("Shendisam Tromossax", ("person", "She", "ndi", "sam", "Tro", "mo", "ssax")),
])  # fmt: skip
def test_names_are_taken_apart_where_a_vowel_ends_a_syllable(name: str, parts: Parts):
    assert parts_of(name) == parts


# How many there are


@pytest.mark.parametrize("crowding", [64])
def test_a_crowded_corpus_has_the_near_misses_of_one_as_many_times_as_large(crowding: int):
    """Counted in a sample of the large one: of all pairs, it holds the square of its share. The counts are of 150 pairs
    and more, so 0.7 and 1.4 are four standard deviations away."""
    large, sample = 1024 * crowding, 65_536
    expected = len(near_pairs(make_corpus(large).names(0, sample))) * (large / sample) ** 2 / large
    assert expected > 0.004
    assert 0.7 < pairs_per_document(crowding) / expected < 1.4


def test_near_misses_grow_with_crowding_until_names_run_out():
    counts = [pairs_per_document(crowding) for crowding in (1, 64, 512, 4096, 10**6)]
    assert counts[0] < 0.001 and counts[-1] > 0.15
    assert all(more > 1.5 * less for less, more in pairwise(counts))
    assert pairs_per_document(10**9) == counts[-1]


# Finding them


def brute_force(parts: list[Parts | None], position: int, count: int) -> list[int]:
    """The agreements of the nearest, best first."""
    own = parts[position]
    others = [agreement(own, other) for place, other in enumerate(parts) if own and other and place != position]
    return sorted((agreed for agreed in others if agreed >= 0), reverse=True)[:count]


@pytest.mark.parametrize("crowding", [1, 3000])
@pytest.mark.parametrize(("documents", "count"), [(1, 2), (7, 3), (13, 5), (300, 1), (300, 12), (900, 0)])
def test_nearest_finds_what_a_comparison_of_all_names_finds(documents: int, count: int, crowding: int):
    """Which of equals come, is free; that they come best first and only once, and none of prose, is not."""
    corpus = make_corpus(documents, 5, prose=["Real."], prose_share=0.2, alike_share=0.4, crowding=crowding)
    parts = [parts_of(name) if name else None for name in corpus.names()]
    found = corpus.nearest(range(documents), count)
    assert found.shape == (documents, count)
    for position, row in enumerate(found.tolist()):
        expected = brute_force(parts, position, count)
        near, rest = row[: len(expected)], row[len(expected) :]
        assert [agreement(parts[position], parts[other]) for other in near] == expected
        assert len({position, *near}) == len(near) + 1
        assert rest == [-1] * len(rest)


def test_nearest_answers_for_any_positions_in_any_order():
    """Also among so many that they are compared in blocks."""
    corpus = make_corpus(9000, prose=["Real."], prose_share=0.1, crowding=50)
    whole = corpus.nearest(range(9000), 4)
    chosen = [8999, 3, 3, 0, 2048, *range(7000, 7100)]
    assert corpus.nearest(chosen, 4).tolist() == whole[chosen].tolist()
    assert corpus.nearest(np.array(chosen), 2).tolist() == whole[chosen, :2].tolist()
    assert corpus.nearest([], 4).shape == (0, 4)


def test_equals_take_turns():
    """Hardly any names are near in a usual corpus; the documents found are not always the same ones."""
    corpus = make_corpus(1200, alike_share=0.0)
    often = Counter(corpus.nearest(range(1200), 4).ravel().tolist())
    assert len(often) > 1000 and max(often.values()) < 20


def test_nearest_refuses_what_it_cannot_do():
    corpus = make_corpus(10)
    for positions in ([-1], [3, 10]):
        with pytest.raises(IndexError, match="of 10"):
            corpus.nearest(positions, 1)
    with pytest.raises(ValueError, match="-2"):
        corpus.nearest([0], -2)
    assert make_corpus(65_536).nearest([7], 3).min() >= 0
    with pytest.raises(ValueError, match="at most 65,536 documents, here 65,537"):
        make_corpus(65_537).nearest([0], 1)


def seconds(work: Callable[[], object]) -> float:
    """Of processor time, the best of three runs."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def test_a_crowded_corpus_costs_a_training_step_little():
    """Several times what one core needs here: 16 ms with texts, 4 ms for the nearest of all."""
    corpus = make_corpus(1024, crowding=1000)
    assert seconds(lambda: make_corpus(1024, crowding=1000).texts()) < 0.07
    assert seconds(lambda: corpus.nearest(range(1024), 8)) < 0.03
