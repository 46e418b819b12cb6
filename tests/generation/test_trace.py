"""What an answer leaves behind."""

import json

from asking import ONE, TOKENIZER, asker, script
from scripted import TEXTS

from msa_hf.generation import Round, Trace


def test_the_trace(capsys) -> None:
    """Per round: choices of every layer, ids, what was dropped and why, texts, tokens and times; also as JSON."""
    interleave = asker(documents_per_round=1)
    with script(interleave, {ONE: ["[4][99][5]<|docs|>", "<|answer|>"]}, {ONE: "In a grove."}):
        answer = interleave.ask(ONE)
    trace = answer.trace
    assert trace.question == ONE and trace.answer == answer.text == "In a grove."
    first, second = trace.rounds
    assert set(first.chosen) == {1, 3} and all(len(choices) == 4 for choices in first.chosen.values())
    for choices in first.chosen.values():
        scores = [choice.score for choice in choices]
        assert scores == sorted(scores, reverse=True)
        assert [choice.key for choice in choices] == [str(choice.position) for choice in choices]
    assert (first.generated, first.named) == ("[4][99][5]<|docs|>", [4, 99, 5])
    assert first.text == f"[4] {TEXTS[4]}\n<|ids|>"
    said = len(TOKENIZER("[4][99][5]<|docs|>", add_special_tokens=False)["input_ids"])
    assert first.stages["select"].tokens == said and second.stages["select"].tokens == 1
    stages = [*first.stages.values(), *second.stages.values(), *trace.stages.values()]
    assert all(stage.seconds > 0 and stage.tokens > 0 for stage in stages)
    closing = len(TOKENIZER("<|answer|>" + ONE + "\n", add_special_tokens=False)["input_ids"])
    assert trace.stages["answer"].tokens == closing + len(answer.token_ids)

    record = json.loads(trace.to_json())
    assert record["rounds"][0]["chosen"]["1"][0]["position"] == first.chosen[1][0].position
    assert record["rounds"][0]["dropped"] == [
        {"id": 99, "reason": "unknown"},
        {"id": 5, "reason": "above documents_per_round"},
    ]
    assert record["rounds"][1]["ended"] == "the model said so"
    text = trace.explain()
    assert capsys.readouterr().out == text + "\n"
    parts = (ONE, "layer 3 chose", "[4][99][5]", "dropped 99: unknown", TEXTS[4], "the model said so", "In a grove.")
    assert all(part in text for part in parts)
    assert trace.explain(show=False) == text and capsys.readouterr().out == ""


def test_a_long_text_is_cut_and_says_so() -> None:
    """Of 300 characters all are shown."""
    for size, more in ((299, False), (300, False), (301, True)):
        shown = Trace("Where?", "router", [Round({}, [], text="y" * size)]).explain(show=False)
        assert shown.count("y" * min(size, 300)) == 1 and ("... 1 more characters" in shown) == more
        assert ("more characters" in shown) == more
