"""Runs that collapse and are stopped, healthy ones that are not, and what the monitor of a Trainer measures."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import COMPACT, TEXTS, byte_tokenizer, memory_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from msa_hf.training import CollapsedError, CollapseGuard, QuestionCollator, RouterMonitor, router_recall

DOCUMENTS = {f"d{n}": text for n, text in enumerate(TEXTS)}
QUESTIONS = [
    {"question": f"Where is the {text.split()[1]}?", "answer": text.split()[3], "positives": [f"d{n}"]}
    for n, text in enumerate(TEXTS)
]


def router(distinct: int | tuple[int, ...] = 300, recall: float = 0.5, questions: int = 100, wanted: int = 100) -> Any:
    """A measurement of routers that choose 16 documents; `distinct` by layer."""
    layers = distinct if isinstance(distinct, tuple) else (distinct, 16)
    return {
        "k": 16,
        "questions": questions,
        "wanted": wanted,
        "recall": recall,
        "distinct": dict(enumerate(layers, start=4)),
    }


# The guard ------------------------------------------------------------------------------------------------------------


def test_a_router_that_gives_every_question_the_same_documents_is_stopped() -> None:
    """100 questions need 100 documents; a quarter of the way there from 16 is 37."""
    guard = CollapseGuard(patience=2, distinct_share=0.25)
    guard.check(router(250), step=0)
    guard.check(router(36), step=100)
    with pytest.raises(
        CollapsedError, match=r"at step 200, 2 .* chose 20 for 100 questions, .* 100 .* 37 are expected"
    ):
        guard.check(router(20), step=200)


@pytest.mark.parametrize("distinct", [37, 100, 1600, (16, 40), (40, 16, 16)])
def test_a_router_that_tells_questions_apart_in_one_layer_goes_on(distinct: Any) -> None:
    guard = CollapseGuard(patience=1)
    for step in range(5):
        guard.check(router(distinct), step=step)


def test_few_questions_cannot_show_a_collapse() -> None:
    """Where no more documents are wanted than one question chooses."""
    guard = CollapseGuard(patience=1)
    for _ in range(3):
        guard.check(router(16, questions=16, wanted=16))
        guard.check(router((10, 10), questions=10, wanted=10))  # of a bank of 10
    with pytest.raises(CollapsedError):
        guard.check(router(16, questions=30, wanted=30))


def test_the_untrained_router_is_the_line_and_is_not_judged() -> None:
    """Even one that chooses the same documents for all."""
    guard = CollapseGuard(patience=1)
    guard.check(router(16, recall=0.02))
    assert guard.untrained == router(16, recall=0.02)
    guard.check(router(300, recall=0.02))


def test_recall_far_below_the_untrained_routers_stops_a_run() -> None:
    guard = CollapseGuard(patience=2, recall_share=0.5)
    guard.check(router(recall=0.4), step=0)
    guard.check(router(recall=0.19), step=1)
    with pytest.raises(CollapsedError, match=r"recall@16 is 0.100, that of the untrained router was 0.400"):
        guard.check(router(recall=0.1), step=2)


@pytest.mark.parametrize(
    "before, now, questions",
    [(0.4, 0.2, 10_000), (0.04, 0.01, 100), (0.0, 0.0, 100)],
    ids=["half-of-it", "within-two-standard-errors", "nothing"],
)
def test_a_fall_that_is_not_clear_goes_on(before: float, now: float, questions: int) -> None:
    """0.04 +- 0.02 on 100 questions may be 0.01; half is not below half."""
    guard = CollapseGuard(patience=1)
    guard.check(router(recall=before, questions=questions))
    for _ in range(5):
        guard.check(router(recall=now, questions=questions))


def test_patience_counts_measurements_in_a_row() -> None:
    """Of one kind: a recovery between begins anew, and another fault does not add to it."""
    guard = CollapseGuard(patience=2)
    guard.check(router(recall=0.4))
    for _ in range(3):
        guard.check(router(16, recall=0.4))
        guard.check(router(300, recall=0.1))
    with pytest.raises(CollapsedError, match="recall"):
        guard.check(router(300, recall=0.1))


def test_empty_answers_and_a_loss_that_is_no_number_stop_a_run() -> None:
    guard = CollapseGuard(patience=2, empty_share=0.5)
    guard.check(empty=0.6)
    guard.check(empty=0.5)
    guard.check(empty=0.51, loss=3.0)
    with pytest.raises(CollapsedError, match=r"70.0% of the answers are empty, above 50.0%"):
        guard.check(empty=0.7)
    with pytest.raises(CollapsedError, match="at step 9: the loss is no number"):
        guard.check(loss=math.nan, step=9)


@pytest.mark.parametrize(
    "changes", [{"patience": 0}, {"distinct_share": 1.1}, {"recall_share": -1}, {"empty_share": 2}]
)
def test_a_guard_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must"):
        CollapseGuard(**changes)


# The monitor ----------------------------------------------------------------------------------------------------------


class Break(TrainerCallback):
    """Sets parameters whose names have a part to a value, before one step's measurement."""

    def __init__(self, step: int, part: str, value: float) -> None:
        self.step, self.part, self.value = step, part, value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            for name, weight in kwargs["model"].named_parameters():
                if self.part in name:
                    weight.data.fill_(self.value)


def trainer(tmp_path: Path, callbacks: list[TrainerCallback], steps: int = 7, **arguments: Any) -> Trainer:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)  # of the routers
    model = memory_model(tokenizer, COMPACT, router_init="random").train()
    options = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        label_names=["labels"],
        **arguments,
    )
    collator = QuestionCollator(tokenizer, DOCUMENTS, pool=6)
    return Trainer(model, options, data_collator=collator, train_dataset=QUESTIONS, callbacks=callbacks)


