"""When an answer counts as the right one."""

import pytest

from msa_hf.evaluation import UNANSWERABLE, exact_match, normalize_answer


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Oskel Lantern", "Oskel Lantern"),
        (" the oskel  lantern.\n", "Oskel Lantern"),
        ("“A shipwreck”", "a shipwreck"),
        ("48200", "48,200"),
        ("4.2 kilograms.", "4.2 kilograms"),
        ("North by East", "north by east"),
        ("north north east", "north-north-east"),
        ("the memory does not hold the answer", UNANSWERABLE),
        ("ﬁddle", "fiddle"),
    ],
)
def test_case_articles_punctuation_and_space_do_not_matter(prediction: str, answer: str):
    assert exact_match(prediction, answer)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("", "Oskel Lantern"),
        ("the", "an"),
        ("Oskel", "Oskel Lantern"),
        ("Oskel Lantern Clock", "Oskel Lantern"),
        ("42 kilograms", "4.2 kilograms"),
        ("4 kilograms", "4.0 kilograms"),
        ("thelantern", "lantern"),
        ("north", "north by east"),
    ],
)
def test_anything_else_does(prediction: str, answer: str):
    assert not exact_match(prediction, answer)


@pytest.mark.parametrize("text", ["The 4.2, a Thing!", "A  the an", "x.5.y", "Ünïcode — “The” Täst"])
def test_a_normalised_answer_stays_as_it_is(text: str):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)
