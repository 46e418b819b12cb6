"""Results: shares with intervals, files that survive interruptions, and differences that are more than chance."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import pytest

from msa_hf.bench import checking, conversations
from msa_hf.bench.comparing import compare
from msa_hf.bench.curve import curve
from msa_hf.bench.intervals import fisher_test, sign_test, wilson
from msa_hf.bench.report import broken_in_words, heat_map, html_report, short, text_report
from msa_hf.bench.result import Result, ResultError, Trial
from msa_hf.cli import main
from msa_hf.cli.bench import conversations as cli_conversations

DOCS = Path(__file__).parents[2] / "docs"
MODEL = {"name": "some", "fingerprint": "f"}


def trial(number: int, right: bool, tokens: int = 1000, kind: str = "single", **detail: object) -> Trial:
    axes = {"tokens": tokens, "depth": number % 3 / 2}
    return Trial(
        f"{kind} {tokens} {number}", kind, axes, f"q{number}?", ("yes",), "yes" if right else "no", right, detail
    )


def result(right: list[bool], path: Path | None = None, **settings: object) -> Result:
    with begun(path, **settings) as made:
        made.add(trial(number, value) for number, value in enumerate(right))
    return made


def begun(path: Path | None = None, **settings: object) -> AbstractContextManager[Result]:
    return Result.begin("needles", {"seed": 0, **settings}, MODEL, {"hardware": "here"}, path)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_is_as_published(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_fisher_is_the_sum_of_all_tables_as_unlikely() -> None:
    for right, asked, other, others in itertools.product((0, 3, 7), (7, 9), (0, 2, 5), (5, 12)):
        good, total = right + other, asked + others
        chances = {
            count: math.comb(asked, count) * math.comb(others, good - count) / math.comb(total, good)
            for count in range(max(0, good - others), min(asked, good) + 1)
        }
        expected = sum(chance for chance in chances.values() if chance <= chances[right] * (1 + 1e-7))
        assert fisher_test(right, asked, other, others) == pytest.approx(expected)


def test_the_sign_test_counts_only_what_changed() -> None:
    assert sign_test(0, 0) == 1 and sign_test(5, 5) == 1
    assert sign_test(6, 0) == pytest.approx(2 / 64) and sign_test(0, 6) == pytest.approx(2 / 64)


def test_cells_group_by_axes_and_leave_out_what_lacks_one() -> None:
    made = result([True, False, True, True])
    made.add([Trial("other", "words", {"tokens": 20}, "?", ("a",), "a", True)])
    assert [(cell.values, cell.right, cell.asked) for cell in made.cells("depth")] == [
        ((0.0,), 2, 2),
        ((0.5,), 0, 1),
        ((1.0,), 1, 1),
    ]
    assert [(cell.values, cell.asked) for cell in made.cells("tokens", "kind")] == [
        ((20, "words"), 1),
        ((1000, "single"), 4),
    ]
    assert [cell.asked for cell in made.cells()] == [5] and made.cells("hops") == []


def test_a_run_goes_on_where_it_stopped_and_only_with_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    result([True, False], path, depths=[0.0, 1.0], values=("words",))
    settings = {"seed": 0, "depths": (0.0, 1.0), "values": ["words"]}
    with Result.begin("needles", settings, MODEL, {"hardware": "there"}, path) as again:
        pass
    with Result.begin("needles", again.settings, {**MODEL, "name": "the same elsewhere"}, {}, path):
        pass
    assert again.done("single 1000 1") and not again.done("single 1000 2")
    assert [run["hardware"] for run in again.runs] == ["here", "there"]
    with pytest.raises(ValueError, match="made already"):
        again.add([trial(1, True)])
    for settings, model, benchmark, named in (
        ({"seed": 1, "depths": [0.0, 1.0], "values": ["words"]}, MODEL, "needles", "seed: 0 there, 1 here"),
        (again.settings, {**MODEL, "fingerprint": "g"}, "needles", "fingerprint"),
        (again.settings, MODEL, "chains", "its benchmark is needles"),
    ):
        before = path.read_bytes()
        with pytest.raises(ResultError, match=named), Result.begin(benchmark, settings, model, {}, path):
            raise AssertionError("goes on")
        assert path.read_bytes() == before
    assert {item.name for item in tmp_path.iterdir()} == {"r.json", ".r.json.lock"}


def test_a_file_whose_questions_are_others_is_not_gone_on_with(tmp_path: Path) -> None:
    """Another release may ask otherwise under the same settings and names."""
    made = result([True, False], tmp_path / "r.json")
    assert made.done("single 1000 1", "q1?", ["yes"]) and not made.done("single 1000 2", "q2?", ("yes",))
    with pytest.raises(ResultError, match=r"r\.json: .*another `question`.*'q1\?' there, 'q\?' here.*another file"):
        made.done("single 1000 1", "q?")
    with pytest.raises(ResultError, match=r"another `expected`.*\['yes'\] there, \['no'\] here"):
        made.done("single 1000 1", "q1?", ("no",))


def test_a_failed_write_leaves_the_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    made = result([True], path)
    before = path.read_bytes()
    made.add([trial(1, True, broke=object())])
    with pytest.raises(TypeError):
        made.save()
    assert path.read_bytes() == before and {item.name for item in tmp_path.iterdir()} == {"r.json", ".r.json.lock"}


def record(**changes: object) -> str:
    """A file of one trial."""
    made = {**asdict(trial(0, True)), **changes}
    head = {"format": 1, "benchmark": "needles", "settings": {}, "model": {}, "runs": [], "notes": {}}
    return json.dumps({**head, "trials": [made]})


def of_settings(value: str) -> str:
    return record().replace('"settings": {}', f'"settings": {{"a": {value}}}')


def of_notes(name: str, value: object) -> str:
    return record().replace('"notes": {}', f'"notes": {json.dumps({name: value})}')


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no result"),
        ("[]", "no result"),
        ("{}", "no result"),
        ('{"format": 2}', "format is 2"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "trials": [{"id": 1}]}', "damaged"),
        ('{"format": 1, "trials": 3}', "damaged"),
        (record(axes={"tokens": [1]}), "damaged"),
        (record(detail=3), "damaged"),
        (record(right=1), "damaged"),
        (record().replace('"settings": {}', '"settings": 5'), "damaged"),
        (record().replace('"runs": []', '"runs": {}'), "damaged"),
        (record().replace('"runs": []', '"runs": [1]'), "damaged"),
        (record(question=4), "question"),
        (record(answer=None), "answer"),
        (record(kind=None), "kind"),
        (record(id=7), "trial 7"),
        (record(expected="yes"), "expected"),
        (record(expected=[1]), "expected"),
        (record(axes={"tokens": True}), "axes"),
        (record(axes={"tokens": float("nan")}), "NaN is no number of JSON"),
        (" \n", "empty, no result of a benchmark; remove it"),
        ("\ufeff", "empty"),
        ('{"format": true}', "no result"),
        ('{"format": ' + 500 * "[" + 500 * "]" + "}", "no result"),
        ('{"format": ' + 100_000 * "[", "nested too deep"),
        (of_settings(99 * "[" + 99 * "]"), "nested more than 64 deep"),
        (of_settings("1e999"), "1e999 is too large a number"),
        (of_settings("-1e999"), "-1e999 is too large a number"),
        (of_settings("1" + 5000 * "0"), "no result of a benchmark (Exceeds the limit"),
        (of_settings('1, "a": 2'), "'a' is there twice in one object"),
        (record().replace('"answer"', '"right": true, "answer"'), "'right' is there twice in one object"),
        (record().replace('"trials": [', '"trials": [3, '), "`trials`"),
        (record().replace('"answer": "yes", ', ""), "trial 'single 1000 0' has no `answer`"),
        (record(extra=1), "trial 'single 1000 0' has 'extra', which no trial has"),
        (record(axes={"tokens": 10**18 + 1}), "`tokens` is 1000000000000000001, not"),
        (record(axes={"tokens": 10**400}), "`tokens` is 1"),
        (record(axes={"else": 10**400}), "`else` is 1"),
        (record(axes={"else": 1e300}), "`else` is 1e+300, not a text or a number to 10^18"),
        (record(axes={"else": False}), "`else` is False"),
        (record(axes={"else": None}), "`else` is None"),
        (record(axes={"tokens": 0}), "`tokens` is 0, not a whole number, 1 to 10^18"),
        (record(axes={"tokens": "many"}), "`tokens` is 'many'"),
        (record(axes={"tokens": 16000.5}), "`tokens` is 16000.5"),
        (record(axes={"hops": -1}), "`hops` is -1, not a whole number, 0 to 10^18"),
        (record(axes={"distance": True}), "`distance` is True"),
        (record(detail={"found": True}), "`found` is True"),
        (record(detail={"found": -1}), "`found` is -1"),
        (record(detail={"of": 0}), "`of` is 0"),
        (record(detail={"gold": 3}), "`gold` is 3"),
        (record(detail={"gold": [None]}), "`gold` is [None]"),
        (record(detail={"read": [[1]]}), "`read` is [[1]], not a list of positions"),
        (record(detail={"gold_read": "1"}), "`gold_read` is '1'"),
        (record(detail={"hop": 10**19}), "`hop` is 10000000000000000000"),
        (record(detail={"stopped": 1}), "`stopped` is 1, not true or false"),
        (record(detail={"broke": None}), "`broke` is None, not a text"),
        (record(detail={"evidence": []}), "`evidence` is []"),
        (record(detail={"gold": [1]}).replace("needles", "scaling"), "`gold` is [1], not a whole number"),
        (record(axes={"arm": "crystal"}).replace("needles", "conversations"), "`arm` is 'crystal', not among store"),
        (of_notes("conversation of 9", 3), "`conversation of 9` is 3, not an object"),
        (of_notes("conversation of 9", {"tokens": "3"}), "`conversation of 9`: `tokens` is '3'"),
        (of_notes("terms", "3"), "`terms` is '3'"),
        (of_notes("terms wanted", True), "`terms wanted` is True"),
    ],
)
def test_what_is_no_result_is_refused_by_name(
    content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    path.write_text(content, encoding="utf-8")
    assert main(["bench", "compare", str(path), str(path)]) == 2
    said = capsys.readouterr().err
    assert "some.json" in said and named in said and said.count("\n") == 1
    with pytest.raises(ResultError, match=re.escape(named)), begun(path):
        raise AssertionError("goes on")
    assert path.read_text(encoding="utf-8") == content


def test_files_are_taken_that_are_as_good_as_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an editor puts in front, names and texts of any characters, and large numbers that nobody counts with."""
    path = tmp_path / "some.json"
    axes = {"tokens": 10**18, "odd \udce9": "\ud800"}
    for content in (
        "\ufeff" + record(),
        record(kind="\ud800", axes=axes, question="\udfff", detail={"broke": "\udce9", "else": 10**30}, right=False),
        of_settings("1" + 30 * "0"),
        of_settings(20 * "[" + 20 * "]"),
    ):
        path.write_text(content, encoding="utf-8")
        found = Result.load(path)
        assert main(["bench", "compare", str(path), str(path)]) == 0
        assert "+0.000" in capsys.readouterr().out
        assert text_report(found) and html_report(found, [("kind",)], [("tokens", "kind")], figures=[curve(found)])
        found.save()
        assert Result.load(path).trials == found.trials and Result.load(path).settings == found.settings


