"""Chains as data: templates, reading YAML, and every mistake that is told before anything runs."""

import contextlib
import copy
import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.hybrid.chains import (
    Chain,
    ChainError,
    ChainRunner,
    Loop,
    Step,
    StepError,
    chain_from_dict,
    chain_to_dict,
    check_chain,
    load_chain,
)
from msa_hf.hybrid.chains.chain import Condition, Extract
from msa_hf.hybrid.chains.checking import in_order
from msa_hf.hybrid.chains.extracting import extract, holds, names_in
from msa_hf.hybrid.chains.reading import digest_of
from msa_hf.hybrid.chains.template import as_text, literal, render

WHOLE = """
name: whole
steps:
  - name: plan
    prompt: "Split: {question}"
    system: "Be short."
    extract: {json: {type: object, properties: {first: {type: string}, more: {type: boolean}}}, repairs: 2}
  - name: look
    model: null
    retrieve: {query: "{plan/first}", mode: lexical, k: 3, filters: {lang: en, year: [2020, 2021]}}
    extract: {names: {at_most: 4}}
  - name: hops
    when: {field: look, is: filled}
    loop:
      over: look
      at_most: 3
      start: {said: "nothing"}
      steps:
        - name: read
          prompt: "{item} of {question}, {sources}, after {said}"
          retrieve: {query: "{item}", mode: router, max_tokens: 50}
          max_new_tokens: 16
          temperature: 0.5
          seed: 3
      next: {said: "{read}"}
      until: {field: read, contains: "done"}
      result: "{read}"
  - name: last
    prompt: "{hops/all} and {hops/last}"
    extract: list
answer: "{last} ({hops/last})"
"""


def data() -> dict:
    return copy.deepcopy(chain_to_dict(load("whole", WHOLE)))


def load(name: str, text: str) -> Chain:
    import yaml

    return chain_from_dict(yaml.safe_load(text))


def test_a_chain_goes_through_yaml_and_data(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(WHOLE, encoding="utf-8")
    chain = load_chain(tmp_path / "whole.yaml")
    assert chain_from_dict(chain_to_dict(chain)) == chain and digest_of(chain) == digest_of(load("", WHOLE))
    assert chain.steps[2].loop is not None and chain.steps[2].loop.steps[0].retrieve.max_tokens == 50
    other = chain_to_dict(chain)
    other["steps"][1]["retrieve"]["k"] = 4
    assert digest_of(chain_from_dict(other)) != digest_of(chain)


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), st.text(), min_size=1), st.text())
def test_templates_put_values_in_as_they_are(values: dict[str, str], text: str) -> None:
    template = literal(text) + "".join(f"{{{name}}}|" for name in values)
    assert render(template, values, "here") == text + "".join(f"{value}|" for value in values.values())


@pytest.mark.parametrize(
    "template",
    ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a b}", "{a/b/c}", "{0}", "{a{b}}", "{a/}", "{\n}"],
)
def test_what_is_no_field_is_refused(template: str) -> None:
    with pytest.raises(ChainError, match="here"):
        render(template, {"a": "x", "b": "y"}, "here")


def test_values_as_text() -> None:
    assert [as_text(value) for value in (None, "a", ["a", "b"], 3, True, {"a": ["ü"]}, [1])] == [
        "", "a", "a\nb", "3", "true", '{"a": ["ü"]}', "[1]"
    ]  # fmt: skip
    assert render("{a/b}{a/c}{d}{d/e}", {"a": {"b": "x"}, "d": None}, "here") == "x"
    with pytest.raises(ChainError, match="no object"):
        render("{a/b}", {"a": "x"}, "here")


def changed(path: str, value: object) -> dict:
    """The whole chain with one thing in another way; `path` such as "steps.0.extract"."""
    made = data()
    *way, last = path.split(".")
    place: object = made
    for name in way:
        place = place[int(name)] if name.isdigit() else place[name]  # type: ignore[index]
    if value is ...:
        del place[last]  # type: ignore[attr-defined]
    else:
        place[int(last) if last.isdigit() else last] = value  # type: ignore[index]
    return made


