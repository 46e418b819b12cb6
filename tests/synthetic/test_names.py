"""Names of invented entities: never twice, never in both splits, alike where that is wanted; and the hashing below."""

import numpy as np
import pytest

from msa_hf.synthetic import words as module
from msa_hf.synthetic.hashing import Permutation, derive_key, random_below
from msa_hf.synthetic.names import FORMS, KINDS, PERSON, Names
from msa_hf.synthetic.words import WORDS, Split, Words


def every_name(
    size: int, seed: int = 0, split: Split = "train", alike: float = 0.15, crowding: int = 1
) -> list[list[str]]:
    """By kind, the names of `size` entities with documents and as many without."""
    space = Names([size] * len(KINDS), [size] * len(KINDS), seed, split, alike, crowding)
    return [space.names(kind, np.arange(2 * size)) for kind in range(len(KINDS))]


def invented(kind: int, name: str) -> list[str]:
    """The invented words of a name: a person's two, the one of others."""
    words = name.split()
    nouns = {form.replace("{}", "").strip() for form in FORMS.get(KINDS[kind], [])}
    return [word for word in words if word not in nouns]


def nouns_of(kind: int, names: list[str]) -> set[str]:
    return {word for name in names for word in name.split() if word not in invented(kind, name)}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000, 4097])
def test_a_permutation_takes_every_number_to_another_and_back(size: int):
    permutation = Permutation(size, derive_key("any", size))
    images = permutation.forward(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))
    assert permutation.inverse(images).tolist() == list(range(size))
    assert permutation.forward(np.arange(size).reshape(1, -1, 1)).ravel().tolist() == images.tolist()


def test_permutations_of_different_keys_are_unrelated():
    """Fixed points of two random permutations number about one."""
    first, second = (Permutation(5000, key).forward(np.arange(5000)) for key in (1, 2))
    assert (first == second).sum() < 8 and (first == np.arange(5000)).sum() < 8


def test_numbers_below_a_bound_are_uniform():
    counts = np.bincount(random_below(derive_key("uniform"), np.arange(60_000), 12), minlength=12)
    assert counts.shape == (12,)
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_the_spelling_of_a_word_can_be_read_in_one_way_only():
    """Consonant groups without vowels alternate with single vowels, and no syllable is listed twice."""
    groups = [*module._ONSETS, *module._MIDDLES, *module._ENDS]
    assert not set("".join(groups)) & set(module._VOWELS) and "" not in module._MIDDLES
    for table in (module._FIRST, module._SECOND, module._THIRD):
        assert len(set(table)) == len(table)


def test_each_split_has_more_than_a_billion_names_of_every_kind():
    assert all(len(set(FORMS[kind])) == 32 for kind in KINDS if kind != "person")
    assert WORDS // 2 * 32 > 10**9


def test_no_name_occurs_twice_among_two_hundred_thousand():
    names = [name for kind in every_name(16_700) for name in kind]
    assert len(names) > 200_000
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("crowding", [1, 2, 30, 10**9])
@pytest.mark.parametrize("alike", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 2, 500])
def test_names_are_unique_whatever_share_is_alike_and_however_crowded(size: int, alike: float, crowding: int):
    names = [name for kind in every_name(size, alike=alike, crowding=crowding) for name in kind]
    assert len(set(names)) == len(names) == 2 * size * len(KINDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_most_crowded_worlds_have_all_the_words_they_need_and_few_more(split: Split):
    """Twice as many words can be spelled as are needed, and a margin: half of them belong to the other split."""
    for count in [*range(1, 300, 7), 5000, 40_000]:
        words = Words(count, count, split, crowding=10**9)
        used = words.syllables(np.arange(count))
        assert len(set(words.spell(np.arange(count)))) == count
        if count >= 5000:
            spelled = np.prod([len(set(column)) for column in used.T.tolist()])
            assert 2 * count < spelled < 2.6 * count


def test_splits_share_no_invented_word():
    """Crowded or not: their few syllables meet in hundreds of words."""
    words = {
        split: {
            word
            for seed in (0, 1)
            for crowding in (1, 1000)
            for kind, names in enumerate(every_name(3000, seed, split, crowding=crowding))
            for name in names
            for word in invented(kind, name)
        }
        for split in ("train", "test")
    }
    assert len(words["train"]) > 120_000
    assert not words["train"] & words["test"]


@pytest.mark.parametrize("crowding", [1, 10**9])
def test_other_seeds_give_other_names(crowding: int):
    first, second = ({name for kind in every_name(500, seed, crowding=crowding) for name in kind} for seed in (0, 1))
    assert not first & second


def test_crowded_worlds_have_fewer_nouns_of_every_kind_and_each_its_own():
    """As many fewer as syllables, and four at least."""
    for crowding, expected in ((2, 32), (8, 16), (64, 8), (512, 4), (10**9, 4)):
        worlds = [[nouns_of(kind, names) for kind, names in enumerate(every_name(300, seed, crowding=crowding))]
                  for seed in (0, 1)]  # fmt: skip
        for kind, (first, second) in enumerate(zip(*worlds, strict=True)):
            if kind != PERSON:
                assert len(first) == len(second) == expected
                assert (first == second) == (expected == 32)


@pytest.mark.parametrize("crowding", [1, 10**9])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_lookalikes_are_those_that_share_a_word(kind: int, crowding: int):
    """Against a comparison of all names with all documented ones; entities without documents look alike too."""
    size = 1501
    space = Names([size] * len(KINDS), [size] * len(KINDS), 3, "test", 0.3, crowding)
    words = [set(invented(kind, name)) for name in space.names(kind, np.arange(2 * size))]
    owners: dict[str, list[int]] = {}
    for number in range(size):
        for word in words[number]:
            owners.setdefault(word, []).append(number)
    found = space.lookalikes(kind, np.arange(2 * size)).tolist()
    for number, others in enumerate(found):
        expected = {owner for word in words[number] for owner in owners.get(word, []) if owner != number}
        assert {other for other in others if other >= 0} == expected
    for half in (found[:size], found[size:]):
        share = sum(max(others) >= 0 for others in half) / size
        assert abs(share - 0.3) < 0.05


def test_people_share_given_names_as_well_as_family_names():
    space = Names([2000] * len(KINDS), [16] * len(KINDS), 0, "train", 0.5)
    names = [name.split() for name in space.names(PERSON, np.arange(2000))]
    shared = [sum(a[part] == b[part] for a, b in zip(names[::2], names[1::2], strict=True)) for part in (0, 1)]
    assert all(200 < count < 300 for count in shared)


def test_a_world_beyond_the_name_space_is_refused():
    with pytest.raises(ValueError, match="too many entities"):
        Names([2_000_000] * len(KINDS), [2_000_000] * len(KINDS), 0, "train", 0.15)