def monitor(**kwargs: Any) -> RouterMonitor:
    return RouterMonitor(byte_tokenizer(), DOCUMENTS, QUESTIONS, **kwargs)


@pytest.mark.parametrize("bf16", [True])
def test_the_untrained_router_and_every_few_steps_are_measured_and_logged(tmp_path: Path, bf16: bool) -> None:
    watching = monitor(every=3, guard=CollapseGuard())
    run = trainer(tmp_path, [watching], bf16=bf16)
    tokenizer = byte_tokenizer()
    rows = [{"key": key, "text": text} for key, text in DOCUMENTS.items()]
    bank = run.model.encode_documents(rows, tokenizer, show_progress=False)
    untrained = router_recall(run.model, tokenizer, bank, QUESTIONS)
    run.train()
    assert run.model.training
    assert [item["step"] for item in watching.measurements] == [0, 3, 6]
    if not bf16:  # whose questions run in another precision, once a Trainer is at work
        assert watching.measurements[0] == {"step": 0, **untrained}
    logged = [row for row in run.state.log_history if "router_recall@4" in row]
    assert [row["step"] for row in logged] == [0, 3, 6]
    for row, item in zip(logged, watching.measurements, strict=True):
        assert row["router_recall@4"] == item["recall"]
        assert row["router_recall@1"] == item["recall_at_1"]
        assert row["router_distinct"] == max(item["distinct"].values())
        assert row["router_recall@4/layer_3"] == item["layers"][3]


def test_measuring_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    """The same losses and the same weights with a monitor and without."""
    runs = [trainer(tmp_path, callbacks) for callbacks in ([], [monitor(every=1)])]
    for run in runs:
        run.train()
    plain, watched = ([row["loss"] for row in run.state.log_history if "loss" in row] for run in runs)
    assert plain == watched and len(plain) == 7
    for (name, first), second in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_documents_and_questions_are_put_as_the_protocol_says() -> None:
    tokenizer = byte_tokenizer()
    model = memory_model(tokenizer, COMPACT)
    watching = monitor(protocol=COMPACT)
    rows = COMPACT.encode_corpus(({"key": key, "text": text} for key, text in DOCUMENTS.items()), tokenizer)
    bank = model.encode_documents(rows, tokenizer, show_progress=False)
    seen: list[str] = []

    def see(module: Any, arguments: Any, kwargs: Any) -> None:
        if kwargs.get("memory") is not None:  # documents that are encoded come by as well
            seen.extend(tokenizer.batch_decode(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    found = watching.measure(model, 5)
    hook.remove()
    assert [text.replace("<pad>", "") for text in seen] == [f"{item['question']}<|ids|>" for item in QUESTIONS]
    assert found == router_recall(model, tokenizer, bank, QUESTIONS, protocol=COMPACT)
    assert found != monitor().measure(model)
    assert watching.measurements == [{"step": 5, **found}]


def test_a_run_whose_router_collapses_is_stopped(tmp_path: Path) -> None:
    """Router keys that say nothing: every layer chooses the same 4 documents for all 18 questions."""
    watching = monitor(every=1, guard=CollapseGuard(patience=2))
    run = trainer(tmp_path, [Break(3, "router_k", 0.0), watching])
    with pytest.raises(CollapsedError, match=r"at step 4, 2 measurements in a row: .* chose 4 for 18 questions"):
        run.train()
    assert [max(item["distinct"].values()) for item in watching.measurements][-2:] == [4, 4]
    assert watching.measurements[2]["distinct"][3] > 8


def test_a_run_without_a_guard_goes_on(tmp_path: Path) -> None:
    watching = monitor(every=1)
    trainer(tmp_path, [Break(1, "router_k", 0.0), watching], steps=5).train()
    assert len(watching.measurements) == 6


def test_weights_that_are_no_numbers_stop_a_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, [Break(2, "router_q", math.nan), monitor(every=2, guard=CollapseGuard())])
    with pytest.raises(CollapsedError, match="at step 2: weights are no numbers"):
        run.train()


def test_a_gradient_that_is_no_number_stops_a_run_between_measurements(tmp_path: Path) -> None:
    """The Trainer's log hides a loss that is none, but not the gradient's norm."""
    run = trainer(tmp_path, [Break(2, "lm_head", math.nan), monitor(every=100, guard=CollapseGuard())])
    with pytest.raises(CollapsedError, match="at step 3: the loss is no number"):
        run.train()


def test_figures_go_to_the_trainers_own_log_where_it_is_given(tmp_path: Path) -> None:
    """Other callbacks get them then, whatever their place; and each measurement stands in the history once."""
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    watching = monitor(every=3)
    run = trainer(tmp_path, [Reporter(), watching])
    watching.log = run.log
    run.train()
    assert len([row for row in seen if "router_recall@4" in row]) == 3
    assert [row["step"] for row in run.state.log_history if "router_recall@4" in row] == [0, 3, 6]


def test_the_next_printed_line_shows_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, [monitor(every=3)]).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert [number for number, line in enumerate(lines, start=1) if "router_recall@4" in line] == [1, 3, 6]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"documents": {}}, "`documents` is empty"),
        ({"questions": [{**QUESTIONS[0], "positives": []}]}, "holds none with positives"),
        ({"questions": [{**QUESTIONS[0], "positives": ["x"]}]}, "names 'x', which is the key of no document"),
    ],
)
def test_a_monitor_that_can_measure_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterMonitor(byte_tokenizer(), **{"documents": DOCUMENTS, "questions": QUESTIONS, **changes})