LOOP = "steps.2.loop"
BAD = [
    ("steps.3.prompt", "{nobody}", "step 'last', prompt: there is no step or value 'nobody'"),
    ("steps.3.prompt", "{read}", "step 'read' stands in a loop"),
    ("steps.3.prompt", "{plan/second}", "'plan' has no field 'second'; it has first, more"),
    ("steps.3.prompt", "{look/x}", "is no object"),
    ("steps.3.prompt", "{hops/first}", "it has last, all"),
    ("steps.3.prompt", "{sources}", "has no `retrieve`"),
    ("steps.0.system", "{sources}", "prompt alone"),
    ("steps.3.prompt", "{item}", "no step or value 'item'"),
    ("steps.0.prompt", "{last}", "steps wait for each other: "),
    ("steps.3.prompt", "{last}", "steps wait for each other: last -> last"),
    ("steps.3.prompt", ..., "no `prompt`"),
    ("steps.3.prompt", "{question", "write a literal brace twice"),
    ("steps.3.prompt", 5, "must be a text, got 5"),
    ("steps.3.name", "plan", "two of this name"),
    ("steps.3.name", "question", "this name is taken"),
    ("steps.3.name", "a b", "letters, digits and underscores"),
    ("steps.3.max_new_tokens", 0, "`max_new_tokens` must be an integer from 1"),
    ("steps.3.max_new_tokens", True, "`max_new_tokens` must be an integer from 1"),
    ("steps.3.temperature", -1, "`temperature` must be a number from 0 to 10"),
    ("steps.3.seed", -1, "`seed` must be"),
    ("steps.3.colour", "red", "there is no field 'colour'"),
    ("steps.3.extract", "table", "must be one of text, list, json, names, got 'table'"),
    ("steps.3.extract", "json", "`schema` belongs to json"),
    ("steps.3.extract", {"list": {}, "names": {}}, "names one of"),
    ("steps.3.extract", {"list": {"at_most": 0}}, "`at_most` must be"),
    ("steps.0.extract", {"json": {"type": "thing"}}, "`type` must be one of"),
    ("steps.0.extract", {"json": {"type": "object", "patternProperties": {}}}, "unknown keyword 'patternProperties'"),
    ("steps.0.extract", {"json": {"type": "string"}, "repairs": 6}, "`repairs` must be an integer from 0 to 5"),
    ("steps.0.model", None, "`system` is for chat models"),
    ("steps.3.model", 7, "must be a text"),
    ("steps.1.retrieve.mode", "magic", "`mode` must be one of router, lexical, dense, hybrid, got 'magic'"),
    ("steps.1.retrieve.k", 0, "`k` must be an integer from 1"),
    ("steps.1.retrieve.query", " ", "`query` must be"),
    ("steps.1.retrieve.query", "{read}", "stands in a loop"),
    ("steps.1.retrieve.filters", {"a": []}, "`filters` 'a' must be"),
    ("steps.1.retrieve.filters", {"a": {"b": 1}}, "`filters` 'a' must be"),
    ("steps.1.retrieve.filters", {"a": "{gone}"}, "no step or value 'gone'"),
    ("steps.1.retrieve.max_tokens", 9, "counted by a chat model"),
    ("steps.1.retrieve.rank", 1, "there is no field 'rank'"),
    (f"{LOOP}.at_most", ..., "a loop needs a bound"),
    (f"{LOOP}.at_most", 0, "a loop needs a bound"),
    (f"{LOOP}.at_most", 101, "a loop needs a bound"),
    (f"{LOOP}.at_most", None, "a loop needs a bound"),
    (f"{LOOP}.at_most", 1e9, "a loop needs a bound"),
    (f"{LOOP}.steps", [], "its loop has no steps"),
    (f"{LOOP}.over", "nobody", "no step or value 'nobody'"),
    (f"{LOOP}.next", {}, "'said' stands in one of them"),
    (f"{LOOP}.next", {"said": "{last}"}, "steps wait for each other"),
    (f"{LOOP}.until", {"field": "read"}, "has one test of"),
    (f"{LOOP}.until", {"field": "read", "is": "big"}, "'empty' or 'filled'"),
    (f"{LOOP}.until", {"field": "hops", "is": "empty"}, "no step or value 'hops'"),
    (f"{LOOP}.until", {"field": "read", "in": "x"}, "needs a list"),
    (f"{LOOP}.result", "{gone}", "no step or value 'gone'"),
    (f"{LOOP}.steps.0.name", "look", "two of this name"),
    (f"{LOOP}.steps.0.prompt", "{last}", "steps wait for each other"),
    ("steps.2.prompt", "x", "a loop has no `prompt`"),
    ("steps.2.when", {"field": "gone", "is": "filled"}, "no step or value 'gone'"),
    ("answer", "{gone}", "answer: there is no step or value 'gone'"),
    ("answer", "{plan/gone}", "has no field 'gone'"),
    ("steps", [], "`steps` is empty"),
    ("steps", {}, "must be a list of steps"),
    ("name", ..., "lacks `name`"),
    ("name", " ", "`name` must be a text"),
    ("version", 1, "there is no field 'version'"),
    ("name", "a\ud800", "name: is no Unicode"),
    ("steps.3.extract", {"json": {"type": "string", "enum": [datetime.date(2020, 1, 1)]}}, "is no JSON"),
    ("steps.3.extract", {"json": {"type": "number", "maximum": float("inf")}}, "is no JSON"),
    ("steps.2.when", {"field": "look", "in": [{1, 2}]}, "is no JSON"),
    ("steps.3.prompt", "a\ud800", "step 'last', prompt: is no Unicode"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "says"), BAD, ids=[f"{path}={value!r}"[:60] for path, value, _ in BAD])
def test_mistakes_are_told_with_their_place(path: str, value: object, says: str) -> None:
    with pytest.raises(ChainError) as caught:
        chain_from_dict(changed(path, value))
    assert says in str(caught.value), str(caught.value)