@pytest.mark.parametrize("options", [[], ["--by", "tokens"]])
def test_files_without_trials_are_gone_on_with_and_not_compared(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a run that was stopped while it encoded."""
    path = tmp_path / "some.json"
    result([], path)
    assert main(["bench", "compare", str(path), str(path), *options]) == 2
    assert "some.json: has no trials yet; let its run go on" in capsys.readouterr().err
    assert len(result([True], path).runs) == 2


@pytest.mark.parametrize("path", sorted(DOCS.glob("bench_*.json")), ids=lambda path: path.stem)
def test_results_of_these_documents_are_taken(path: Path) -> None:
    if "trials" in json.loads(path.read_text(encoding="utf-8")):
        assert Result.load(path).trials


def test_the_arms_of_conversations_are_known_by_their_names() -> None:
    assert checking.ARMS == tuple(conversations.ARMS) == cli_conversations.ARMS


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    made = result([True, False], tmp_path / "r.json")
    made.notes["tokens"] = 17
    made.save()
    found = Result.load(tmp_path / "r.json")
    assert (found.trials, found.notes, found.settings, found.runs) == (
        made.trials,
        made.notes,
        made.settings,
        made.runs,
    )
    record = json.loads((tmp_path / "r.json").read_text())
    record["trials"].append(record["trials"][0])
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(ResultError, match="twice"):
        Result.load(tmp_path / "r.json")


def test_differences_beyond_chance_are_marked_and_others_not() -> None:
    worse, same = [number >= 12 for number in range(40)], [number >= 1 for number in range(40)]
    before = result([True] * 40)
    found = compare(before, result(worse), "kind")
    assert [item.beyond_chance for item in found.cells] == [True] and "WORSE" in str(found)
    assert "better" in str(compare(result(worse), before, "kind"))
    assert not compare(before, result(same), "kind").cells[0].beyond_chance
    assert "differs: seed: 0 there, 9 here" in str(compare(before, result(same, seed=9), "kind"))


def test_many_comparisons_do_not_find_a_difference_by_chance() -> None:
    """Six questions gained in one of forty cells: p is 0.03, which one of forty reaches more often than not."""
    sides = []
    for gained in (False, True):
        made = result([])
        for tokens in range(40):
            made.add(trial(number, number > 5 or (gained and tokens == 0), tokens) for number in range(20))
        sides.append(made)
    found = compare(*sides, "tokens")
    assert min(item.p for item in found.cells if item.p is not None) == pytest.approx(2 / 64)
    assert not any(item.beyond_chance for item in found.cells)


def test_other_questions_are_compared_by_shares() -> None:
    before, after = result([True] * 10), result([])
    after.add(trial(number + 100, False) for number in range(10))
    assert compare(before, after, "kind").cells[0].p == pytest.approx(2 / math.comb(20, 10))
    after = result([], seed=3)
    after.add([Trial("x", "other", {}, "?", ("a",), "a", True)])
    with pytest.raises(ResultError, match="no trials in common by kind: put the same questions to both"):
        compare(before, after)
    after.benchmark = "chains"
    with pytest.raises(ResultError, match="different benchmarks"):
        compare(before, after)


def test_kinds_without_an_axis_are_compared_as_well() -> None:
    """Of chains no question has all axes: twins have no hops, and questions of one hop no distance."""
    sides = []
    for right in (True, False):
        made = Result("chains", {}, MODEL)
        for number in range(10):
            axes = {"tokens": 1000, "hops": 2, "distance": 500}
            made.add([Trial(f"{number}", "two_hop", axes, "?", ("a",), "a", right)])
            made.add([Trial(f"{number} one", "one_hop", {"tokens": 1000, "hops": 1}, "?", ("a",), "a", True)])
            made.add([Trial(f"{number} twin", "no", {"tokens": 1000, "twin_of": "two_hop"}, "?", ("a",), "a", right)])
        sides.append(made)
    found = compare(*sides)
    assert found.axes == ("kind", "distance", "hops", "tokens", "twin_of")
    assert [(item.values, item.beyond_chance) for item in found.cells] == [
        (("no", "-", "-", 1000, "two_hop"), True),
        (("one_hop", "-", 1, 1000, "-"), False),
        (("two_hop", 500, 2, 1000, "-"), True),
    ]
    assert sum(item.before.asked for item in found.cells if item.before) == 30
    assert [item.values for item in compare(*sides, "hops").cells] == [(1,), (2,)]
    with pytest.raises(ResultError, match=r"No axis 'bogus'.* kind, distance, hops"):
        compare(*sides, "kind", "bogus")


def test_results_of_other_sizes_are_told_by_what_they_can_be_compared() -> None:
    """As of `mine` on two folders, whose sizes are their own."""
    before, after = result([]), result([])
    for made, tokens in ((before, 1000), (after, 3000)):
        made.add(trial(number, True, tokens) for number in range(3))
    with pytest.raises(ResultError, match=r"by kind, depth, tokens: compare by kind, depth \(--by kind\)"):
        compare(before, after)
    assert compare(before, after, "kind").whole.p == 1
    with pytest.raises(ResultError, match="has no trials yet"):
        compare(before, result([]))


def test_other_versions_and_hardware_are_named() -> None:
    before, after = result([True]), result([True])
    before.runs = [{"versions": {"msa_hf": "1", "torch": "2"}, "hardware": "here"}]
    after.runs = [*before.runs, {"versions": {"msa_hf": "3", "torch": "2"}, "hardware": "here"}]
    assert compare(before, after).changed == ("msa_hf: '1' there, '1, 3' here",)
    assert compare(after, after).changed == ()


def test_a_result_of_fewer_trials_is_told() -> None:
    """As of a run that was stopped."""
    assert compare(result([True] * 3), result([True] * 2)).changed == ("trials: 3 there, 2 here",)


def test_all_questions_together_tell_what_cells_of_one_cannot() -> None:
    before, after = Result("needles", {}, MODEL), Result("needles", {}, MODEL)
    for made, right in ((before, False), (after, True)):
        made.add(Trial(f"{n}", "single", {"depth": n, "tokens": 1000}, "?", ("a",), "a", right) for n in range(20))
    found = compare(before, after)
    assert len(found.cells) == 20 and not any(cell.beyond_chance for cell in found.cells)
    assert found.whole.after is not None and (found.whole.after.right, found.whole.after.asked) == (20, 20)
    assert found.whole.p == pytest.approx(2 / 2**20) and found.whole.beyond_chance
    assert str(found).splitlines()[1].startswith("all") and "better" in str(found).splitlines()[1]
    # What one result alone has is not in the sum.
    after.add([trial(0, False, tokens=5000)])
    assert compare(before, after).whole.after == found.whole.after


def test_a_page_needs_nothing_but_itself_and_shows_text_as_text() -> None:
    made = result([True, False])
    made.add(
        [Trial("x", "<script>", {"tokens": 5, "depth": 0.5}, "<b>?", ("a",), "</table>", False, {"broke": "routing"})]
    )
    page = html_report(made, [("kind",)], [("tokens", "depth")], ["It is <fine>."])
    assert "<script" not in page and "<b>" not in page and "&lt;fine&gt;" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and page.count("<svg") == 2
    assert "documents were not found" in page and "routing" in text_report(made)


def test_a_page_says_how_it_was_measured_and_where_what_broke() -> None:
    made = result([True, False], rounds={"select": "hybrid"}, ids_end="<end>", nothing=None, form=["{id}\n"])
    page = html_report(made, more={"Hops": [["hop", "wrong"], ["2", "1"]], "Nothing": [["hop"]]})
    assert "<td>rounds</td><td>select hybrid</td>" in page and "<td>ids_end</td><td>&lt;end&gt;</td>" in page
    assert "<td>nothing</td><td>none</td>" in page and "<td>form</td><td>&quot;{id}\\n&quot;</td>" in page
    assert "<h3>Run 1</h3>" in page and "<td>hardware</td><td>here</td>" in page and "<h2>Hops</h2>" in page
    assert "Nothing" not in page and "<th>answer</th><th>broke</th>" in page


def test_a_file_has_the_shares_with_their_intervals(tmp_path: Path) -> None:
    made = result([True, False, True], tmp_path / "r.json")
    record = json.loads((tmp_path / "r.json").read_text())
    shares = {json.dumps(item["by"], sort_keys=True): item for item in record["shares"]}
    assert len(shares) == len(record["shares"]) == 1 + 1 + 3 + 1 + 3 + 1
    low, high = wilson(2, 3)
    numbers = {"right": 2, "asked": 3, "share": 0.666667, "low": round(low, 6), "high": round(high, 6)}
    assert shares["{}"] == {"by": {}, **numbers} and shares['{"kind": "single", "tokens": 1000}']["right"] == 2
    assert Result.load(tmp_path / "r.json").trials == made.trials


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError, SystemExit])
def test_no_end_of_a_run_loses_an_answer(end: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(end), begun(path) as made:
        made.add([trial(1, True)])
        raise end
    assert Result.load(path).trials == made.trials == [trial(1, True)]
    with begun(path) as again:  # and none keeps the file
        assert again.done("single 1000 1") and len(again.runs) == 2


def test_a_name_that_is_not_utf_8_stands_in_a_file(tmp_path: Path) -> None:
    result([True], tmp_path / "r.json", source="caf\udce9")
    assert Result.load(tmp_path / "r.json").settings["source"] == "caf\udce9"
    result([], tmp_path / "r.json", source="caf\udce9")


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_what_cannot_be_written_is_refused_before_any_work(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "needles", "model_cards/msa-hf-tiny", option, "/proc/result"]) == 2
    assert "/proc/result: cannot be written" in capsys.readouterr().err


def test_one_file_for_both_is_refused_by_whatever_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "r.json")
    for page in (tmp_path / "sub" / ".." / "r.json", tmp_path / "link.html"):
        command = ["bench", "needles", "model_cards/msa-hf-tiny", "--out", str(tmp_path / "r.json")]
        assert main([*command, "--html", str(page)]) == 2
        assert "are one file; name two" in capsys.readouterr().err


def test_maps_and_curves_have_room_for_long_labels() -> None:
    made = result([True, False])
    label = "a kind of question with a name that goes on"
    made.add([Trial("x", label, {"tokens": 5, "depth": 0.5}, "?", ("a",), "b", False)])
    drawn = heat_map(made.cells("tokens", "kind"), "tokens", "kind")
    assert int(re.findall(r'<text x="(\d+)"', drawn)[0]) >= 6 * len(label)
    assert int(re.findall(r'width="(\d+)"', curve(made))[0]) > 490 + 6 * len(label)


def test_it_is_said_what_broke_and_which_document_is_read_for_anything() -> None:
    made = result([True])
    made.add(
        trial(number, False, kind="chain", broke="routing", gold=[number], gold_read=1, read=[66, number])
        for number in range(1, 4)
    )
    made.add([trial(9, False, kind="chain", broke="reader", gold=[9, 10], gold_read=1, read=[9])])
    one, two, three = broken_in_words(made)
    assert one.startswith("What broke in 3 of 4 wrong answers: routing") and "had not read" not in one
    assert two.startswith("What broke in 1 of 4") and "1 of them had not read all that they needed" in two
    assert three.startswith("Document 66 was read in vain for 3 of them")
    assert broken_in_words(result([True, False]))[0].startswith("What broke in 1 of 1 wrong answers")


def test_numbers_are_short() -> None:
    assert [short(value) for value in (16000, 1_000_000, 99_000_000, 10**9, 0.5, 1.0, "x", 7)] == [
        *("16K", "1M", "99M", "1B", "0.5", "1", "x", "7")
    ]
    assert [short(value) for value in (999, 65_536, 999_499, 999_999, 999_999_999, 10**12)] == [
        *("999", "65.5K", "999K", "1M", "1B", "1000B")
    ]


REFUSED = r"r\.json: another run writes to it\. Wait until .* name another file"


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    """The second is refused while the first goes on, and loses none of its answers; behind it, it goes on."""
    path = tmp_path / "r.json"
    result([True, False], path)
    with begun(path) as first:
        before = path.read_bytes()
        with pytest.raises(ResultError, match=REFUSED), begun(path):
            raise AssertionError("goes on")
        assert path.read_bytes() == before
        first.add([trial(2, True), trial(3, False)])
    with begun(path) as second:
        assert [item.right for item in second.trials] == [True, False, True, False]
        second.add([trial(4, True)])
    assert len(Result.load(path).trials) == 5 and len(Result.load(path).runs) == 3
    assert {item.name for item in tmp_path.iterdir()} == {"r.json", ".r.json.lock"}


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing yet"])
def test_a_link_stays_one_and_what_it_points_to_is_written_and_locked(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("other.json")
    (tmp_path / "other.json").symlink_to(Path("real") / "r.json")
    path = tmp_path / "real" / "r.json"
    if there:
        result([True], path)
    monkeypatch.chdir(tmp_path)
    with begun(Path("link.json")) as made:
        monkeypatch.chdir("/")  # a relative path is that of the beginning
        for file in (path, tmp_path / "link.json", tmp_path / "real" / ".." / "other.json"):
            with pytest.raises(ResultError, match=f"{file.name}: another run writes to it"), begun(file):
                raise AssertionError("goes on")
        made.add([trial(1, True)])
        # Written beside what it replaces, which may lie on another disk than the link.
        moved = list[Path]()
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda old, new: (moved.append(Path(old)), replace(old, new)))
    assert [item.parent for item in moved] == [path.parent]
    assert Result.load(path).trials == made.trials and len(made.trials) == 1 + there
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "other.json").is_symlink()
    assert {item.name for item in tmp_path.iterdir()} == {"link.json", "other.json", "real"}
    assert {item.name for item in path.parent.iterdir()} == {"r.json", ".r.json.lock"}
    Result.load(tmp_path / "link.json").save()
    assert (tmp_path / "link.json").is_symlink() and not path.is_symlink()


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_what_no_file_can_be_written_to_is_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "r.json")
    os.mkfifo(tmp_path / "pipe")
    names = sorted(item.name for item in tmp_path.iterdir())
    for name, said in (
        ("folder", f"a directory, not a file; name a file in it, such as {tmp_path / 'folder' / 'result.json'}"),
        ("to-folder", "a directory, not a file; name a file in it"),
        ("circle", "a link that leads back to itself; name a file"),
        ("pipe", "not an ordinary file, but such as a device; name another file"),
        ("nowhere", f"not a file in a directory that is there; make {tmp_path / 'none'}, or name another file"),
        ("none/r.json", "not a file in a directory that is there"),
    ):
        assert main(["bench", "needles", "./none", option, str(tmp_path / name)]) == 2
        assert f"{tmp_path / name}: {said}" in capsys.readouterr().err
    with (
        pytest.raises(ResultError, match="folder: a directory, not a file; name a file in it"),
        begun(tmp_path / "folder"),
    ):
        raise AssertionError("goes on")
    assert sorted(item.name for item in tmp_path.iterdir()) == names and not list((tmp_path / "folder").iterdir())


SCRIPT = f"""
import sys
from msa_hf.bench.result import Result, Trial
with Result.begin("needles", {{"seed": 0}}, {MODEL!r}, {{}}, sys.argv[1]) as made:
    made.add([Trial("other", "single", {{}}, "?", ("a",), "a", True)])
    print("begun", flush=True)
    sys.stdin.read()
"""


def test_a_run_of_another_process_is_refused_until_the_first_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    command = [sys.executable, "-c", SCRIPT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"begun\n"
        with pytest.raises(ResultError, match=REFUSED), begun(path):
            raise AssertionError("goes on")
        # A command says so before it looks for its model.
        assert main(["bench", "needles", "./none", "--out", str(path)]) == 2
        assert re.search(REFUSED, capsys.readouterr().err)
        second = subprocess.run(command, input=b"", capture_output=True, check=False)
        assert second.returncode == 1 and re.search(REFUSED, second.stderr.decode())
        first.communicate(b"")
    assert main(["bench", "needles", "./none", "--out", str(path)]) == 2
    assert "none: no such" in capsys.readouterr().err
    with begun(path) as made:
        assert made.done("other")


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdin=subprocess.PIPE, stdout=-1) as killed:
        assert killed.stdout is not None and killed.stdout.readline() == b"begun\n"
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert len(result([True], path).runs) == 2


def test_a_run_without_a_file_keeps_nobody_out() -> None:
    with begun() as one, begun() as other:
        one.add([trial(0, True)])
        other.add([trial(0, True)])


@pytest.mark.parametrize(
    ("detail", "named"),
    [
        ({"of": 1}, "trial 'single 1000 0' has no 'found'"),
        ({"found": "1", "of": 1}, "`found` is '1', not a whole number"),
    ],
    ids=["missing", "of another type"],
)
def test_details_that_a_report_counts_with_are_looked_at(tmp_path: Path, detail: dict[str, object], named: str) -> None:
    """Else a file that was changed by hand would end a run behind its last question."""
    path = tmp_path / "r.json"
    needed = ("tokens", "found", "of")
    with Result.begin("needles", {}, MODEL, {}, path, needed) as made:
        made.add([trial(0, True, found=1, of=1)])
    with Result.begin("needles", {}, MODEL, {}, path, needed) as made:
        assert len(made.trials) == 1
    record = json.loads(path.read_text())
    record["trials"][0]["detail"] = detail
    path.write_text(text := json.dumps(record))
    said = f"r.json: damaged, or made by hand .*{re.escape(named)}.*measure again"
    with pytest.raises(ResultError, match=said), Result.begin("needles", {}, MODEL, {}, path, needed):
        raise AssertionError("goes on")
    assert path.read_text() == text
