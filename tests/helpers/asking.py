"""Questions to a tiny model with a real memory, one for all tests of the rounds."""

from functools import cache
from typing import Any

import pytest
import torch
from scripted import COMPACT, PUBLISHED, Script, bank_of, byte_tokenizer, memory_model
from transformers import LogitsProcessor
from transformers.generation import BaseStreamer

from msa_hf.generation import Answer, MemoryInterleave, PromptProtocol

TOKENIZER = byte_tokenizer()
QUESTIONS = ["Where is the amber?", "How far off is the reef, in miles?", "Which one is it?"]
ONE, TWO, THREE = QUESTIONS
PROTOCOLS = {"published": PUBLISHED, "compact": COMPACT}

each_protocol = pytest.mark.parametrize("name", PROTOCOLS)
each_selection = pytest.mark.parametrize("select", ["generate", "constrained", "router"])
each_way = pytest.mark.parametrize("reuse", [False, True], ids=["again", "reuse"])


def made(name: str = "compact", family: str = "qwen3") -> tuple[Any, Any, PromptProtocol]:
    """A model, a bank of 18 documents, and their protocol; the same ones every time."""
    return _made(name, family)


@cache
def _made(name: str, family: str) -> tuple[Any, Any, PromptProtocol]:
    protocol = PROTOCOLS[name]
    model = memory_model(TOKENIZER, protocol, family)
    return model, bank_of(model, TOKENIZER, protocol), protocol


def asker(name: str = "compact", family: str = "qwen3", **options: Any) -> MemoryInterleave:
    model, bank, protocol = made(name, family)
    return MemoryInterleave(model, TOKENIZER, bank, protocol, **{"max_new_tokens": 12, "select": "generate", **options})


def script(asker: MemoryInterleave, says: dict[str, Any], answers: dict[str, Any] | None = None) -> Script:
    return Script(asker.model, TOKENIZER, asker.protocol, says, answers)


def end(asker: MemoryInterleave) -> str:
    return asker.protocol.ids_end


def read(answer: Answer) -> list[list[int]]:
    """Positions read, per round."""
    return [[choice.position for choice in item.read] for item in answer.trace.rounds]


def assert_same_answers(ours: Answer, theirs: Answer) -> None:
    """Text, tokens, documents and all that the trace says; scores up to float32's error."""
    assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
    assert len(ours.trace.rounds) == len(theirs.trace.rounds)
    for one, other in zip(ours.trace.rounds, theirs.trace.rounds, strict=True):
        assert (one.named, one.dropped, one.text, one.ended) == (other.named, other.dropped, other.text, other.ended)
        assert one.generated == other.generated
        for mine, yours in [
            (one.read, other.read),
            *((one.chosen[layer], other.chosen[layer]) for layer in one.chosen),
        ]:
            assert [choice.position for choice in mine] == [choice.position for choice in yours]
            scores = [[choice.score or 0.0 for choice in choices] for choices in (mine, yours)]
            torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), atol=1e-5, rtol=1e-5)


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


class Force(LogitsProcessor):
    """Makes a token certain, and counts."""

    def __init__(self, token: int) -> None:
        self.token, self.calls = token, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0.0
        return forced
