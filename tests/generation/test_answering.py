"""The answer stage: streaming, options of `generate`, beams."""

import threading

import pytest
import torch
from asking import (
    ONE,
    TOKENIZER,
    TWO,
    Force,
    Recorder,
    asker,
    assert_same_answers,
    each_selection,
    each_way,
    made,
    script,
)
from transformers import LogitsProcessorList, TextIteratorStreamer, TextStreamer

STREAMED = {
    "The answer to the question is: in a grove.<|im_end|>": " in a grove.",
    "The answer to the questions is no.<|im_end|>": "The answer to the questions is no.",
    "The answer<|im_end|>": "The answer",
    "Here.": "Here.",
}


@pytest.mark.parametrize("said", STREAMED)
def test_a_streamer_gets_the_answer_and_nothing_else(said) -> None:
    """No prompt, ids, texts, opening or end marker, with or without `skip_prompt`; in pieces as they come."""
    interleave = asker("published", max_new_tokens=80)
    with script(interleave, {ONE: ["[4]<|object_ref_end|>", "<End-of-Retrieve>"]}, {ONE: said}):
        recorder = Recorder()
        answer = interleave.ask(ONE, streamer=recorder)
        assert TOKENIZER.decode(recorder.tokens) == STREAMED[said] and recorder.ended == 1
        assert answer.text == STREAMED[said].strip()
        for skip_prompt in (False, True):
            stream = TextIteratorStreamer(TOKENIZER, skip_prompt=skip_prompt, timeout=30)
            thread = threading.Thread(target=interleave.ask, args=(ONE,), kwargs={"streamer": stream})
            thread.start()
            assert "".join(stream) == STREAMED[said]
            thread.join()


def test_streaming_does_not_wait_for_the_end(capsys) -> None:
    """Tokens reach the streamer before generation is over."""
    interleave = asker(max_new_tokens=40)
    seen: list[int] = []

    class Watching(Recorder):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            seen.append(len(said.fed))

    with script(interleave, {ONE: ["<|answer|>"]}, {ONE: "one two three"}) as said:
        interleave.ask(ONE, streamer=Watching())
        assert len(set(seen)) == len(seen) > 5
        interleave.ask(ONE, streamer=TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == "one two three\n"


@pytest.mark.parametrize("questions", [[ONE, TWO], "", ["x " * 9000]])
def test_a_stream_ends_where_asking_fails(questions) -> None:
    """Whoever reads it must not wait for ever; and a stream holds one answer."""
    recorder = Recorder()
    with pytest.raises(ValueError):
        asker().ask(questions, streamer=recorder)
    assert recorder.ended == 1


def test_options_of_generate_reach_the_answer_alone() -> None:
    """A processor sees the answer's steps and no others; sampling changes the answer, not the retrieval."""
    interleave = asker(max_rounds=2)
    force = Force(TOKENIZER.convert_tokens_to_ids("z"))
    plain = interleave.ask(ONE)
    forced = interleave.ask(ONE, logits_processor=LogitsProcessorList([force]))
    assert forced.text == "z" * 12 and force.calls == 12
    sampled = []
    for seed in range(3):
        torch.manual_seed(seed)
        sampled.append(interleave.ask(ONE, do_sample=True, temperature=5.0, top_k=0))
    assert len({tuple(answer.token_ids) for answer in (plain, *sampled)}) == 4
    for answer in (forced, *sampled):
        for mine, yours in zip(answer.trace.rounds, plain.trace.rounds, strict=True):
            assert (mine.generated, mine.chosen, mine.read) == (yours.generated, yours.chosen, yours.read)


@each_way
def test_beams(reuse) -> None:
    """Beams over a cache of earlier rounds and over a fresh one find what they find on the whole transcript."""
    interleave = asker(reuse_cache=reuse, max_rounds=1)
    model, bank, protocol = made()
    with script(interleave, {ONE: ["<|answer|>"], TWO: ["<|answer|>"]}):
        answers = interleave.ask([ONE, TWO], num_beams=3)
    for question, answer in zip((ONE, TWO), answers, strict=True):
        ids, routes = protocol.join(protocol.transcript(TOKENIZER, question, closed=True))
        inputs = {"input_ids": torch.tensor([ids]), "routing_mask": torch.tensor([routes])}
        stops = sorted(interleave.answering.stop_ids())
        options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": stops}
        whole = model.generate(**inputs, memory=bank, **options)[0, len(ids) :].tolist()
        assert answer.token_ids == whole


def test_answers_are_greedy_unless_asked_otherwise() -> None:
    """Also where the model's own options sample, or limit the length."""
    interleave = asker(max_rounds=1)
    config = interleave.model.generation_config
    plain = interleave.ask(ONE)
    before = config.to_dict()
    try:
        config.update(do_sample=True, temperature=9.0, top_p=0.9, max_new_tokens=3)
        assert interleave.ask(ONE).token_ids == plain.token_ids
        torch.manual_seed(0)
        assert interleave.ask(ONE, do_sample=True).token_ids != plain.token_ids
    finally:
        config.update(**before)


@each_selection
@each_way
def test_a_model_that_was_saved_without_a_cache_answers_all_the_same(reuse, select) -> None:
    """As Trainer saves them: the rounds keep a cache whatever the configuration says."""
    interleave = asker(reuse_cache=reuse, select=select, max_rounds=3)
    says = {ONE: ["[3]<|docs|>", "<|answer|>"]}
    with script(interleave, says):
        expected = interleave.ask(ONE)
        configs = interleave.model.config, interleave.model.generation_config
        before = [config.use_cache for config in configs]
        try:
            for config in configs:
                config.use_cache = False
            assert_same_answers(interleave.ask(ONE), expected)
        finally:
            for config, value in zip(configs, before, strict=True):
                config.use_cache = value


def test_a_generation_config_applies_and_stays_as_it_was() -> None:
    interleave = asker(max_rounds=1)
    config = interleave.model.generation_config
    given = type(config)(max_new_tokens=3, do_sample=False, eos_token_id=TOKENIZER.eos_token_id)
    before = given.to_dict()
    assert len(interleave.ask(ONE, generation_config=given).token_ids) == 3
    assert given.to_dict() == before and interleave.model.generation_config is config


def test_the_model_is_left_as_it_was() -> None:
    """Asking in the middle of training neither drops out nor leaves the model in another mode."""
    interleave = asker(max_rounds=1)
    modes = []
    hook = interleave.model.register_forward_hook(lambda model, args, output: modes.append(model.training))
    interleave.model.train()
    try:
        interleave.ask(ONE)
        assert interleave.model.training and modes and not any(modes)
        with pytest.raises(ValueError):
            interleave.ask(ONE, num_return_sequences=2, do_sample=True)
        assert interleave.model.training
    finally:
        hook.remove()
        interleave.model.eval()
