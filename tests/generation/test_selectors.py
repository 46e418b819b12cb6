"""A selector is a class and a line in `SELECTORS`: asking, traces, the command line and diagnoses find it there."""

from typing import ClassVar

import pytest
from scripted import COMPACT, bank_of, byte_tokenizer, memory_model

from msa_hf.cli import main
from msa_hf.evaluation.diagnosis import diagnose
from msa_hf.generation import SELECTORS, MemoryInterleave, Selected, SelectionRound
from msa_hf.generation.selectors import Asker


class Worst:
    """Reads what was routed, worst first, two documents a round unless told otherwise; ends in the third round."""

    model_names_documents: ClassVar[bool] = False
    documents_per_round: ClassVar[int | None] = 2

    def __init__(self, asker: Asker) -> None:
        self.count = asker.documents_per_round or self.documents_per_round

    def select(self, round: SelectionRound) -> list[Selected]:
        assert all(choice.position not in asked.read for asked in round.asked for choice in asked.candidates)
        return [
            Selected([choice.id for choice in reversed(asked.candidates)][: self.count], ended=round.number == 2)
            for asked in round.asked
        ]


class Named(Worst):
    model_names_documents: ClassVar[bool] = True


@pytest.mark.parametrize("limit", [None, 1])
def test_a_new_selector_is_a_class_and_a_line(monkeypatch, capsys, limit) -> None:
    monkeypatch.setitem(SELECTORS, "worst", Worst)
    monkeypatch.setitem(SELECTORS, "named", Named)
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    bank = bank_of(model, tokenizer, COMPACT)

    asker = MemoryInterleave(
        model, tokenizer, bank, COMPACT, max_rounds=9, select="worst", documents_per_round=limit, max_new_tokens=2
    )
    first, second = asker.ask(["Where is the amber?", "How far is it to the reef?"])
    for answer in (first, second):
        assert [len(item.read) for item in answer.trace.rounds] == [limit or 2] * 3
        unread = answer.trace.rounds[0].combined
        assert answer.trace.rounds[0].read[0] == unread[-1]
        assert answer.trace.rounds[-1].ended == "the model said so"
        assert f"worst chose {answer.trace.rounds[0].named}" in answer.trace.explain(show=False)
        assert answer.trace.rounds[0].stages["select"].tokens == 0

    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    assert "worst" in capsys.readouterr().out
    asked = [{"question": "Where is the amber?", "positives": ["0"], "answer": "amber"}]
    found = diagnose(model, tokenizer, bank, asked, COMPACT, ["ids"], show_progress=False)
    assert set(found.ids) == {"generate", "constrained", "named"}
    assert "named [" in MemoryInterleave(
        model, tokenizer, bank, COMPACT, select="named", max_rounds=1, max_new_tokens=1
    ).ask("Where is the amber?").trace.explain(show=False)


def test_an_unknown_selector_is_refused() -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    with pytest.raises(
        ValueError, match=r"`select` must be one of \('generate', 'constrained', 'router', 'hybrid'\), got 'x'"
    ):
        MemoryInterleave(model, tokenizer, bank_of(model, tokenizer, COMPACT), COMPACT, select="x")