def places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "{x}", "{", "{last}", "plan", "json"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["name", "field", "is", "json", "type", "a"]) | st.integers(), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(places(data()))), odd)
def test_whatever_stands_in_a_place_is_read_or_refused(path: tuple[object, ...], value: object) -> None:
    made = data()
    place: Any = made
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with contextlib.suppress(ChainError):
        chain = chain_from_dict(made)
        assert chain_from_dict(chain_to_dict(chain)) == chain and digest_of(chain)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "not YAML"),
        ("name: a\nname: b\nsteps: []", "line 2: 'name' stands twice"),
        ("a: &x [1]\nb: *x", "line 2: aliases"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping, got None"),
        ("{name: {[1]: 2}}", "not YAML"),
        ("name: x\nsteps: [{name: yes, prompt: a}]", "quote it in YAML"),
    ],
)
def test_files_that_are_no_chain(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ChainError, match=r"bad\.yaml") as caught:
        load_chain(path)
    assert says in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ChainError, match="not YAML"):
        load_chain(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ChainError, match="more than"):
        load_chain(path)


def test_chains_that_would_never_end_are_refused() -> None:
    """Too many steps, also multiplied by loops within loops, and texts that double from round to round."""
    many = tuple(Step(f"s{number}", f"{{s{number + 1}}}") for number in range(1000))
    with pytest.raises(ChainError, match="more than 1000 steps"):
        check_chain(Chain("x", (*many, Step("s1000", "x"))))
    nested = Loop((Step("a", loop=Loop((Step("b", "{question}"),), 100, until=Condition("b", "is", "empty"))),), 100)
    nested = dataclasses.replace(nested, until=Condition("a/last", "is", "empty"))
    check_chain(Chain("x", (Step("c", loop=nested),)))
    nested = Loop((Step("c", loop=nested),), 100, until=Condition("c/last", "is", "empty"))
    with pytest.raises(ChainError, match="allow 1010102 steps, more than 100000; lower an `at_most`"):
        check_chain(Chain("x", (Step("d", loop=nested), Step("e", "{question}"))))
    doubling = Loop((Step("s", "{v}", model=None),), 100, start={"v": "{question}"}, next={"v": "{s}{s}"})
    with pytest.raises(StepError, match="more than 8388608 characters"):
        ChainRunner().run(Chain("x", (Step("l", loop=doubling),)), "question")


def test_order_and_the_default_answer() -> None:
    steps = [Step("c", "{b}{a}"), Step("a", "{question}"), Step("b", "{a}"), Step("d", "x")]
    assert [step.name for step in in_order(steps)] == ["a", "b", "c", "d"]
    chain = Chain("x", tuple(steps))
    check_chain(chain)
    assert chain.answer_template == "{d}"
    deep = Step("e0", "x")
    for number in range(1, 6):
        deep = Step(f"e{number}", loop=Loop((deep,), 1))
    with pytest.raises(ChainError, match="loops within loops"):
        check_chain(Chain("x", (deep,)))
    with pytest.raises(ChainError, match="every round of this loop would be the same"):
        check_chain(Chain("x", (Step("a", loop=Loop((Step("b", "x"),), 2)),)))


def test_extracting() -> None:
    lines = "1. First one\n- second\n\n * third \n2) fourth\n[5] fifth\n1984 was a year\n-6 degrees"
    assert extract(lines, Extract("list")) == [
        "First one", "second", "third", "fourth", "fifth", "1984 was a year", "-6 degrees"
    ]  # fmt: skip
    assert extract(lines, Extract("list", at_most=2)) == ["First one", "second"]
    assert extract("  a \n", Extract()) == "a"
    text = "The maker of the Oskel Lantern was Mira Vale. She lived in Port of Spain in 1950, as did J. R. Hill."
    assert names_in(text) == ["Oskel Lantern", "Mira Vale", "Port of Spain", "J. R. Hill"]
    assert names_in(text, "Who is mira vale?") == ["Oskel Lantern", "Port of Spain", "J. R. Hill"]
    assert extract(text, Extract("names", at_most=1), "the oskel lantern") == ["Mira Vale"]
    assert names_in("Zürich and Łódź; no one. ÉTÉ") == ["Zürich", "Łódź", "ÉTÉ"]


@pytest.mark.parametrize(
    ("test", "value", "found", "expected"),
    [
        ("is", "empty", None, True),
        ("is", "empty", " ", True),
        ("is", "empty", [], True),
        ("is", "empty", {}, True),
        ("is", "empty", False, True),
        ("is", "empty", 0, False),
        ("is", "filled", "x", True),
        ("equals", "Yes  sir", " yes SIR", True),
        ("equals", 3, "3", True),
        ("differs", "yes", "no", True),
        ("contains", "ES", "yes", True),
        ("contains", "ye", ["yes"], False),
        ("contains", "YES", ["yes"], True),
        ("in", ["a", "b"], "B", True),
        ("in", ["a", "b"], "c", False),
    ],
)
def test_conditions(test: str, value: object, found: object, expected: bool) -> None:
    assert holds(Condition("x", test, value), found) is expected  # type: ignore[arg-type]
