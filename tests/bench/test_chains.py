"""`msa-hf bench chains` on a small corpus, with the shipped checkpoint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from msa_hf.bench.chains import NO_ANSWER, ChainSettings, broken_hops, in_words, run_chains
from msa_hf.bench.result import Result, ResultError
from msa_hf.cli.command_line import main
from msa_hf.synthetic.chain_corpora import make_chain_corpus

TINY = Path(__file__).parents[2] / "model_cards" / "msa-hf-tiny"
SETTINGS = ChainSettings(
    sizes=(6000,), kinds=("two_hop", "four_hop"), distances=(2000,), questions=1, seed=3, refusal="Not known."
)


@pytest.fixture(scope="module")
def measured(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    path = tmp_path_factory.mktemp("chains") / "chains.json"
    return run_chains(SETTINGS, *tiny, path=path, show_progress=False), path


def test_two_hops_are_answered_and_of_four_the_hop_that_broke_is_named(measured: tuple[Result, Path]):
    result, _ = measured
    assert len(result.trials) == 4
    by_kind = {kind: [trial for trial in result.trials if trial.kind == kind] for kind in ("two_hop", "four_hop")}
    assert all(trial.right and trial.axes["hops"] == 2 for trial in by_kind["two_hop"])
    for trial in by_kind["four_hop"]:
        detail = trial.detail
        assert trial.right or detail["broke"]
        missing = [hop for hop, place in enumerate(detail["gold"], 1) if place not in detail["read"]]
        assert detail["hop"] == (missing[0] if missing else 0)
        assert detail["stopped"] == (bool(missing) and len(detail["read"]) < 4)
    twins = [trial for trial in result.trials if trial.kind == NO_ANSWER]
    assert [trial.axes["twin_of"] for trial in twins].count("two_hop") == 1 and len(twins) == 2
    assert all(trial.expected == ("Not known.",) and not trial.right for trial in twins)
    assert all(trial.detail["lacks"] in ("unstated", "removed") for trial in twins)


def test_the_facts_lie_as_far_apart_as_the_result_says(measured: tuple[Result, Path]):
    result, _ = measured
    (corpus,) = result.notes.values()
    assert abs(corpus["tokens"] - 6000) < 600 and corpus["documents"] > 40
    apart = [gap for trial in result.trials for gap in trial.detail["tokens_apart"]]
    assert len(apart) >= 4 and all(1500 < gap < 2500 for gap in apart)
    assert {trial.axes["distance"] for trial in result.trials if "distance" in trial.axes} <= {*range(1950, 2051)}


def test_a_run_goes_on_where_it_stopped_and_refuses_other_settings(tiny: Any, measured: tuple[Result, Path]):
    result, path = measured
    kept = json.loads(path.read_text())
    again = run_chains(SETTINGS, *tiny, path=path, show_progress=False)
    assert again.trials == result.trials and len(again.runs) == len(kept["runs"]) + 1
    with pytest.raises(ResultError, match="questions"):
        run_chains(ChainSettings((6000,), ("two_hop",), (2000,), 2, 3), *tiny, path=path, show_progress=False)


def test_a_file_of_other_texts_is_refused(tiny: Any, tmp_path: Path):
    settings = ChainSettings((2500,), ("one_hop",), questions=1, max_new_tokens=1, rounds={"max_rounds": 1})
    path = tmp_path / "chains.json"
    run_chains(settings, *tiny, ["Some prose."], path, show_progress=False)
    with pytest.raises(ResultError, match=r"cannot go on with .prose: "):
        run_chains(settings, *tiny, ["Other prose."], path, show_progress=False)


def test_reports_say_in_words_where_it_breaks(measured: tuple[Result, Path]):
    result, _ = measured
    wrong = sum(not trial.right for trial in result.trials if trial.kind != NO_ANSWER)
    assert sum(int(row[1]) for row in broken_hops(result)[1:]) == wrong
    words = in_words(result)
    assert re.match(r"6,000 tokens: \d of 2 questions answered, \d of 2 twins", words[0])
    assert len(words) == 1 + len({trial.kind for trial in result.trials if not trial.right} - {NO_ANSWER})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ()}, "`sizes` is empty"),
        ({"questions": 0}, "at least one"),
        ({"distances": (0,)}, "at least one"),
    ],
)
def test_settings_that_ask_for_nothing_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ChainSettings(**changes)


def test_distances_that_do_not_fit_give_way_to_a_quarter_of_the_size():
    settings = ChainSettings(distances=(16_000, 50_000_000))
    assert settings.distances_in(99_000_000) == [16_000]
    assert settings.distances_in(100_000_000) == [16_000, 50_000_000]
    assert settings.distances_in(16_000) == [4000]


def test_a_distance_below_one_document_is_refused_before_anything_is_encoded(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*given: Any, **options: Any) -> Any:
        raise NotImplementedError  # where it would encode

    monkeypatch.setattr(type(tiny[0]), "encode_documents", stop)
    shape: Any = {"sizes": (6000,), "kinds": ("one_hop", "two_hop"), "questions": 1}
    path, options = tmp_path / "chains.json", {"show_progress": False}
    with pytest.raises(
        ValueError, match=r"of 20 tokens is less than one document.*smallest possible is \d+\. Ask"
    ) as no:
        run_chains(ChainSettings(distances=(20, 2000), **shape), *tiny, path=path, **options)
    least = int(re.findall(r"possible is (\d+)", str(no.value))[0])
    with pytest.raises(ValueError, match=f"of {least - 1} tokens is less than .* possible is {least}"):
        run_chains(ChainSettings(distances=(2000, least - 1), **shape), *tiny, path=path, **options)
    assert 60 < least < 200 and not list(tmp_path.iterdir())
    with pytest.raises(NotImplementedError):
        run_chains(ChainSettings(distances=(least, 2000), **shape), *tiny, path=path, **options)
    # Questions of one document have no distance.
    with pytest.raises(NotImplementedError):
        run_chains(ChainSettings(distances=(20,), **{**shape, "kinds": ("one_hop",)}), *tiny, **options)


def test_a_size_too_small_says_what_to_change(tiny: Any):
    with pytest.raises(ValueError, match=r"too few for a question of each kind .* larger sizes, fewer kinds"):
        run_chains(ChainSettings(sizes=(1500,), questions=1), *tiny, show_progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, page = tmp_path / "chains.json", tmp_path / "chains.html"
    options = ["--sizes", "4K", "--kinds", "one_hop", "--questions", "1", "--text-share", "0"]
    options += ["--dtype", "float32", "--quiet"]
    assert main(["bench", "chains", str(TINY), *options, "--out", str(out), "--html", str(page)]) == 0
    assert "1 of 1 questions answered" in capsys.readouterr().out and "<h1>chains" in page.read_text()
    assert len(Result.load(out).trials) == 2
    for wrong in (["--kinds", "five_hop"], ["--text-share", "1"], ["--questions", "0"], ["--out", str(tmp_path)]):
        assert main(["bench", "chains", str(TINY), *options, *wrong]) == 2
        assert re.search("among one_hop|text-share|least|not a file", capsys.readouterr().err)


def test_questions_are_those_of_the_split_never_trained_on(measured: tuple[Result, Path]):
    asked = " ".join(trial.question for trial in measured[0].trials)
    for seed in range(3):
        trained = {word for name in make_chain_corpus(200, {}, seed=seed).names() for word in (name or "").split()}
        nouns = {word for name in trained for word in name.split() if len(word) < 8}
        assert not {word for word in re.findall(r"[A-Z][a-z]{7,}", asked)} & (trained - nouns)
