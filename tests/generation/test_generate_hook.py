"""Memory Interleave as a decoding method of `generate`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from asking import ONE, QUESTIONS, THREE, TOKENIZER, TWO, Force, Recorder, asker, each_selection, made, script
from transformers import LogitsProcessorList, TextIteratorStreamer

from msa_hf.generation import memory_interleave


def inputs_of(questions: list[str]) -> Any:
    return TOKENIZER(questions, return_tensors="pt", padding=True, add_special_tokens=False)


@each_selection
def test_custom_generate(select) -> None:
    """`generate(custom_generate=memory_interleave)` returns the prompt and what `ask` answers."""
    interleave = asker(select=select, documents_per_round=2, max_rounds=2)
    model, bank, protocol = made()
    says = {ONE: ["[3][5]<|docs|>", "[8]<|docs|>"], TWO: ["<|answer|>"], THREE: ["[17]<|docs|>", "<|answer|>"]}
    inputs = inputs_of(QUESTIONS)
    with script(interleave, says, {TWO: "Short."}):
        answers = interleave.ask(QUESTIONS)
        output = model.generate(
            **inputs,
            custom_generate=memory_interleave,
            tokenizer=TOKENIZER,
            memory=bank,
            protocol=protocol,
            select=select,
            documents_per_round=2,
            max_rounds=2,
            max_new_tokens=12,
            do_sample=False,
        )
    width = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :width], inputs["input_ids"])
    longest = max(len(answer.token_ids) for answer in answers)
    expected = [answer.token_ids + [0] * (longest - len(answer.token_ids)) for answer in answers]
    assert output[:, width:].tolist() == expected and len({len(answer.token_ids) for answer in answers}) > 1


def test_custom_generate_streams_and_processes() -> None:
    """The streamer gets the prompt from generate(), then the answer; the caller's processors and constraints work."""
    model, bank, protocol = made()
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    common |= {"protocol": protocol, "max_new_tokens": 5, "max_rounds": 1, "do_sample": False}
    inputs = inputs_of([ONE])
    z, y = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "zy")
    recorder = Recorder()
    output = model.generate(**inputs, **common, streamer=recorder, logits_processor=LogitsProcessorList([Force(z)]))
    assert output[0].tolist() == recorder.tokens == [*inputs["input_ids"][0].tolist(), *[z] * 5]
    stream = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=30)
    only_y: Callable[..., list[int]] = lambda sample, ids: [y]  # noqa: E731
    model.generate(**inputs, **common, streamer=stream, prefix_allowed_tokens_fn=only_y)
    assert "".join(stream) == "yyyyy"


def test_custom_generate_with_samples_and_beams() -> None:
    """Several samples of a question, several beams; both at once is refused."""
    model, bank, protocol = made()
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    common |= {"protocol": protocol, "max_new_tokens": 6, "max_rounds": 1}
    inputs = inputs_of([ONE, TWO])
    torch.manual_seed(0)
    sampled = model.generate(**inputs, **common, do_sample=True, temperature=9.0, top_k=0, num_return_sequences=3)
    assert sampled.shape[0] == 6 and len({tuple(row) for row in sampled.tolist()}) == 6
    assert torch.equal(sampled[::3, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    found = model.generate(**inputs, **common, do_sample=False, num_beams=2)
    expected = asker(select="router", max_rounds=1).ask([ONE, TWO], num_beams=2, max_new_tokens=6)
    assert found[:, inputs["input_ids"].shape[1] :].tolist() == [answer.token_ids for answer in expected]
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(**inputs, **common, do_sample=False, num_beams=2, num_return_sequences=2)


def test_without_a_limit_the_answer_has_the_length_of_ask() -> None:
    """Also where the prompt is longer than what the configuration allows in all."""
    model, bank, protocol = made()
    ids = inputs_of([TWO])["input_ids"]
    with script(asker(), {TWO: ["<|answer|>"]}, {TWO: "Short."}):
        output = memory_interleave(model, ids, tokenizer=TOKENIZER, memory=bank, protocol=protocol, select="generate")
    assert "Short." in TOKENIZER.decode(output[0, ids.shape[1] :])


def test_custom_generate_says_what_is_missing() -> None:
    model, bank, _ = made()
    inputs = inputs_of([ONE])
    with pytest.raises(ValueError, match="`tokenizer`"):
        model.generate(**inputs, custom_generate=memory_interleave, memory=bank, max_new_tokens=2)
    with pytest.raises(ValueError, match="`memory`"):
        memory_interleave(model, inputs["input_ids"], tokenizer=TOKENIZER)
    common: dict[str, Any] = {"custom_generate": memory_interleave, "tokenizer": TOKENIZER, "memory": bank}
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(**inputs, **common, return_dict_in_generate=True, max_new_tokens=2)
