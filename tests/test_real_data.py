"""Real text from a directory: passages that lose nothing, what questions want, and rows of tokens."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
LINES = 'One came. Two left!  Three "stayed." ' * 20 + "\nA line\n" + "x" * 130 + " " + "word " * 60


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import real_data

    return real_data


@pytest.mark.parametrize("longest", [40, 100, 10_000])
def test_passages_hold_all_words_in_order_and_are_short(data: Any, longest: int) -> None:
    pieces = data.split_passages(LINES, longest)
    assert "".join("".join(pieces).split()) == "".join(LINES.split())
    assert max(map(len, pieces)) <= longest and all(piece == piece.strip() != "" for piece in pieces)
    if longest == 100:  # sentences end passages where they can
        assert all(piece[-1] in '.!"' for piece in pieces[:5])
    assert data.split_passages(" \n ") == []


def test_questions_want_the_passages_that_hold_their_answer(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    documents = [
        {"key": "a", "title": "Ann", "text": "Ann came early. " * 60 + "She left on Friday."},
        {"key": "b", "title": "", "text": "Bo stayed."},
    ]
    questions = [{"question": "When did Ann leave?", "answers": ["friday"], "gold": ["a", "b"]}]
    for name, rows in (("documents", documents), ("questions.train", questions)):
        with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    passages = data.read_passages(tmp_path)
    assert [text.split("\n")[0] for text in passages.texts] == ["Ann", "Ann", "Bo stayed."]
    found = data.read_questions(tmp_path, "train")
    assert [item["set"] for item in found] == ["notes"] and data.read_questions(tmp_path, "dev") == []
    # The answer stands in the second passage of a; none of b holds it, so all of b count.
    assert data.wanted_passages(found[0], passages, data.passages_of(passages)) == [[1], [2]]
    assert len(data.read_passages(tmp_path, limit=1).texts) == 2


def test_rows_come_back_padded_and_every_one_in_a_part(data: Any) -> None:
    import real_rows

    rows = [[5], [6, 7, 8], [9, 10], [11] * 9, [12, 13]]
    flat = real_rows.Flat.joined([real_rows.Flat.of(rows[:2]), real_rows.Flat.of(rows[2:])])
    found = flat.rows(torch.tensor([3, 1]), multiple=4)
    assert found.ids.shape == (2, 12) and found.lengths.tolist() == [9, 3]
    assert found.ids[1].tolist() == [6, 7, 8] + [0] * 9
    seen = []
    for places, part in flat.parts(torch.tensor([0, 2, 3, 4]), budget=4):
        for place, ids, length in zip(places.tolist(), part.ids, part.lengths, strict=True):
            assert ids[:length].tolist() == rows[place]
            seen.append(place)
    assert sorted(seen) == [0, 2, 3, 4]


def test_siblings_are_others_of_the_same_article(data: Any) -> None:
    import real_pools

    articles = torch.tensor([0, 1, 0, 2, 1, 0])
    siblings = real_pools.Siblings(articles)
    torch.manual_seed(0)
    places = torch.arange(6).repeat(50)
    drawn = siblings.draw(places)
    assert torch.equal(articles[drawn], articles[places])
    alone = places == 3
    assert torch.equal(drawn[alone], places[alone]) and not bool((drawn == places)[~alone].any())
    assert set(drawn[places == 0].tolist()) == {2, 5}


def test_positives_are_found_among_the_passages_of_all_processes(data: Any) -> None:
    """Two processes may draw the same passage; it answers a question in both places."""
    import real_pools

    everyone = torch.tensor([4, 9, 30, 9, 12])
    drawn = real_pools.Draw(
        places=torch.tensor([4, 9, 30]),
        numbers=torch.tensor([7, 8]),
        rows=torch.tensor([0, 0, 1]),
        gold=torch.tensor([9, 30, 4]),
        share=torch.zeros(2),
    )
    assert drawn.positives(everyone).tolist() == [
        [False, True, True, True, False],
        [True, False, False, False, False],
    ]


def test_a_share_of_rows_is_that_of_one_process(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import real_rows

    flat = real_rows.Flat(torch.zeros(40, dtype=torch.int32), torch.tensor([3, 9, 1, 20, 2, 5]))
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        found += flat.share().tolist()
    assert found == list(range(6))


def test_word_scores_are_sums_over_the_words_of_a_question(data: Any) -> None:
    import real_words

    texts, counted = [[3, 5], [5], [], [7, 9, 11]], [[0.5, 1.0], [2.0], [], [4.0, 0.25, 8.0]]
    rows = real_words.WordRows.of(texts)
    passages = real_words.WordRows(
        rows.words, rows.starts, torch.tensor([x for row in counted for x in row], dtype=torch.float16)
    )
    asked = [[5, 5, 8], [], [11, 3], [2]]
    questions = real_words.WordRows.joined([real_words.WordRows.of(asked[:1]), real_words.WordRows.of(asked[1:])])
    numbers, places = torch.tensor([2, 0, 1, 0, 3]), torch.tensor([3, 1, 2, 0, 1])
    expected = [
        [sum(dict(zip(texts[p], counted[p], strict=True)).get(word, 0.0) for word in asked[n]) for p in places.tolist()]
        for n in numbers.tolist()
    ]
    torch.testing.assert_close(real_words.word_scores(questions, numbers, passages, places), torch.tensor(expected))
    assert real_words.word_scores(questions, torch.tensor([1]), passages, places).tolist() == [[0.0] * 5]


def test_fitted_weights_believe_the_system_that_is_right(data: Any) -> None:
    """Of two systems each is right about one kind of question; candidates that are not there do not count."""
    import real_words

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 6, 2, generator=generator) * torch.tensor([1.0, 30.0])
    kinds, right = torch.arange(40) % 2, torch.randint(5, (40,), generator=generator)
    rows = torch.arange(40)
    scores[rows, right, kinds] = torch.tensor([1.5, 45.0])[kinds]
    scores[:, 5] = float("-inf")
    gold = torch.zeros(40, 6, dtype=torch.bool)
    gold[rows, right] = True
    gold[:, 5] = True
    weights = real_words.fitted_weights(scores, gold, kinds) * torch.tensor([1.0, 30.0])
    assert weights.isfinite().all() and (weights >= 0).all()
    assert weights[0, 0] > 5 * weights[0, 1] and weights[1, 1] > 5 * weights[1, 0]


def test_needles_stand_in_real_text_beside_those_they_are_taken_for(data: Any, tmp_path: Path) -> None:
    import real_needles

    (tmp_path / "wikipedia").mkdir()
    articles = [{"key": str(n), "title": f"T{n}", "text": f"Article {n} goes on. " * 40} for n in range(30)]
    with lzma.open(tmp_path / "wikipedia" / "part-11.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in [{"key": "s", "title": "", "text": "Short."}, *articles])
    documents, questions = real_needles.make(tmp_path, 11, 900)
    texts = {row["key"]: row for row in documents}
    assert len({row["title"] for row in documents}) == len(documents) <= 30 and len(questions) > 8
    for question in questions:
        found = [texts[key] for key in question["gold"]]
        assert question["answers"] == [", ".join(question["answers"][0].split(", "))]
        for row, value in zip(found, question["answers"][0].split(", "), strict=True):
            assert value in row["text"] and len(data.split_passages(row["text"])) == 1
        assert len({row["article"] for row in found}) == 1
        together = [row for row in documents if row["article"] == found[0]["article"]]
        assert len(together) == {"single": 1, "multi_key_2": 2, "multi_key_3": 3}.get(question["kind"], 4)
