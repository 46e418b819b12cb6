"""Plans: questions of several hops, split by rules and by a model."""

import pytest
from fake_chat import FakeChat, FakeMemory, FakeRetriever

from msa_hf.hybrid.chains import ChainError, ChainRunner, Retrieve, Rule, plan_by_model, plan_by_rules
from msa_hf.synthetic.templates import ATTRIBUTES

WORLD = [
    Rule(description, attribute.questions[0])
    for attributes in ATTRIBUTES
    for attribute in attributes
    for description in attribute.descriptions
]


def prompts(chain) -> list[str | None]:
    return [step.prompt for step in chain.steps]


def test_descriptions_are_taken_from_the_inside_out() -> None:
    assert prompts(plan_by_rules("Where was the teacher of the maker of the Oskel Lantern born?")) == [
        "What is the maker of the Oskel Lantern?",
        "What is the teacher of {hop1}?",
        "Where was {hop2} born?",
    ]
    assert prompts(plan_by_rules("Who painted the Blue House?")) == ["Who painted the Blue House?"]
    assert prompts(plan_by_rules("Did the wife of Tom Reed know the mayor of Harrow Bay?")) == [
        "What is the mayor of Harrow Bay?",
        "What is the wife of Tom Reed?",
        "Did {hop2} know {hop1}?",
    ]
    assert prompts(plan_by_rules("What {is} the {x} of Y?")) == ["What {{is}} the {{x}} of Y?"]
    assert prompts(plan_by_rules("Which old man is the maker of the Oskel Lantern ?")) == [
        "What is the maker of the Oskel Lantern?"
    ]
    for opening, most in (("Who is ", 8), ("Who met ", 7)):
        with pytest.raises(ChainError, match="more than 8 hops"):
            plan_by_rules(opening + "the friend of " * (most + 1) + "Ada?")
        assert len(plan_by_rules(opening + "the friend of " * most + "Ada?").steps) == 8


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_every_description_of_the_invented_worlds_is_found(hops: int) -> None:
    for place, rule in enumerate(WORLD):
        name, asked = "the Oskel Lantern", []
        for further in range(hops - 1):
            used = WORLD[(place + 7 * further) % len(WORLD)]
            asked.append(used.question.replace("{n}", name if not further else f"{{hop{further}}}"))
            name = used.description.replace("{n}", name)
        chain = plan_by_rules(f"How tall is {name}?", WORLD)
        last = "How tall is the Oskel Lantern?" if hops == 1 else f"How tall is {{hop{hops - 1}}}?"
        assert len(chain.steps) == hops and prompts(chain)[-1] == last
        assert prompts(chain)[0] == (asked[0] if asked else last), rule


def test_a_plan_runs_and_retrieves_for_each_step() -> None:
    memory = FakeMemory({"What is the maker of Ada?": "Mira", "Where was Mira born?": "Bay"})
    retriever = FakeRetriever({"a": "ada maker", "b": "mira born"})
    chain = plan_by_rules("Where was the maker of Ada born?", retrieve=Retrieve("{question}", "lexical", 1))
    result = ChainRunner(retriever, memory).run(chain, "Where was the maker of Ada born?")
    assert result.answer == "Bay" and [query for query, _, _ in retriever.asked] == memory.asked
    assert [source["key"] for source in result.sources()] == ["a", "b"]


def test_a_model_plans() -> None:
    chat = FakeChat(['["Who made Ada?", "Where was #1 born, {x}?"]'])
    chain = plan_by_model("Where was the maker of Ada born?", chat)
    assert prompts(chain) == ["Who made Ada?", "Where was {hop1} born, {{x}}?"]
    assert chat.asked[0][0].content.endswith("Question: Where was the maker of Ada born?")
    assert len(plan_by_model("x", FakeChat(["none", '["a?"]'])).steps) == 1
    for wrong, says in [
        ('["Who is #1?"]', "asks for #1"),
        ('["a", "b #3"]', "asks for #3"),
        ("[]", "at least 1"),
        ("words", "not JSON"),
        (str(["a"] * 9).replace("'", '"'), "at most 8"),
    ]:
        with pytest.raises(ChainError, match=says):
            plan_by_model("x", FakeChat([wrong, wrong]))


def test_rules_have_their_fields() -> None:
    for fields in (("the x", "What {n}?"), ("the x of {n}", "What?"), ("the x of {n}", "What {x} {n}?")):
        with pytest.raises(ValueError, match=r"rule|Rule"):
            Rule(*fields)
