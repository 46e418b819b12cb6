"""Names of invented entities: never twice, never in both splits, alike where that is wanted; and the hashing below."""

import numpy as np
import pytest

from msa_hf.evaluation import words as module
from msa_hf.evaluation.hashing import Permutation, derive_key, random_below
from msa_hf.evaluation.names import FORMS, KINDS, PERSON, Names
from msa_hf.evaluation.words import WORDS, Split


def every_name(size: int, seed: int = 0, split: Split = "train", alike: float = 0.15) -> list[list[str]]:
    """By kind, the names of `size` entities with documents and as many without."""
    space = Names([size] * len(KINDS), [size] * len(KINDS), seed, split, alike)
    return [space.names(kind, np.arange(2 * size)) for kind in range(len(KINDS))]


def invented(kind: int, name: str) -> list[str]:
    """The invented words of a name: a person's two, the one of others."""
    words = name.split()
    nouns = {form.replace("{}", "").strip() for form in FORMS.get(KINDS[kind], [])}
    return [word for word in words if word not in nouns]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000, 4097])
def test_a_permutation_takes_every_number_to_another_and_back(size: int):
    permutation = Permutation(size, derive_key("any", size))
    images = permutation.forward(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))
    assert permutation.inverse(images).tolist() == list(range(size))


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


@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_names_are_unique_whatever_share_is_alike(alike: float):
    names = [name for kind in every_name(500, alike=alike) for name in kind]
    assert len(set(names)) == len(names)


def test_splits_share_no_invented_word():
    words = {
        split: {word for seed in (0, 1) for kind, names in enumerate(every_name(3000, seed, split)) for name in names
                for word in invented(kind, name)}
        for split in ("train", "test")
    }  # fmt: skip
    assert len(words["train"]) > 60_000
    assert not words["train"] & words["test"]


def test_other_seeds_give_other_names():
    first, second = ({name for kind in every_name(500, seed) for name in kind} for seed in (0, 1))
    assert not first & second


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_lookalikes_are_those_that_share_a_word(kind: int):
    """Against a comparison of all names with all documented ones; entities without documents look alike too."""
    size = 1501
    space = Names([size] * len(KINDS), [size] * len(KINDS), 3, "test", 0.3)
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
